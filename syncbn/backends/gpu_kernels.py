# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""The two forward verbs as kernels: one launch each, nothing allocated, nothing read back to the host.

Tensors (N, C, *S) are addressed as (outer, columns, inner) by strides; see gpu_tiles.py. A grid is groups of columns ×
splits of tiles. Sums over a program's tiles are kept per lane in float32 (float64 for float64) and leave it as
float64; the last program of a group, or of a team and then of the teams, adds the programs' partials in an order that
does not depend on which came when, so bits repeat.

Loops are pipelined by Triton, through shared memory. Tiles kept in registers instead need neither barriers nor as many
instructions, and made the verbs 0 to 10 % slower on an H200 (means of 12 inputs of 3 to 69 MB; of 6 with addition).
"""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import (
    activate,
    channel_params,
    channels_of,
    counted,
    lanes_of,
    mirrored,
    next_tile,
    pre_activation,
    program_share,
    scaled,
    tile_at,
    tile_pointers,
    tile_valid,
)
from syncbn.backends.gpu_sums import (
    add_rows,
    channel_sums,
    column_sums,
    combine,
    counted_sums,
    inverse_std,
    moments_of,
    move_running,
    report,
    stamp,
    sum_lanes,
)

SIZES = ["outer", "inner", "columns", "positions"]
X = [*SIZES, "x_stride_o", "x_stride_c", "x_stride_i", "mask_stride_o", "mask_stride_i"]
Y = ["y_stride_o", "y_stride_c", "y_stride_i"]
RESIDUAL = ["residual_stride_o", "residual_stride_c", "residual_stride_i"]
# Sizes and strides are not specialised on their values: a new shape is new numbers, not a new compilation.

WORK = ["mask_ptr", "partials_ptr", "semaphores_ptr"]
PARAMETERS = ["weight_ptr", "bias_ptr", "mean_ptr", "invstd_ptr"]
# Nor are pointers on their alignment, but those of activations: a parameter may begin anywhere in a flat one.

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit(do_not_specialize=X, do_not_specialize_on_alignment=[*WORK, "sums_ptr"])
def batch_sums_kernel(
    x_ptr,  # (N, C, *S)
    mask_ptr,  # (N, *S) bool, or None
    partials_ptr,  # float64 scratch: what combine keeps, then (splits) counts if there is a mask
    semaphores_ptr,  # int32, all 0: those of combine
    sums_ptr,  # (2C + 3) float64: the result
    tag,  # float32
    outer, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr, PLANE: tl.constexpr, MERGED: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, TEAM: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """[Σx, Σx², count, fingerprint], by way of d = x − k, for which float32 is enough: see column_sums"""
    DTYPE: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    inner = scaled(inner, "planes", KIND, ALIGN, WIDE)
    columns = scaled(columns, "rows", KIND, ALIGN, WIDE)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, splits, tiles, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, GROUP, BLOCK_I
    )
    column = group * GROUP
    if mask_ptr is None:
        n, sum_x, sum_sq = column_sums(
            x_ptr, column, split, splits, tiles, tiles_inner, inner, columns, positions,
            x_stride_o, x_stride_c, x_stride_i,
            KIND, ALIGN, FOLD, MERGED, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I, STAGES, DTYPE,
        )
    else:
        n, sum_x, sum_sq = counted_sums(
            x_ptr, mask_ptr, column, split, splits, tiles, tiles_inner, inner, columns, positions,
            x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
            KIND, ALIGN, FOLD, MERGED, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I, STAGES, DTYPE,
        )
    teams = tl.cdiv(splits, TEAM) if TEAM else 0
    counts_ptr = partials_ptr + (groups * (splits + teams)).to(tl.int64) * (2 * BLOCK_K)
    if mask_ptr is not None:
        c = tl.arange(0, BLOCK_C)
        tl.store(counts_ptr + split + c, n, mask=c + group == 0)  # n of column 0 is that of all
    is_last, total = combine(
        partials_ptr, semaphores_ptr, group, groups, split, splits,
        channel_sums(sum_x, FOLD, PLANE, GROUP, BLOCK_K, BLOCK_P),
        channel_sums(sum_sq, FOLD, PLANE, GROUP, BLOCK_K, BLOCK_P), BLOCK_K, TEAM, BLOCK_S,
    )
    if is_last:
        channels = channels_of(columns, FOLD, PLANE)
        which, k, is_real = sum_lanes(group, channels, FOLD, PLANE, GROUP, BLOCK_K)
        tl.store(sums_ptr + which * channels + k, total, mask=is_real)
        if group == 0:
            if mask_ptr is None:
                tl.store(sums_ptr + 2 * channels, positions.to(tl.float64))
            else:
                tl.store(sums_ptr + 2 * channels + tl.arange(0, 1), add_rows(counts_ptr, splits, 1, BLOCK_S))
            stamp(sums_ptr, 2 * channels + 1, tag)


@triton.jit(
    do_not_specialize=["turn", *X, *Y, *RESIDUAL],
    do_not_specialize_on_alignment=[
        *WORK, *PARAMETERS, "sums_ptr", "running_mean_ptr", "running_var_ptr", "tracked_ptr", "report_ptr",
    ],
)
def normalize_kernel(
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    sums_ptr,  # (2C + 3) float64: Σx, Σx², count, fingerprint of all ranks
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    running_mean_ptr,  # (C), or None
    running_var_ptr,  # (C), or None
    tracked_ptr,  # (1) integer, or None
    semaphores_ptr,  # (1) int32, 0; used if CUMULATIVE
    y_ptr,  # (N, C, *S): the result
    mean_ptr,  # (C) float32 or float64: result
    invstd_ptr,  # (C) of mean's dtype: result
    report_ptr,  # (4) float64 in the host's memory
    eps, eps_rest, momentum, momentum_rest,  # each a float32 and what that leaves of a float64
    tag, turn,  # float32, int32
    outer, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    y_stride_o, y_stride_c, y_stride_i, residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_Y: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr,
    PLANE: tl.constexpr, MERGED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    CUMULATIVE: tl.constexpr, SKIP: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):
    """y = activation((x − mean)·invstd·weight + bias + residual); the first split of a group moves its buffers"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN, WIDE)
    columns = scaled(columns, "rows", KIND, ALIGN, WIDE)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, splits, tiles, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, GROUP, BLOCK_I
    )
    channel, here, is_first = lanes_of(group, columns, FOLD, PLANE, GROUP, BLOCK_C)
    weight = channel_params(weight_ptr, channel, here, 1.0, DTYPE)
    bias = channel_params(bias_ptr, channel, here, 0.0, DTYPE)[:, None]
    mean64, var64, count = moments_of(sums_ptr, channel, here, channels_of(columns, FOLD, PLANE))
    mean = mean64.to(DTYPE)
    invstd = inverse_std(var64 + eps + eps_rest, DTYPE)
    if split == 0:
        tl.store(mean_ptr + channel, mean, mask=is_first)
        tl.store(invstd_ptr + channel, invstd, mask=is_first)
        if running_mean_ptr is not None:
            move_running(
                running_mean_ptr, running_var_ptr, tracked_ptr, semaphores_ptr, group, groups,
                channel, is_first, mean64, var64, count, momentum, momentum_rest, CUMULATIVE, SKIP,
            )
        report(report_ptr, sums_ptr, 2 * channels_of(columns, FOLD, PLANE) + 1, tag, turn)
    mean = mean[:, None]
    scale = (invstd * weight)[:, None]
    column = group * GROUP
    o_next, t_next = tile_at(split, tiles_inner, MERGED)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        o, t = mirrored(o_next, t_next, outer, tiles_inner)
        valid = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I)
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
        o_next, t_next = next_tile(o_next, t_next, splits, tiles_inner, MERGED)
