"""Triton kernels, one launch a verb: this file allocates what is returned and says what the kernels are given.

A tensor whose spatial dimensions cannot be seen as one (a crop in width, say) is copied first, and a result that is to
have such strides afterwards; no other layout is. A bfloat16 or float32 value 1.8e19 or more away from its channel's
mean makes the sums of that channel infinite here; on a CPU it does not.
"""

import functools
import struct
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from syncbn.backends.gpu_kernels import batch_sums_kernel, normalize_kernel
from syncbn.backends.gpu_kernels_backward import grad_input_kernel, grad_sums_kernel
from syncbn.backends.gpu_launch import MOST_PLANS, Plan, launch, make_plan
from syncbn.backends.gpu_report import report_of
from syncbn.backends.gpu_workspace import workspace
from syncbn.backends.recent import Recent
from syncbn.formulas import LEAKY_SLOPE, Epilogue, Running, compute_dtype, in_strides

_plans: Recent[Plan] = Recent(MOST_PLANS)
NOT_RUNNING = (None, None, None, 0.0, True)
P = ParamSpec("P")
R = TypeVar("R")


def _on_device(verb: Callable[P, R]) -> Callable[P, R]:
    """Triton launches on the current device: make it that of the first tensor."""

    @functools.wraps(verb)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R:
        first = args[0] if args else next(iter(kwargs.values()))
        assert isinstance(first, Tensor), "every verb begins with a tensor"
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return verb(*args, **kwargs)
        with torch.cuda.device(first.device):
            return verb(*args, **kwargs)

    return guarded


def plan_batch_sums(x: Tensor, mask: Tensor | None) -> Plan:
    key = ("batch_sums", x.device, x.shape, x.stride(), x.dtype, _strides(mask))
    return _plans.made(key, lambda: make_plan(batch_sums_kernel, {"x": x, "mask": mask}, {}))


