# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""The two forward verbs as kernels: one launch each, nothing allocated, nothing read back to the host.

Tensors (N, C, *S) are addressed as (outer, C, inner) by strides; see gpu_tiles.py. A grid is groups of columns ×
splits of tiles. Sums over a program's tiles are kept per lane in float32 (float64 for float64) and leave it as
float64; the last program of a group adds the programs' partials in the order of the splits, so bits repeat.
"""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import (
    activate,
    channel_params,
    counted,
    next_tile,
    pre_activation,
    program_share,
    scaled,
    tile_pointers,
    tile_valid,
)
from syncbn.backends.gpu_sums import (
    arrive,
    combine,
    inverse_std,
    lane_sums,
    masked_lane_sums,
    moments_of,
    move_running,
    raw_sums,
    store_partial,
)

SIZES = ["outer", "inner", "columns", "positions", "per_program"]
X = [*SIZES, "x_stride_o", "x_stride_c", "x_stride_i", "mask_stride_o", "mask_stride_i"]
Y = ["y_stride_o", "y_stride_c", "y_stride_i"]
RESIDUAL = ["residual_stride_o", "residual_stride_c", "residual_stride_i"]
# Sizes and strides are not specialised on their values: a new shape is new numbers, not a new compilation.

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit(do_not_specialize=X)
def batch_sums_kernel(
    x_ptr,  # (N, C, *S)
    mask_ptr,  # (N, *S) bool, or None
    partials_ptr,  # (splits, 2C + 1) float64
    semaphore_ptr,  # (groups) int32, all 0
    sums_ptr,  # (2C + 1) float64: the result
    outer, inner, columns, positions, per_program,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """[Σx, Σx², count]: Σx = Σd + n·k, Σx² = Σd² + 2k·Σd + n·k² with d = x − k, k the mean of the lanes' pivots"""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    inner = scaled(inner, "planes", KIND, ALIGN)
    columns = scaled(columns, "rows", KIND, ALIGN)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, start, stop, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, per_program, BLOCK_C, BLOCK_I
    )
    column = group * BLOCK_C
    if mask_ptr is None:
        n, pivot, total, total_sq = lane_sums(
            x_ptr, column, start, stop, tiles_inner, inner, columns, positions,
            x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I, DTYPE,
        )
    else:
        n, pivot, total, total_sq = masked_lane_sums(
            x_ptr, mask_ptr, column, start, stop, tiles_inner, inner, columns, positions,
            x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
            KIND, ALIGN, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I, DTYPE,
        )
    count, sum_x, sum_sq = raw_sums(n, pivot, total, total_sq)
    channels = FOLD if FOLD else columns
    splits = tl.num_programs(0) // groups
    row = 2 * channels + 1
    lane = column + tl.arange(0, BLOCK_C)
    mine = partials_ptr + split.to(tl.int64) * row
    store_partial(mine, sum_x, column, columns, FOLD, BLOCK_C)
    store_partial(mine + channels, sum_sq, column, columns, FOLD, BLOCK_C)
    if mask_ptr is not None:
        tl.store(mine + 2 * channels + lane, count, mask=lane == 0)
    if arrive(semaphore_ptr + group, splits):
        sum_x = combine(partials_ptr, row, splits, column, channels, BLOCK_C, BLOCK_S)
        sum_sq = combine(partials_ptr + channels, row, splits, column, channels, BLOCK_C, BLOCK_S)
        tl.store(sums_ptr + lane, sum_x, mask=lane < channels)
        tl.store(sums_ptr + channels + lane, sum_sq, mask=lane < channels)
        if group == 0:
            if mask_ptr is None:
                tl.store(sums_ptr + 2 * channels, positions.to(tl.float64))
            else:
                counts = combine(partials_ptr + 2 * channels, row, splits, 0, 1, 1, BLOCK_S)
                tl.store(sums_ptr + 2 * channels + tl.arange(0, 1), counts)


@triton.jit(do_not_specialize=[*X, *Y, *RESIDUAL])
def normalize_kernel(
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    sums_ptr,  # (2C + 1) float64: Σx, Σx², count of all ranks
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    running_mean_ptr,  # (C), or None
    running_var_ptr,  # (C), or None
    tracked_ptr,  # (1) integer, or None
    semaphore_ptr,  # (1) int32, 0; used if CUMULATIVE
    y_ptr,  # (N, C, *S): the result
    mean_ptr,  # (C) float32 or float64: result
    invstd_ptr,  # (C) of mean's dtype: result
    eps, eps_rest, momentum, momentum_rest,  # each a float32 and what that leaves of a float64
    outer, inner, columns, positions, per_program,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    y_stride_o, y_stride_c, y_stride_i, residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_Y: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, CUMULATIVE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """y = activation((x − mean)·invstd·weight + bias + residual); the first split of a group moves its buffers"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN)
    columns = scaled(columns, "rows", KIND, ALIGN)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, start, stop, tiles_inner = program_share(  # from the end, which batch_sums left in L2
        tl.num_programs(0) - 1 - tl.program_id(0), outer, inner, columns, per_program, BLOCK_C, BLOCK_I
    )
    column = group * BLOCK_C
    lane = column + tl.arange(0, BLOCK_C)
    exists = lane < columns
    channel = lane % FOLD if FOLD else lane
    channels = FOLD if FOLD else columns
    weight = channel_params(weight_ptr, channel, exists, 1.0, DTYPE)
    bias = channel_params(bias_ptr, channel, exists, 0.0, DTYPE)[:, None]
    mean64, var64, count = moments_of(sums_ptr, channel, exists, channels)
    mean = mean64.to(DTYPE)
    invstd = inverse_std(var64 + eps + eps_rest, DTYPE)
    if split == 0:
        tl.store(mean_ptr + channel, mean, mask=lane < channels)
        tl.store(invstd_ptr + channel, invstd, mask=lane < channels)
        if running_mean_ptr is not None:
            move_running(
                running_mean_ptr, running_var_ptr, tracked_ptr, semaphore_ptr, group, groups,
                channel, lane < channels, mean64, var64, count, momentum, momentum_rest, CUMULATIVE,
            )
    mean = mean[:, None]
    scale = (invstd * weight)[:, None]
    o = start // tiles_inner
    t = start % tiles_inner
    for _ in range(start, stop):
        valid = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        x = tl.load(at, mask=valid, other=0.0).to(DTYPE)
        z = pre_activation(
            x, mean, scale, bias, residual_ptr, o, t, column, residual_stride_o, residual_stride_c, residual_stride_i,
            valid, KIND_R, ALIGN, WIDE, BLOCK_C, BLOCK_I,
        )
        y = activate(z, ACTIVATION, SLOPE)
        if mask_ptr is not None:
            y = tl.where(counted(mask_ptr, o, t, mask_stride_o, mask_stride_i, valid, BLOCK_I), y, 0.0)
        at = tile_pointers(
            y_ptr, o, t, column, y_stride_o, y_stride_c, y_stride_i, KIND_Y, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        tl.store(at, y.to(y_ptr.dtype.element_ty), mask=valid)
        o, t = next_tile(o, t, tiles_inner)
