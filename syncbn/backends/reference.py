"""The specification: plain torch operations, any device, any dtype; the other back-ends are held to this one."""

import ctypes

import torch
from torch import Tensor

from syncbn.formulas import (
    VOTE,
    Epilogue,
    Running,
    activate_,
    activation_grad,
    along,
    compute_dtype,
    masked,
    moments,
    move_running,
    parameter_grads,
    pre_activation,
    reduced,
    scale_of,
)

_Two = ctypes.c_double * 2


def batch_sums(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
    """[Σx (C), Σx² (C), count, fingerprint (2)]; the square of a float32 is exact in float64."""
    x64 = masked(x.double(), mask)
    dims = reduced(x)
    count = x.numel() // x.shape[1] if mask is None else mask.sum()
    count64 = torch.as_tensor(count, dtype=torch.float64, device=x.device)
    return stamped(torch.cat([x64.sum(dims), x64.square().sum(dims), count64.reshape(1), x64.new_empty(2)]), tag)


def normalize(
    x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None, tag: float = 0.0, turn: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation((x − mean)·invstd·weight + bias + residual)"""
    mean64, var64, count = moments(sums, x.shape[1])
    if running is not None:
        move_running(running, mean64, var64, count)
    dtype = compute_dtype(x.dtype)
    mean, invstd = mean64.to(dtype), (var64 + eps).rsqrt().to(dtype)
    z = pre_activation(x, mean, invstd, epilogue)
    y = masked(activate_(z, epilogue.activation), epilogue.mask)
    return torch.empty_like(x).copy_(y), mean, invstd


def grad_sums(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, tag: float = 0.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[Σdz (C), Σdz·x̂ (C), fingerprint (2)], dweight, dbias"""
    dz = _grad_pre_activation(dy, x, mean, invstd, epilogue)
    xhat = masked((x.to(mean.dtype) - along(mean, x)) * along(invstd, x), epilogue.mask)
    dims = reduced(x)
    sum_dz, sum_dz_xhat = (t.sum(dims, dtype=torch.float64) for t in (dz, dz * xhat))
    dsums = stamped(torch.cat([sum_dz, sum_dz_xhat, sum_dz.new_empty(2)]), tag)
    return dsums, *parameter_grads(sum_dz, sum_dz_xhat, epilogue)


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
    """dx = weight·invstd·(dz − Σdz/count − x̂·Σdz·x̂/count), dresidual = dz"""
    dz = _grad_pre_activation(dy, x, mean, invstd, epilogue)
    dx = dresidual = None
    if dsums is not None:
        mean_dz, mean_dz_xhat = (dsums[:-2] / count.clamp_min(1)).to(mean.dtype).chunk(2)
        xhat = (x.to(mean.dtype) - along(mean, x)) * along(invstd, x)
        centred = dz - along(mean_dz, x) - xhat * along(mean_dz_xhat, x)
        scale = along(scale_of(invstd, epilogue.weight), x)
        dx = torch.empty_like(x).copy_(masked(centred * scale, epilogue.mask))
    if needs_dresidual:
        dresidual = torch.empty_like(x).copy_(dz)
    return dx, dresidual


def stamped(wire: Tensor, tag: float) -> Tensor:
    """wire, ending with the fingerprint of this tag: 2³² + tag, tag²."""
    if not wire.is_cpu:
        wire[-2].fill_(VOTE + tag if tag else 0.0)
        wire[-1].fill_(tag * tag)
        return wire
    # Two ATen indexings would take 3 µs, this takes 0.4.
    two = _Two.from_address(wire.data_ptr() + 8 * wire.numel() - 16)
    two[0], two[1] = (VOTE + tag, tag * tag) if tag else (0.0, 0.0)
    return wire


def _grad_pre_activation(dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue) -> Tensor:
    """dz, 0 where masked out."""
    dz = masked(dy.to(mean.dtype), epilogue.mask)
    if epilogue.activation is None:
        return dz
    z = masked(pre_activation(x, mean, invstd, epilogue), epilogue.mask)
    return activation_grad(dz, z, epilogue.activation)