@_on_device
def batch_sums(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
    """[Σx (C), Σx² (C), count, fingerprint (2)]"""
    plan = plan_batch_sums(x, mask)
    if plan.copies:
        return batch_sums(_copied(x, "x", plan), None if mask is None else _copied(mask, "mask", plan), tag)
    channels = x.shape[1]
    sums = torch.empty(2 * channels + 3, dtype=torch.float64, device=x.device)
    partials, semaphores = workspace(x.device, plan.partials, plan.semaphores)
    launch(plan.kernel, plan.grid, (x, mask, partials, semaphores, sums), (tag, *plan.integers))
    return sums


def plan_normalize(x: Tensor, y: Tensor, epilogue: Epilogue, running: Running | None) -> Plan:
    running_mean, running_var, tracked, momentum, skip_nonfinite = running or NOT_RUNNING
    cumulative = momentum is None
    dtypes = (
        _dtype(epilogue.weight),
        _dtype(epilogue.bias),
        _dtype(running_mean),
        _dtype(running_var),
        _dtype(tracked),
    )

    def make() -> Plan:
        tensors = {"x": x, "mask": epilogue.mask, "y": y, "residual": epilogue.residual}
        constants = _activation(epilogue.activation) | {"CUMULATIVE": cumulative, "SKIP": skip_nonfinite}
        return make_plan(normalize_kernel, tensors, constants)

    return _plans.made(("normalize", *_key(x, epilogue), *dtypes, cumulative, skip_nonfinite), make)


@_on_device
def normalize(
    x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None, tag: float = 0.0, turn: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """y = activation((x − mean)·invstd·weight + bias + residual)"""
    weight, bias, residual, mask, _ = epilogue
    running_mean, running_var, tracked, momentum, _ = running or NOT_RUNNING
    y = torch.empty_like(x)
    plan = plan_normalize(x, y, epilogue, running)
    if plan.copies:
        strides = y.stride()
        del y
        epilogue = _copied_epilogue(epilogue, plan)
        z, mean, invstd = normalize(_copied(x, "x", plan), sums, epilogue, eps, running, tag, turn)
        return in_strides(z, strides), mean, invstd
    if running is not None and not (running.mean.is_contiguous() and running.var.is_contiguous()):
        return _with_contiguous_running(x, sums, epilogue, eps, running, tag, turn)
    mean = torch.empty(x.shape[1], dtype=compute_dtype(x.dtype), device=x.device)
    invstd = torch.empty_like(mean)
    semaphores = workspace(x.device, 1, 1)[1] if momentum is None else None
    buffers = (running_mean, running_var, tracked, semaphores)
    results = (y, mean, invstd, report_of(x.device))
    pointers = (x, residual, mask, sums, _packed(weight), _packed(bias), *buffers, *results)
    launch(plan.kernel, plan.grid, pointers, (*halves(eps, momentum or 0.0), tag, turn, *plan.integers))
    return y, mean, invstd


def plan_grad_sums(dy: Tensor, x: Tensor, epilogue: Epilogue) -> Plan:
    def make() -> Plan:
        tensors = {"x": x, "mask": epilogue.mask, "dy": dy, "residual": epilogue.residual}
        return make_plan(grad_sums_kernel, tensors, _activation(epilogue.activation))

    dtypes = (dy.dtype, _dtype(epilogue.weight), _dtype(epilogue.bias))
    return _plans.made(("grad_sums", *_key(x, epilogue), dy.stride(), *dtypes), make)


@_on_device
def grad_sums(
    dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, tag: float = 0.0
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """[Σdz (C), Σdz·x̂ (C), fingerprint (2)], dweight, dbias"""
    weight, bias, residual, mask, _ = epilogue
    plan = plan_grad_sums(dy, x, epilogue)
    if plan.copies:
        epilogue = _copied_epilogue(epilogue, plan)
        return grad_sums(_copied(dy, "dy", plan), _copied(x, "x", plan), mean, invstd, epilogue, tag)
    channels = x.shape[1]
    dsums = torch.empty(2 * channels + 2, dtype=torch.float64, device=x.device)
    dweight = None if weight is None else torch.empty(channels, dtype=weight.dtype, device=x.device)
    dbias = None if bias is None else torch.empty(channels, dtype=bias.dtype, device=x.device)
    work = workspace(x.device, plan.partials, plan.semaphores)
    parameters = (mean, invstd, _packed(weight), _packed(bias))
    pointers = (dy, x, residual, mask, *parameters, *work, dsums, dweight, dbias)
    launch(plan.kernel, plan.grid, pointers, (tag, *plan.integers))
    return dsums, dweight, dbias


def plan_grad_input(dy: Tensor, x: Tensor, epilogue: Epilogue, dx: Tensor | None, dresidual: Tensor | None) -> Plan:
    def make() -> Plan:
        out = dx if dresidual is None else dresidual
        tensors = {"x": x, "mask": epilogue.mask, "y": out, "dy": dy, "residual": epilogue.residual}
        return make_plan(grad_input_kernel, tensors, _activation(epilogue.activation))

    kinds = (dy.dtype, _dtype(epilogue.weight), _dtype(epilogue.bias), dx is None, dresidual is None)
    return _plans.made(("grad_input", *_key(x, epilogue), dy.stride(), *kinds), make)


@_on_device
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
    weight, bias, residual, mask, _ = epilogue
    dx = None if dsums is None else torch.empty_like(x)
    dresidual = torch.empty_like(x) if needs_dresidual else None
    plan = plan_grad_input(dy, x, epilogue, dx, dresidual)
    if plan.copies:
        del dx, dresidual
        strides = torch.empty_like(x, device="meta").stride()
        epilogue = _copied_epilogue(epilogue, plan)
        x, dy = _copied(x, "x", plan), _copied(dy, "dy", plan)
        dense = grad_input(dy, x, mean, invstd, epilogue, dsums, count, needs_dresidual, tag, turn)
        dx, dresidual = (None if t is None else in_strides(t, strides) for t in dense)
        return dx, dresidual
    parameters = (mean, invstd, _packed(weight), _packed(bias), dsums, count)
    pointers = (dy, x, residual, mask, *parameters, dx, dresidual, report_of(x.device))
    launch(plan.kernel, plan.grid, pointers, (tag, turn, *plan.integers))
    return dx, dresidual


def _with_contiguous_running(
    x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running, tag: float, turn: int
) -> tuple[Tensor, Tensor, Tensor]:
    """normalize for buffers that are slices: kernels move copies of them, which then go back."""
    mean, var = running.mean.contiguous(), running.var.contiguous()
    result = normalize(x, sums, epilogue, eps, running._replace(mean=mean, var=var), tag, turn)
    running.mean.copy_(mean)
    running.var.copy_(var)
    return result


def _key(x: Tensor, epilogue: Epilogue) -> tuple[Any, ...]:
    residual = epilogue.residual
    residual_key = None if residual is None else (residual.stride(), residual.dtype)
    return x.device, x.shape, x.stride(), x.dtype, residual_key, _strides(epilogue.mask), epilogue.activation


@functools.lru_cache(maxsize=256)
def halves(*values: float) -> tuple[float, ...]:
    """Each value as a sum of two float32: Triton's floating arguments have no more."""
    firsts = [struct.unpack("f", struct.pack("f", value))[0] for value in values]
    return tuple(part for value, first in zip(values, firsts, strict=True) for part in (first, value - first))


def _strides(t: Tensor | None) -> tuple[int, ...] | None:
    return None if t is None else t.stride()


def _dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def _activation(activation: str | None) -> dict[str, Any]:
    return {"ACTIVATION": activation, "SLOPE": LEAKY_SLOPE}


def _packed(t: Tensor | None) -> Tensor | None:
    """A (C,) parameter without gaps."""
    return t if t is None or t.is_contiguous() else t.contiguous()


def _copied(t: Tensor, name: str, plan: Plan) -> Tensor:
    """t, contiguous where the plan asks for it; an output that is no view of (N, C, S) asks for x."""
    return t.contiguous() if name in plan.copies or (name == "x" and "y" in plan.copies) else t


def _copied_epilogue(epilogue: Epilogue, plan: Plan) -> Epilogue:
    residual, mask = epilogue.residual, epilogue.mask
    return epilogue._replace(
        residual=None if residual is None else _copied(residual, "residual", plan),
        mask=None if mask is None else _copied(mask, "mask", plan),
    )
