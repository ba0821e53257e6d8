# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""The two backward verbs as kernels; what gpu_kernels.py says holds here too."""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import (
    channel_params,
    counted,
    grad_pre_activation,
    next_tile,
    program_share,
    scaled,
    tile_pointers,
    tile_valid,
)
from syncbn.backends.gpu_kernels import RESIDUAL, X, Y
from syncbn.backends.gpu_sums import arrive, combine, store_as, store_partial

DY = ["dy_stride_o", "dy_stride_c", "dy_stride_i"]

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit(do_not_specialize=[*X, *DY, *RESIDUAL])
def grad_sums_kernel(
    dy_ptr,  # (N, C, *S)
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    mean_ptr,  # (C) float32 or float64
    invstd_ptr,  # (C) of mean's dtype
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    partials_ptr,  # (splits, 2C) float64
    semaphore_ptr,  # (groups) int32, all 0
    dsums_ptr,  # (2C) float64: the result
    dweight_ptr,  # (C) of weight's dtype: result, or None
    dbias_ptr,  # (C) of bias's dtype: result, or None
    outer, inner, columns, positions, per_program,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    dy_stride_o, dy_stride_c, dy_stride_i, residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_DY: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr,
    EVEN: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """[Σdz, Σdz·x̂], dweight = Σdz·x̂, dbias = Σdz with dz = dy·activation′(z) and x̂ = (x − mean)·invstd"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN)
    columns = scaled(columns, "rows", KIND, ALIGN)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, start, stop, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, per_program, BLOCK_C, BLOCK_I
    )
    column = group * BLOCK_C
    lane = column + tl.arange(0, BLOCK_C)
    channel = lane % FOLD if FOLD else lane
    channels = FOLD if FOLD else columns
    mean = channel_params(mean_ptr, channel, lane < columns, 0.0, DTYPE)[:, None]
    invstd = channel_params(invstd_ptr, channel, lane < columns, 0.0, DTYPE)
    scale = (invstd * channel_params(weight_ptr, channel, lane < columns, 1.0, DTYPE))[:, None]
    bias = channel_params(bias_ptr, channel, lane < columns, 0.0, DTYPE)[:, None]
    sum_dz = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    sum_dz_d = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    o = start // tiles_inner
    t = start % tiles_inner
    for _ in range(start, stop):
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
        valid = counted(mask_ptr, o, t, mask_stride_o, mask_stride_i, exists, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        x = tl.load(at, mask=exists, other=0.0).to(DTYPE)
        if mask_ptr is not None:
            x = tl.where(valid, x, 0.0)
        dz = grad_pre_activation(
            dy_ptr, x, mean, scale, bias, residual_ptr, o, t, column,
            dy_stride_o, dy_stride_c, dy_stride_i, residual_stride_o, residual_stride_c, residual_stride_i, exists,
            valid, KIND_DY, KIND_R, ALIGN, WIDE, ACTIVATION, SLOPE, BLOCK_C, BLOCK_I,
        )
        sum_dz += dz
        sum_dz_d = tl.fma(dz, x - mean, sum_dz_d)
        o, t = next_tile(o, t, tiles_inner)
    splits = tl.num_programs(0) // groups
    mine = partials_ptr + split.to(tl.int64) * (2 * channels)
    store_partial(mine, tl.sum(sum_dz, axis=1).to(tl.float64), column, columns, FOLD, BLOCK_C)
    sum_dz_xhat = tl.sum(sum_dz_d, axis=1).to(tl.float64) * invstd.to(tl.float64)
    store_partial(mine + channels, sum_dz_xhat, column, columns, FOLD, BLOCK_C)
    if arrive(semaphore_ptr + group, splits):
        exists = lane < channels
        dbias = combine(partials_ptr, 2 * channels, splits, column, channels, BLOCK_C, BLOCK_S)
        dweight = combine(partials_ptr + channels, 2 * channels, splits, column, channels, BLOCK_C, BLOCK_S)
        tl.store(dsums_ptr + lane, dbias, mask=exists)
        tl.store(dsums_ptr + channels + lane, dweight, mask=exists)
        if dbias_ptr is not None:
            store_as(dbias_ptr + lane, dbias, exists)
        if dweight_ptr is not None:
            store_as(dweight_ptr + lane, dweight, exists)


@triton.jit(do_not_specialize=[*X, *Y, *DY, *RESIDUAL])
def grad_input_kernel(
    dy_ptr,  # (N, C, *S)
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    mean_ptr,  # (C) float32 or float64
    invstd_ptr,  # (C) of mean's dtype
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    dsums_ptr,  # (2C) float64: Σdz, Σdz·x̂ of all ranks; None without dx
    count_ptr,  # (1) float64, of all ranks
    dx_ptr,  # (N, C, *S): result, or None
    dresidual_ptr,  # (N, C, *S): result, or None
    outer, inner, columns, positions, per_program,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    y_stride_o, y_stride_c, y_stride_i, dy_stride_o, dy_stride_c, dy_stride_i,
    residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_Y: tl.constexpr, KIND_DY: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr,
    FOLD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """dx = scale·(dz − Σdz/n + slope·(x − mean)), slope = −invstd·Σdz·x̂/n, scale = invstd·weight; dresidual = dz"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN)
    columns = scaled(columns, "rows", KIND, ALIGN)
    positions = positions * ALIGN if FOLD else positions
    group, _groups, _split, start, stop, tiles_inner = program_share(  # from the end, which grad_sums left in L2
        tl.num_programs(0) - 1 - tl.program_id(0), outer, inner, columns, per_program, BLOCK_C, BLOCK_I
    )
    column = group * BLOCK_C
    lane = column + tl.arange(0, BLOCK_C)
    channel = lane % FOLD if FOLD else lane
    channels = FOLD if FOLD else columns
    mean = channel_params(mean_ptr, channel, lane < columns, 0.0, DTYPE)[:, None]
    invstd = channel_params(invstd_ptr, channel, lane < columns, 0.0, DTYPE)
    scale = invstd * channel_params(weight_ptr, channel, lane < columns, 1.0, DTYPE)
    bias = channel_params(bias_ptr, channel, lane < columns, 0.0, DTYPE)[:, None]
    if dx_ptr is not None:
        share = 1.0 / tl.maximum(tl.load(count_ptr), 1.0)
        mean_dz = tl.load(dsums_ptr + channel, mask=lane < columns, other=0.0) * share
        slope = tl.load(dsums_ptr + channels + channel, mask=lane < columns, other=0.0) * share * invstd
        mean_dz = mean_dz.to(DTYPE)[:, None]
        slope = tl.broadcast_to(-slope.to(DTYPE)[:, None], (BLOCK_C, BLOCK_I))
    scale = scale[:, None]
    o = start // tiles_inner
    t = start % tiles_inner
    for _ in range(start, stop):
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, BLOCK_C, BLOCK_I)
        valid = counted(mask_ptr, o, t, mask_stride_o, mask_stride_i, exists, BLOCK_I)
        at = tile_pointers(
            x_ptr, o, t, column, x_stride_o, x_stride_c, x_stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        x = tl.load(at, mask=exists, other=0.0).to(DTYPE)
        if mask_ptr is not None:
            x = tl.where(valid, x, 0.0)
        dz = grad_pre_activation(
            dy_ptr, x, mean, scale, bias, residual_ptr, o, t, column,
            dy_stride_o, dy_stride_c, dy_stride_i, residual_stride_o, residual_stride_c, residual_stride_i, exists,
            valid, KIND_DY, KIND_R, ALIGN, WIDE, ACTIVATION, SLOPE, BLOCK_C, BLOCK_I,
        )
        if dx_ptr is not None:
            dx = tl.where(valid, scale * tl.fma(x - mean, slope, dz - mean_dz), 0.0)
            at = tile_pointers(
                dx_ptr, o, t, column, y_stride_o, y_stride_c, y_stride_i, KIND_Y, ALIGN, WIDE, BLOCK_C, BLOCK_I
            )
            tl.store(at, dx.to(dx_ptr.dtype.element_ty), mask=exists)
        if dresidual_ptr is not None:
            at = tile_pointers(
                dresidual_ptr, o, t, column, y_stride_o, y_stride_c, y_stride_i, KIND_Y, ALIGN, WIDE, BLOCK_C, BLOCK_I
            )
            tl.store(at, dz.to(dresidual_ptr.dtype.element_ty), mask=exists)
        o, t = next_tile(o, t, tiles_inner)
