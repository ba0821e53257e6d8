# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""What the kernels do to one tile: find it, load it, activate it.

KIND "rows" has channel stride 1, "planes" inner stride 1, "strided" neither. ALIGN divides the other strides and the
lengths along vectors; they come divided by it, so that the compiler sees that vectors are aligned.
"""

import triton
import triton.language as tl

# The formatter would give each number a line of its own.
# fmt: off


@triton.jit
def program_share(pid, outer, inner, columns, GROUP: tl.constexpr, BLOCK_I: tl.constexpr):
    """group, number of groups; split, number of splits, how many tiles are this split's; tiles in an outer index"""
    groups = tl.cdiv(columns, GROUP)
    splits = tl.num_programs(0) // groups
    split = pid // groups
    tiles_inner = tl.cdiv(inner, BLOCK_I)
    count = tl.cdiv(tl.maximum(outer * tiles_inner - split, 0), splits).to(tl.int32)
    return pid % groups, groups, split, splits, count, tl.maximum(tiles_inner, 1).to(tl.int32)


@triton.jit
def scaled(size, along: tl.constexpr, KIND: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr):
    """a length that comes divided by ALIGN where vectors lie along it; WIDE says that tiles may end beyond 32 bits"""
    if WIDE:
        size = size.to(tl.int64)
    if KIND == along:
        return size * ALIGN
    else:  # here and below: Triton compiles what follows a return, but not a branch that is not taken
        return size


