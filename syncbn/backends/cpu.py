"""ATen operations, in as few passes as exactness allows; the same numbers as the reference, to rounding.

ATen's own batch norm kernel does the affine passes; x·a + b loses |a·x|·2⁻²⁴, which would make noise of a constant
channel, so y is made of x − mean. Its kernel for the sums of the backward is not used: it adds up in one float32 a row
or lane, and a sum over a million values was off by 1e-5 of the largest. Every step is done on one block before the next
is touched: fresh pages for a full-size temporary cost more than the arithmetic on it.
"""

import torch
from torch import Tensor

from syncbn.backends import LEAKY_SLOPE, Epilogue, Running, compute_dtype, reference
from syncbn.backends.cpu_layout import Layout, Scratch
from syncbn.backends.reference import MOST, activate_, moments, parameter_grads, scale_of, stamped


def batch_sums(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
    """[Σx (C), Σx² (C), count, fingerprint (2)], of sums of x − k; with a mask or of float64 added up in float64"""
    layout = Layout(x)
    flat, drop = layout.flatten(x), layout.flatten_mask(mask)
    channels = x.shape[1]
    shifted = drop is None and x.dtype != torch.float64
    pivot = _pivot(layout, flat) if shifted else x.new_zeros(channels, dtype=torch.float64)
    k = layout.per_channel(pivot)
    sums = x.new_zeros(2 * channels + 3, dtype=torch.float64)
    total, total_sq = sums[:channels], sums[channels : 2 * channels]
    scratch = Scratch(pivot.dtype)
    for at, part in layout.blocks():
        block = flat[at]
        d = torch.sub(block, k[part], out=scratch.like(block)) if shifted else scratch.like(block).copy_(block)
        _drop_(d, drop, at)
        total[part].add_(d.sum(layout.dims))
        total_sq[part].add_(d.mul_(d).sum(layout.dims))
    count = x.numel() // channels
    sums[-3] = count if mask is None else mask.sum()
    if shifted:
        moved = pivot.double()
        total_sq.addcmul_(moved, total, value=2).addcmul_(moved, moved, value=count)
        total.add_(moved, alpha=count)
    return stamped(sums, tag)


def _pivot(layout: Layout, flat: Tensor) -> Tensor:
    """k (C) near the mean: the mean of an eighth of every block.

    Whatever the values, the mean of a share f of them is within σ·√(1/f − 1) of the mean of all (Cauchy–Schwarz), so
    that Σ(x − k)² is at most 8 times Σ(x − mean)², and its rounding too; outliers cannot do worse.
    """
    total = flat.new_zeros(flat.shape[1], dtype=torch.float32)
    count = 0
    for at, part in layout.blocks():
        block = flat[at]
        few = block[: block.shape[0] // 8 + 1] if layout.rows else block[..., : block.shape[-1] // 8 + 1]
        total[part].add_(few.sum(layout.dims, dtype=torch.float32))
        count += few.numel()
    return total.div_(max(1.0, count / flat.shape[1]))


def normalize(
    x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None, tag: float = 0.0, turn: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation((x − mean)·invstd·weight + bias + residual)"""
    mean64, var64, count = moments(sums, x.shape[1])
    if running is not None:
        move_running(running, mean64, var64, count)
    dtype = compute_dtype(x.dtype)
    mean, invstd = mean64.to(dtype), (var64 + eps).rsqrt_().to(dtype)
    call = _Call(x, mean, invstd, epilogue)
    y, flat = call.layout.new_like(x)
    scratch = Scratch(dtype)
    for at, part in call.layout.blocks():
        out = flat[at]
        z = out if out.dtype == dtype else scratch.like(out)
        activate_(call.pre_activation(at, part, z), epilogue.activation)
        _drop_(z, call.drop, at)
        if z is not out:
            out.copy_(z)
    return y, mean, invstd


def move_running(running: Running, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """The specification's, of which an ordinary batch needs half: here its questions cost nothing but the asking."""
    n, tracked = float(count), running.num_batches_tracked
    if n <= 1 or running.momentum is None:
        reference.move_running(running, mean, var, count)
        return
    new_mean = torch.lerp(running.mean.double(), mean, running.momentum)
    new_var = torch.lerp(running.var.double(), var * (n / (n - 1)), running.momentum)
    if running.skip_nonfinite:
        largest = float(torch.maximum(new_mean.abs(), new_var).max())
        if not largest <= min(MOST[running.mean.dtype], MOST[running.var.dtype]):  # so of NaN, too
            reference.move_running(running, mean, var, count)
            return
    running.mean.copy_(new_mean)
    running.var.copy_(new_var)
    if tracked is not None:
        tracked.add_(1)


def grad_sums(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, tag: float = 0.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[Σdz (C), Σdz·x̂ (C), fingerprint (2)], dweight, dbias"""
    call = _Call(x, mean, invstd, epilogue, dy)
    channels = x.shape[1]
    dsums = x.new_zeros(2 * channels + 2, dtype=torch.float64)
    sum_dz, sum_dz_xhat = dsums[:channels], dsums[channels : 2 * channels]
    scratch = Scratch(mean.dtype)
    for at, part in call.layout.blocks():
        dz, block = call.dz(at, part), call.x_block(at)
        sum_dz[part].add_(dz.sum(call.layout.dims))
        product = torch.sub(block, call.mean[part], out=scratch.like(block)).mul_(dz)
        sum_dz_xhat[part].add_(product.sum(call.layout.dims))
    sum_dz_xhat *= invstd
    return stamped(dsums, tag), *parameter_grads(sum_dz, sum_dz_xhat, epilogue)


def grad_input(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    epilogue: Epilogue,
    dsums: Tensor | None,
    count: Tensor,
    needs_dresidual: bool,
    tag: float = 0.0,
    turn: int = 0,
) -> tuple[Tensor | None, Tensor | None]:
    """dx = (dz − (Σdz/count + (x − mean)·slope))·invstd·weight, slope = invstd·Σdz·x̂/count; dresidual = dz"""
    call = _Call(x, mean, invstd, epilogue, dy)
    dx, dx_flat = (None, None) if dsums is None else call.layout.new_like(x)
    dresidual, dresidual_flat = call.layout.new_like(x) if needs_dresidual else (None, None)
    if dsums is not None:
        mean_dz, mean_dz_xhat = (dsums[:-2] / count.clamp_min(1)).chunk(2)
        slope, mean_dz = call.per_channel(mean_dz_xhat * invstd), call.per_channel(mean_dz)
        offset = mean_dz - slope * call.mean
    scratch = Scratch(mean.dtype)
    for at, part in call.layout.blocks():
        dz = call.dz(at, part)
        if dresidual_flat is not None:
            dresidual_flat[at] = dz
        if dx_flat is not None:
            out = dx_flat[at]
            t = out if out.dtype == mean.dtype else scratch.like(out)
            call.affine(call.x_block(at), slope[part], offset[part], t)
            torch.sub(dz, t, out=t).mul_(call.scale[part])
            _drop_(t, call.drop, at)
            if t is not out:
                out.copy_(t)
    return dx, dresidual


class _Call:
    """The tensors of one call in one layout, and what the verbs compute of a block of them."""

    def __init__(self, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, dy: Tensor | None = None) -> None:
        weight, bias, residual, mask, self.activation = epilogue
        self.layout = Layout(x)
        self.dtype = mean.dtype
        self.x = self.layout.flatten(x)
        self.dy = None if dy is None else self.layout.flatten(dy)
        self.residual = None if residual is None else self.layout.flatten(residual)
        self.drop = self.layout.flatten_mask(mask)
        self.mean = self.per_channel(mean)
        self.scale = self.per_channel(scale_of(invstd, weight))
        self.shift = torch.zeros_like(self.mean) if bias is None else self.per_channel(bias)
        self.zero, self.one = torch.zeros_like(mean), torch.ones_like(mean)
        self._z, self._dz, self._x = (Scratch(self.dtype) for _ in range(3))

    def per_channel(self, t: Tensor) -> Tensor:
        return self.layout.per_channel(t.to(self.dtype))

    def affine(self, block: Tensor, factor: Tensor, offset: Tensor, out: Tensor) -> None:
        """out = block·factor + offset, in one pass; all of the compute dtype"""
        four = self.layout.four
        zero, one = (t[: factor.numel()] for t in (self.zero, self.one))
        torch.ops.aten.native_batch_norm.out(
            four(block), factor.view(-1), offset.view(-1), zero, one, False, 0.0, 0.0,
            out=four(out), save_mean=one.new_empty(0), save_invstd=one.new_empty(0),
        )  # fmt: skip

    def x_block(self, at: tuple[slice, ...]) -> Tensor:
        """A block of x in the compute dtype, 0 where masked out."""
        block = self.x[at]
        if self.drop is None and block.dtype == self.dtype:
            return block
        copy = self._x.like(block).copy_(block)
        _drop_(copy, self.drop, at)
        return copy

    def pre_activation(self, at: tuple[slice, ...], part: slice, out: Tensor) -> Tensor:
        """z"""
        z = torch.sub(self.x[at], self.mean[part], out=out)
        if self.activation is None:
            self.affine(z, self.scale[part], self.shift[part], z)
        else:  # whose backward must round z alike, in other blocks: elementwise operations do
            z.mul_(self.scale[part]).add_(self.shift[part])
        return z if self.residual is None else z.add_(self.residual[at])

    def dz(self, at: tuple[slice, ...], part: slice) -> Tensor:
        """dy·activation′(z), 0 where masked out; dy itself where that is the same."""
        assert self.dy is not None, "only the backward verbs ask for dz"
        dy = self.dy[at]
        if self.activation is None and self.drop is None and dy.dtype == self.dtype:
            return dy
        dz = self._dz.like(dy).copy_(dy)
        if self.activation is not None:
            z = self.pre_activation(at, part, self._z.like(dy))
            _activation_grad_(dz, z, self.activation)
        _drop_(dz, self.drop, at)
        return dz


def _activation_grad_(dz: Tensor, z: Tensor, activation: str) -> None:
    """dz ← dz·activation′(z)"""
    aten = torch.ops.aten
    if activation == "relu":
        aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    elif activation == "leaky_relu":
        aten.leaky_relu_backward.grad_input(dz, z, LEAKY_SLOPE, False, grad_input=dz)
    else:
        aten.silu_backward.grad_input(dz, z, grad_input=dz)


def _drop_(t: Tensor, drop: Tensor | None, at: tuple[slice, ...]) -> None:
    """t ← 0 where left out; a fill, since 0·NaN is NaN."""
    if drop is not None:
        t.masked_fill_(drop[at[0]] if len(at) == 2 else drop[at[0], :, at[2]], 0)
