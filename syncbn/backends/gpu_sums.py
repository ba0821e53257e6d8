# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""What the kernels do to sums: over a program's tiles, over the programs, and what becomes of them."""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import counted, next_tile, positions_in, tile_at, tile_pointers, tile_valid

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit
def add_two(a, b, c, d):
    """(a, b) + (c, d): two sums in one reduction"""
    return a + c, b + d


@triton.jit
def column_sums(
    x_ptr, column, split, splits, count, tiles_inner, inner, columns, positions, x_stride_o, x_stride_c, x_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, MERGED: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """count, Σx, Σx² of each column (BLOCK_C) in float64, by d = x − k with k the mean of the program's first tile

    Of T tiles none is larger than the first, so |k − mean| ≤ σ·√(T − 1) whatever the values are (Cauchy–Schwarz) and
    squares lose at most a factor T. A program that would begin with the last, smaller tile of an outer index ends with
    it instead; where its second tile is such a one too, all of them are. In float32
    d² is infinite from |d| = 1.8e19 on.
    """
    turn = 0
    if not (EVEN or MERGED):
        turn = ((split % tiles_inner == tiles_inner - 1) & (count > 1)).to(tl.int32)
    o, t = tile_at(split + turn * splits, tiles_inner, MERGED)
    pivot = tl.zeros([BLOCK_C], DTYPE)
    total = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total_sq = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    n = count * BLOCK_I + tl.zeros([BLOCK_C], tl.int32) if FOLD else count * BLOCK_I
    for at_tile in tl.range(0, count, num_stages=STAGES):
        valid = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        x = tl.load(at, mask=valid, other=0.0).to(DTYPE)
        present = positions_in(t, inner, positions, FOLD, EVEN, GROUP, BLOCK_C, BLOCK_I)
        n -= BLOCK_I - present
        if at_tile == 0:  # here, since the loads of the tiles after it are under way by now
            pivot = tl.sum(x, axis=1) / tl.maximum(present, 1)
        d = tl.where(valid, x - pivot[:, None], 0.0)
        total += d
        total_sq = tl.fma(d, d, total_sq)
        o, t = next_tile(o, t, splits, tiles_inner, MERGED)
        if not (EVEN or MERGED):
            first_o, first_t = tile_at(split, tiles_inner, MERGED)
            ends = at_tile + 1 + turn == count
            o = tl.where(ends, first_o, o)
            t = tl.where(ends, first_t, t)
    sum_d, sum_d_sq = tl.reduce((total, total_sq), 1, add_two)
    n = tl.zeros([BLOCK_C], tl.float64) + n
    return raw_sums(spread(n), spread(pivot), spread(sum_d), spread(sum_d_sq))


@triton.jit
def counted_sums(
    x_ptr, mask_ptr, column, split, splits, count, tiles_inner, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, MERGED: tl.constexpr, EVEN: tl.constexpr,
    WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """column_sums of what counts, where a lane may count less often than its neighbour; its pivot is its first value

    Of a lane's T values the first is no further than σ·√(T − 1) from their mean, as above.
    """
    o, t = tile_at(split, tiles_inner, MERGED)
    n = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    pivot = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total_sq = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    for _ in tl.range(0, count, num_stages=STAGES):
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        x = tl.load(at, mask=exists, other=0.0).to(DTYPE)
        valid = counted(mask_ptr, o, t, mask_stride_o, mask_stride_i, exists, BLOCK_I)
        pivot = tl.where(valid & (n == 0), x, pivot)
        d = tl.where(valid, x - pivot, 0.0)
        n += valid.to(DTYPE)
        total += d
        total_sq = tl.fma(d, d, total_sq)
        o, t = next_tile(o, t, splits, tiles_inner, MERGED)
    used = n > 0
    pivots, lanes = tl.reduce((tl.where(used, pivot, 0.0), used.to(DTYPE)), 1, add_two)
    common = pivots / tl.maximum(lanes, 1.0)  # lanes move to a common pivot, then add up
    delta = tl.where(used, pivot - common[:, None], 0.0)
    total_sq += delta * (2 * total + n * delta)
    total += n * delta
    sum_d, sum_d_sq = tl.reduce((total, total_sq), 1, add_two)
    n = tl.sum(n, axis=1).to(tl.float64)
    return raw_sums(n, spread(common), spread(sum_d), spread(sum_d_sq))


@triton.jit
def spread(values):
    """the same values, each in one thread or few: a reduction leaves each in many, which would all convert them"""
    return tl.gather(values, tl.arange(0, values.shape[0]), 0)


@triton.jit
def raw_sums(n, pivot, sum_d, sum_d_sq):
    """n, Σx, Σx² in float64 from those of d = x − pivot: Σx = Σd + n·k, Σx² = Σd² + 2k·Σd + n·k²"""
    k = pivot.to(tl.float64)
    sum_d = sum_d.to(tl.float64)
    return n, sum_d + n * k, sum_d_sq.to(tl.float64) + k * (2 * sum_d + n * k)


@triton.jit
def channel_sums(
    values, FOLD: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr
):
    """column sums (BLOCK_C) as channel sums (BLOCK_K), each from its own BLOCK_P columns or fewer"""
    if FOLD or PLANE:
        k = tl.arange(0, BLOCK_K)[:, None]
        p = tl.arange(0, BLOCK_P)[None, :]
        at = p * FOLD + k if FOLD else k * PLANE + p
        mine = (at < GROUP) & ((k < FOLD) if FOLD else (p < PLANE))
        picked = tl.gather(values, tl.reshape(tl.where(mine, at, 0), [BLOCK_K * BLOCK_P]), 0)
        return tl.sum(tl.where(mine, tl.reshape(picked, [BLOCK_K, BLOCK_P]), 0.0), axis=1)
    else:
        return values


@triton.jit
def sum_lanes(
    group, channels, FOLD: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, BLOCK_K: tl.constexpr
):
    """of each lane (2·BLOCK_K) of a group's two sums: which of the two, its channel, whether it exists"""
    HERE: tl.constexpr = FOLD if FOLD else (GROUP // PLANE if PLANE else GROUP)
    lane = tl.arange(0, 2 * BLOCK_K)
    channel = group * HERE + lane % BLOCK_K
    return lane // BLOCK_K, channel, (lane % BLOCK_K < HERE) & (channel < channels)


@triton.jit
def arrive(semaphore_ptr, expected):
    """True in the last of the expected programs to come here; leaves the semaphore at 0 for the next launch"""
    tl.debug_barrier()  # the whole program's loads and stores come before its arrival
    last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(semaphore_ptr, 0)
    return last


@triton.jit
def add_rows(ptr, rows, WIDTH: tl.constexpr, BLOCK_S: tl.constexpr):
    """Σ over rows (rows, WIDTH) of float64, in a fixed order"""
    j = tl.arange(0, WIDTH)[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    total = tl.zeros([WIDTH, BLOCK_S], tl.float64)
    for first in range(0, rows, BLOCK_S):
        total += tl.load(ptr + (first + s) * WIDTH + j, mask=first + s < rows, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=1)


@triton.jit
def combine(
    partials_ptr, semaphores_ptr, group, groups, split, splits, first, second,
    BLOCK_K: tl.constexpr, TEAM: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """whether this program is its group's last, and then both sums over all splits (2·BLOCK_K), in a fixed order

    The last program of each TEAM of splits adds the team's rows, the last of those the teams': each reads little.
    """
    WIDTH: tl.constexpr = 2 * BLOCK_K
    partials_ptr = tl.multiple_of(partials_ptr, 16)
    mine = partials_ptr + (group * splits + split).to(tl.int64) * WIDTH
    k = tl.arange(0, BLOCK_K)
    tl.store(mine + k, first)
    tl.store(mine + BLOCK_K + k, second)
    total = tl.zeros([WIDTH], tl.float64)
    is_last = False
    if TEAM:
        teams = tl.cdiv(splits, TEAM)
        team = split // TEAM
        members = tl.minimum(splits - team * TEAM, TEAM)
        if arrive(semaphores_ptr + groups + group * teams + team, members):
            rows = partials_ptr + (group * splits + team * TEAM).to(tl.int64) * WIDTH
            added = add_rows(rows, members, WIDTH, BLOCK_S)
            of_teams = partials_ptr + (groups * splits + group * teams).to(tl.int64) * WIDTH
            tl.store(of_teams + team * WIDTH + tl.arange(0, WIDTH), added)
            is_last = arrive(semaphores_ptr + group, teams)
            if is_last:
                total = add_rows(of_teams, teams, WIDTH, BLOCK_S)
    else:
        is_last = arrive(semaphores_ptr + group, splits)
        if is_last:
            total = add_rows(partials_ptr + (group * splits).to(tl.int64) * WIDTH, splits, WIDTH, BLOCK_S)
    return is_last, total


@triton.jit
def moments_of(sums_ptr, channel, exists, channels):
    """mean, biased variance (BLOCK_C) and count in float64; 0, 0 where the count is 0"""
    count = tl.load(sums_ptr + 2 * channels)
    share = 1.0 / tl.maximum(count, 1.0)
    mean = tl.load(sums_ptr + channel, mask=exists, other=0.0) * share
    var = tl.load(sums_ptr + channels + channel, mask=exists, other=0.0) * share - mean * mean
    return mean, tl.where(var < 0, 0.0, var), count


@triton.jit
def inverse_std(var, DTYPE: tl.constexpr):
    """1/√var, correctly rounded steps in DTYPE"""
    if DTYPE == tl.float64:
        return 1.0 / tl.sqrt(var)
    else:
        return tl.div_rn(tl.full(var.shape, 1.0, tl.float32), tl.sqrt_rn(var.to(tl.float32)))


@triton.jit
def store_as(ptr, value, exists):
    """stores float64 in the pointer's dtype"""
    if ptr.dtype.element_ty == tl.float64:
        tl.store(ptr, value, mask=exists)
    else:
        tl.store(ptr, value.to(tl.float32).to(ptr.dtype.element_ty), mask=exists)


@triton.jit
def fits(value, ptr):
    """whether the pointer's dtype has a finite number for a float64"""
    if ptr.dtype.element_ty == tl.float64:
        return tl.abs(value) < float("inf")
    else:
        return tl.abs(value.to(tl.float32).to(ptr.dtype.element_ty).to(tl.float32)) < float("inf")


@triton.jit
def move_running(
    mean_ptr, var_ptr, tracked_ptr, semaphore_ptr, group, groups, channel, exists, mean, var, count,
    momentum, momentum_rest, CUMULATIVE: tl.constexpr, SKIP: tl.constexpr,
):
    """running ← (1 − f)·running + f·statistic, f = momentum or 1/calls; the variance unbiased

    Held where the count is 0 (variance: ≤ 1), and if SKIP in a channel where not both are finite. The counter moves
    always. Only a cumulative average reads it in every group: there the last group to have read it increments it.
    """
    factor = tl.zeros(mean.shape, tl.float64) + momentum + momentum_rest
    if CUMULATIVE:
        calls = tl.load(tracked_ptr).to(tl.int64) + 1
        factor = tl.zeros(mean.shape, tl.float64) + 1.0 / calls.to(tl.float64)
    unbiased = var * (count / tl.maximum(count - 1, 1.0))
    old_mean = tl.load(mean_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    old_var = tl.load(var_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    new_mean = old_mean + factor * (mean - old_mean)
    new_var = old_var + factor * (unbiased - old_var)
    if SKIP:
        exists = exists & fits(new_mean, mean_ptr) & fits(new_var, var_ptr)
    store_as(mean_ptr + channel, tl.where(count > 0, new_mean, old_mean), exists)
    store_as(var_ptr + channel, tl.where(count > 1, new_var, old_var), exists)
    if CUMULATIVE:
        if arrive(semaphore_ptr, groups):
            tl.store(tracked_ptr, calls.to(tracked_ptr.dtype.element_ty))
    elif tracked_ptr is not None:
        if group == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)


@triton.jit
def stamp(wire_ptr, at, tag):
    """the fingerprint of a call, 2³² + tag and tag², behind its sums: see fingerprint.py"""
    mine = tl.zeros((), tl.float64) + tag
    tl.store(wire_ptr + at, tl.where(mine > 0, mine + 4294967296.0, 0.0))
    tl.store(wire_ptr + at + 1, mine * mine)


@triton.jit
def report(report_ptr, wire_ptr, at, tag, turn):
    """to the host, see gpu_report.py: the first call that was mixed up, and how far the device has come"""
    if tl.program_id(0) == 0:
        if tag > 0:
            votes = tl.load(wire_ptr + at)
            squares = tl.load(wire_ptr + at + 1)
            mine = tl.zeros((), tl.float64) + tag
            voters = tl.floor(votes * 2.3283064365386963e-10)  # 2⁻³²
            if (votes != voters * (mine + 4294967296.0)) | (squares != voters * mine * mine):
                if tl.load(report_ptr) == 0:
                    tl.store(report_ptr + 1, votes)
                    tl.store(report_ptr + 2, squares)
                    tl.store(report_ptr, mine)
        if turn > 0:
            tl.store(report_ptr + 3, tl.zeros((), tl.float64) + turn)