@triton.jit
def positions_in(
    t, inner, positions, FOLD: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """how many inner positions tile t has; of a folded row, whose last may end anywhere, for each column (BLOCK_C)"""
    if EVEN:
        return BLOCK_I
    elif FOLD:
        PIXELS: tl.constexpr = GROUP // FOLD
        has_last = (tl.arange(0, BLOCK_C) < positions % PIXELS * FOLD).to(tl.int32)
        return tl.minimum(tl.maximum(positions // PIXELS - t * BLOCK_I + has_last, 0), BLOCK_I)
    else:
        return tl.minimum(inner - t.to(tl.int64) * BLOCK_I, BLOCK_I).to(tl.int32)


@triton.jit
def tile_valid(
    t, column, inner, columns, positions, FOLD: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """which elements (BLOCK_C, BLOCK_I) of tile t exist; a folded row may end anywhere"""
    c = tl.arange(0, BLOCK_C)[:, None]
    i = tl.arange(0, BLOCK_I)[None, :]
    if EVEN:
        return tl.full([BLOCK_C, BLOCK_I], True, tl.int1)
    elif FOLD:
        return (c < columns) & (i * columns + c < positions * FOLD - t * BLOCK_I * columns)
    elif WIDE:
        return (c < tl.minimum(columns - column, GROUP)) & (i.to(tl.int64) < inner - t.to(tl.int64) * BLOCK_I)
    else:
        return (c < tl.minimum(columns - column, GROUP)) & (i < inner - t * BLOCK_I)


@triton.jit
def tile_at(tile, tiles_inner, MERGED: tl.constexpr):
    """outer index o of a tile, and which one of o's it is; MERGED says that there is one outer index"""
    if MERGED:
        return tile * 0, tile
    else:
        return tile // tiles_inner, tile % tiles_inner


@triton.jit
def next_tile(o, t, splits, tiles_inner, MERGED: tl.constexpr):
    """the tile `splits` tiles after tile t of outer index o"""
    if MERGED:
        return o, t + splits
    else:
        t += splits % tiles_inner
        wraps = t >= tiles_inner
        return o + splits // tiles_inner + wraps.to(tl.int32), tl.where(wraps, t - tiles_inner, t)


@triton.jit
def mirrored(o, t, outer, tiles_inner):
    """the tile as far from the end as this one is from the start: it comes last, so it is what L2 still holds"""
    return outer - 1 - o, tiles_inner - 1 - t


@triton.jit
def channels_of(columns, FOLD: tl.constexpr, PLANE: tl.constexpr):
    """the number of channels"""
    if FOLD:
        return FOLD
    elif PLANE:
        return columns // PLANE
    else:
        return columns


@triton.jit
def lanes_of(group, columns, FOLD: tl.constexpr, PLANE: tl.constexpr, GROUP: tl.constexpr, BLOCK_C: tl.constexpr):
    """of each column (BLOCK_C) of a group: its channel, whether it exists, whether it is the first of its channel"""
    c = tl.arange(0, BLOCK_C)
    column = group * GROUP + c
    exists = (c < GROUP) & (column < columns)
    if FOLD:
        return column % FOLD, exists, column < FOLD
    elif PLANE:
        return column // PLANE, exists, exists & (c % PLANE == 0)
    else:
        return column, exists, exists


@triton.jit
def tile_pointers(
    ptr, o, t, column, stride_o, stride_c, stride_i,
    KIND: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """pointers (BLOCK_C, BLOCK_I) of tile t of outer index o, from column on; its start in 64 bits, the rest in 32"""
    o = o.to(tl.int64)
    i0 = t.to(tl.int64) * BLOCK_I
    column = column.to(tl.int64)
    c = tl.arange(0, BLOCK_C)[:, None]
    i = tl.arange(0, BLOCK_I)[None, :]
    if WIDE:
        c = c.to(tl.int64)
        i = i.to(tl.int64)
    if KIND == "rows":
        return ptr + ((o * stride_o + i0 * stride_i) * ALIGN + column) + (c + i * stride_i * ALIGN)
    elif KIND == "planes":
        return ptr + ((o * stride_o + column * stride_c) * ALIGN + i0) + (c * stride_c * ALIGN + i)
    else:
        return ptr + (o * stride_o + column * stride_c + i0 * stride_i) + (c * stride_c + i * stride_i)


@triton.jit
def counted(mask_ptr, o, t, stride_o, stride_i, valid, BLOCK_I: tl.constexpr):
    """which elements of a tile count: those that exist and that the mask, if any, lets through"""
    if mask_ptr is None:
        return valid
    else:
        i = tl.arange(0, BLOCK_I)[None, :].to(tl.int64)
        at = o.to(tl.int64) * stride_o + (t.to(tl.int64) * BLOCK_I + i) * stride_i
        return valid & (tl.load(mask_ptr + at + tl.zeros(valid.shape, tl.int32), mask=valid, other=0) != 0)


@triton.jit
def channel_params(ptr, channel, exists, default: tl.constexpr, DTYPE: tl.constexpr):
    """a (C) parameter as (BLOCK_C), or the default where there is none"""
    if ptr is None:
        return tl.full(channel.shape, default, DTYPE)
    else:
        return tl.load(ptr + channel, mask=exists, other=default).to(DTYPE)


@triton.jit
def pre_activation(
    x, mean, scale, bias, residual_ptr, o, t, column, stride_o, stride_c, stride_i, valid,
    KIND: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """z = (x − mean)·scale + bias + residual; one rounding order for forward and backward, so that they cut alike"""
    z = tl.fma(x - mean, tl.broadcast_to(scale, x.shape), tl.broadcast_to(bias, x.shape))
    if residual_ptr is not None:
        at = tile_pointers(
            residual_ptr, o, t, column, stride_o, stride_c, stride_i, KIND, ALIGN, WIDE, BLOCK_C, BLOCK_I
        )
        z += tl.load(at, mask=valid, other=0.0).to(x.dtype)
    return z


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """activation(z); NaN stays NaN"""
    if ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, z, z * SLOPE)
    elif ACTIVATION == "silu":
        return z / (1 + tl.exp(-z))
    else:
        return z


@triton.jit
def activation_grad(dy, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """dy·activation′(z); at z = 0 relu has derivative 0 and leaky_relu its slope"""
    if ACTIVATION == "relu":
        return tl.where(z > 0, dy, 0.0)
    elif ACTIVATION == "leaky_relu":
        return tl.where(z > 0, dy, dy * SLOPE)
    else:
        sigmoid = 1 / (1 + tl.exp(-z))
        return dy * sigmoid * (1 + z * (1 - sigmoid))


@triton.jit
def grad_pre_activation(
    dy_ptr, x, mean, scale, bias, residual_ptr, o, t, column,
    dy_stride_o, dy_stride_c, dy_stride_i, residual_stride_o, residual_stride_c, residual_stride_i, exists, valid,
    KIND_DY: tl.constexpr, KIND_R: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr,
):
    """dz = dy·activation′(z), 0 where nothing counts"""
    at = tile_pointers(
        dy_ptr, o, t, column, dy_stride_o, dy_stride_c, dy_stride_i, KIND_DY, ALIGN, WIDE, BLOCK_C, BLOCK_I
    )
    dz = tl.load(at, mask=exists, other=0.0).to(x.dtype)
    if ACTIVATION is not None:
        z = pre_activation(
            x, mean, scale, bias, residual_ptr, o, t, column, residual_stride_o, residual_stride_c, residual_stride_i,
            exists, KIND_R, ALIGN, WIDE, BLOCK_C, BLOCK_I,
        )
        dz = activation_grad(dz, z, ACTIVATION, SLOPE)
    return tl.where(valid, dz, 0.0)
