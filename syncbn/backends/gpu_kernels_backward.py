# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""The two backward verbs as kernels; what gpu_kernels.py says holds here too."""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import (
    channel_params,
    channels_of,
    counted,
    grad_pre_activation,
    lanes_of,
    mirrored,
    next_tile,
    program_share,
    scaled,
    tile_at,
    tile_pointers,
    tile_valid,
)
from syncbn.backends.gpu_kernels import PARAMETERS, RESIDUAL, WORK, X, Y
from syncbn.backends.gpu_sums import add_two, channel_sums, combine, report, spread, stamp, store_as, sum_lanes

DY = ["dy_stride_o", "dy_stride_c", "dy_stride_i"]

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit(
    do_not_specialize=[*X, *DY, *RESIDUAL],
    do_not_specialize_on_alignment=[*WORK, *PARAMETERS, "dsums_ptr", "dweight_ptr", "dbias_ptr"],
)
def grad_sums_kernel(
    dy_ptr,  # (N, C, *S)
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    mean_ptr,  # (C) float32 or float64
    invstd_ptr,  # (C) of mean's dtype
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    partials_ptr,  # float64 scratch: what combine keeps
    semaphores_ptr,  # int32, all 0: those of combine
    dsums_ptr,  # (2C + 2) float64: the result
    dweight_ptr,  # (C) of weight's dtype: result, or None
    dbias_ptr,  # (C) of bias's dtype: result, or None
    tag,  # float32
    outer, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    dy_stride_o, dy_stride_c, dy_stride_i, residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_DY: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr, FOLD: tl.constexpr,
    PLANE: tl.constexpr, MERGED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, TEAM: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """[Σdz, Σdz·x̂, fingerprint], dweight = Σdz·x̂, dbias = Σdz with dz = dy·activation′(z) and x̂ = (x − mean)·invstd"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN, WIDE)
    columns = scaled(columns, "rows", KIND, ALIGN, WIDE)
    positions = positions * ALIGN if FOLD else positions
    group, groups, split, splits, tiles, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, GROUP, BLOCK_I
    )
    channel, here, _is_first = lanes_of(group, columns, FOLD, PLANE, GROUP, BLOCK_C)
    mean = channel_params(mean_ptr, channel, here, 0.0, DTYPE)[:, None]
    invstd = channel_params(invstd_ptr, channel, here, 0.0, DTYPE)
    scale = (invstd * channel_params(weight_ptr, channel, here, 1.0, DTYPE))[:, None]
    bias = channel_params(bias_ptr, channel, here, 0.0, DTYPE)[:, None]
    sum_dz = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    sum_dz_d = tl.zeros([BLOCK_C, BLOCK_I], DTYPE)
    column = group * GROUP
    o, t = tile_at(split, tiles_inner, MERGED)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I)
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
        o, t = next_tile(o, t, splits, tiles_inner, MERGED)
    sum_dz, sum_dz_d = tl.reduce((sum_dz, sum_dz_d), 1, add_two)
    sum_dz = spread(sum_dz).to(tl.float64)
    sum_dz_xhat = spread(sum_dz_d).to(tl.float64) * spread(invstd).to(tl.float64)
    is_last, total = combine(
        partials_ptr, semaphores_ptr, group, groups, split, splits,
        channel_sums(sum_dz, FOLD, PLANE, GROUP, BLOCK_K, BLOCK_P),
        channel_sums(sum_dz_xhat, FOLD, PLANE, GROUP, BLOCK_K, BLOCK_P), BLOCK_K, TEAM, BLOCK_S,
    )
    if is_last:
        channels = channels_of(columns, FOLD, PLANE)
        which, k, is_real = sum_lanes(group, channels, FOLD, PLANE, GROUP, BLOCK_K)
        tl.store(dsums_ptr + which * channels + k, total, mask=is_real)
        if group == 0:
            stamp(dsums_ptr, 2 * channels, tag)
        if dbias_ptr is not None:
            store_as(dbias_ptr + k, total, is_real & (which == 0))
        if dweight_ptr is not None:
            store_as(dweight_ptr + k, total, is_real & (which == 1))


@triton.jit(
    do_not_specialize=["turn", *X, *Y, *DY, *RESIDUAL],
    do_not_specialize_on_alignment=["mask_ptr", *PARAMETERS, "dsums_ptr", "count_ptr", "report_ptr"],
)
def grad_input_kernel(
    dy_ptr,  # (N, C, *S)
    x_ptr,  # (N, C, *S)
    residual_ptr,  # (N, C, *S), or None
    mask_ptr,  # (N, *S) bool, or None
    mean_ptr,  # (C) float32 or float64
    invstd_ptr,  # (C) of mean's dtype
    weight_ptr,  # (C), or None
    bias_ptr,  # (C), or None
    dsums_ptr,  # (2C + 2) float64: Σdz, Σdz·x̂, fingerprint of all ranks; None without dx
    count_ptr,  # (1) float64, of all ranks
    dx_ptr,  # (N, C, *S): result, or None
    dresidual_ptr,  # (N, C, *S): result, or None
    report_ptr,  # (4) float64 in the host's memory
    tag, turn,  # float32, int32
    outer, inner, columns, positions,
    x_stride_o, x_stride_c, x_stride_i, mask_stride_o, mask_stride_i,
    y_stride_o, y_stride_c, y_stride_i, dy_stride_o, dy_stride_c, dy_stride_i,
    residual_stride_o, residual_stride_c, residual_stride_i,
    KIND: tl.constexpr, KIND_Y: tl.constexpr, KIND_DY: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr,
    FOLD: tl.constexpr, PLANE: tl.constexpr, MERGED: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dx = scale·(dz − Σdz/n + slope·(x − mean)), slope = −invstd·Σdz·x̂/n, scale = invstd·weight; dresidual = dz"""
    DTYPE: tl.constexpr = mean_ptr.dtype.element_ty
    inner = scaled(inner, "planes", KIND, ALIGN, WIDE)
    columns = scaled(columns, "rows", KIND, ALIGN, WIDE)
    positions = positions * ALIGN if FOLD else positions
    group, _groups, split, splits, tiles, tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, GROUP, BLOCK_I
    )
    channel, here, _is_first = lanes_of(group, columns, FOLD, PLANE, GROUP, BLOCK_C)
    channels = channels_of(columns, FOLD, PLANE)
    mean = channel_params(mean_ptr, channel, here, 0.0, DTYPE)[:, None]
    invstd = channel_params(invstd_ptr, channel, here, 0.0, DTYPE)
    scale = invstd * channel_params(weight_ptr, channel, here, 1.0, DTYPE)
    bias = channel_params(bias_ptr, channel, here, 0.0, DTYPE)[:, None]
    if dx_ptr is not None:
        share = 1.0 / tl.maximum(tl.load(count_ptr), 1.0)
        mean_dz = tl.load(dsums_ptr + channel, mask=here, other=0.0) * share
        slope = tl.load(dsums_ptr + channels + channel, mask=here, other=0.0) * share * invstd
        mean_dz = mean_dz.to(DTYPE)[:, None]
        slope = tl.broadcast_to(-slope.to(DTYPE)[:, None], (BLOCK_C, BLOCK_I))
        report(report_ptr, dsums_ptr, 2 * channels, tag, turn)
    scale = scale[:, None]
    column = group * GROUP
    o_next, t_next = tile_at(split, tiles_inner, MERGED)
    for _ in tl.range(0, tiles, num_stages=STAGES):
        o, t = mirrored(o_next, t_next, outer, tiles_inner)
        exists = tile_valid(t, column, inner, columns, positions, FOLD, EVEN, WIDE, GROUP, BLOCK_C, BLOCK_I)
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
        o_next, t_next = next_tile(o_next, t_next, splits, tiles_inner, MERGED)
