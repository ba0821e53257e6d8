# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""What the kernels do to sums: per lane, per program, over the programs, and what becomes of them."""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import counted, next_tile, tile_pointers, tile_valid

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit
def lane_sums(
    x_ptr, column, start, stop, tiles_inner, inner, columns, positions, x_stride_o, x_stride_c, x_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, DTYPE: tl.constexpr,
):
    """count, pivot k, Σd and Σd² of each lane (BLOCK_C, BLOCK_I) with d = x − k, k the lane's first value

    Of T values, |k − mean| ≤ σ·√(T − 1) whatever they are (Cauchy–Schwarz), so squares lose at most a factor T.
    """
    o = start // tiles_inner
    t = start % tiles_inner
    valid = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
    at = tile_pointers(x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I)
    pivot = tl.load(at, mask=valid, other=0.0).to(DTYPE)
    o, t = next_tile(o, t, tiles_inner)
    if not EVEN:  # one of the first two tiles has every lane that any tile has
        present = tl.where(start + 1 < stop, columns, 0)
        second = tile_valid(t, column, inner, present, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
        valid = second & (valid == 0)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        pivot += tl.load(at, mask=valid, other=0.0).to(DTYPE)
    total = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total_sq = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    for _ in range(start + 1, stop):
        valid = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        d = tl.where(valid, tl.load(at, mask=valid, other=0.0).to(DTYPE) - pivot, 0.0)
        total += d
        total_sq = tl.fma(d, d, total_sq)
        o, t = next_tile(o, t, tiles_inner)
    # How many of the tiles had the lane: all but, perhaps, the last one of each outer index.
    last = tile_valid(tiles_inner - 1, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
    ends = stop // tiles_inner - start // tiles_inner
    n = tl.where(last, stop - start, stop - start - ends).to(DTYPE)
    return n, pivot, total, total_sq


@triton.jit
def masked_lane_sums(
    x_ptr, mask_ptr, column, start, stop, tiles_inner, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, DTYPE: tl.constexpr,
):
    """lane_sums of what the mask lets through; the pivot is the first of that"""
    o = start // tiles_inner
    t = start % tiles_inner
    n = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    pivot = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    total_sq = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    for _ in range(start, stop):
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
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
        o, t = next_tile(o, t, tiles_inner)
    return n, pivot, total, total_sq


@triton.jit
def raw_sums(n, pivot, total, total_sq):
    """count, Σx, Σx² (BLOCK_C) in float64 of lanes (BLOCK_C, BLOCK_I): lanes move to a common pivot, then add up"""
    used = n > 0
    common = tl.sum(tl.where(used, pivot, 0.0), axis=1) / tl.maximum(tl.sum(used.to(n.dtype), axis=1), 1.0)
    delta = tl.where(used, pivot - common[:, None], 0.0)
    total_sq += delta * (2 * total + n * delta)
    total += n * delta
    count = tl.sum(n, axis=1).to(tl.float64)
    sum_d = tl.sum(total, axis=1).to(tl.float64)
    sum_d_sq = tl.sum(total_sq, axis=1).to(tl.float64)
    k = common.to(tl.float64)
    return count, sum_d + count * k, sum_d_sq + k * (2 * sum_d + count * k)


@triton.jit
def store_partial(ptr, values, column, columns, FOLD: tl.constexpr, BLOCK_C: tl.constexpr):
    """one program's column sums (BLOCK_C) as channel sums, float64"""
    c = tl.arange(0, BLOCK_C)
    if FOLD:
        for channel in tl.static_range(FOLD):
            mine = (c % FOLD == channel) & (c < columns)
            tl.store(ptr + channel, tl.sum(tl.where(mine, values, 0.0), axis=0))
    else:
        tl.store(ptr + column + c, values, mask=column + c < columns)


@triton.jit
def arrive(semaphore_ptr, expected):
    """True in the last of the expected programs to come here; leaves the semaphore at 0 for the next launch"""
    tl.debug_barrier()  # the whole program's loads and stores come before its arrival
    last = tl.atomic_add(semaphore_ptr, 1, sem="acq_rel", scope="gpu") == expected - 1
    if last:
        tl.store(semaphore_ptr, 0)
    return last


@triton.jit
def combine(ptr, row, splits, column, channels, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr):
    """Σ over the splits of partials (splits, row) at [column, column + BLOCK_C), float64, in a fixed order"""
    c = (column + tl.arange(0, BLOCK_C))[:, None]
    s = tl.arange(0, BLOCK_S)[None, :]
    total = tl.zeros([BLOCK_C, BLOCK_S], tl.float64)
    for first in range(0, splits, BLOCK_S):
        at = (first + s).to(tl.int64) * row + c
        exists = (c < channels) & (first + s < splits)
        total += tl.load(ptr + at, mask=exists, other=0.0, cache_modifier=".cg")
    return tl.sum(total, axis=1)


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
def move_running(
    mean_ptr, var_ptr, tracked_ptr, semaphore_ptr, group, groups, channel, exists, mean, var, count,
    momentum, momentum_rest, CUMULATIVE: tl.constexpr,
):
    """running ← (1 − f)·running + f·statistic, f = momentum or 1/calls; the variance unbiased

    Held where the count is 0 (variance: ≤ 1). The counter moves always. Only a cumulative average reads it in every
    group: there the last group to have read it increments it.
    """
    factor = tl.zeros(mean.shape, tl.float64) + momentum + momentum_rest
    if CUMULATIVE:
        calls = tl.load(tracked_ptr).to(tl.int64) + 1
        factor = tl.zeros(mean.shape, tl.float64) + 1.0 / calls.to(tl.float64)
    unbiased = var * (count / tl.maximum(count - 1, 1.0))
    old = tl.load(mean_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    store_as(mean_ptr + channel, tl.where(count > 0, old + factor * (mean - old), old), exists)
    old = tl.load(var_ptr + channel, mask=exists, other=0.0).to(tl.float64)
    store_as(var_ptr + channel, tl.where(count > 1, old + factor * (unbiased - old), old), exists)
    if CUMULATIVE:
        if arrive(semaphore_ptr, groups):
            tl.store(tracked_ptr, calls.to(tracked_ptr.dtype.element_ty))
    elif tracked_ptr is not None:
        if group == 0:
            tl.store(tracked_ptr, tl.load(tracked_ptr) + 1)
