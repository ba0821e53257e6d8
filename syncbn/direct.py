"""The steps of autograd.py for calls that are all alike, on a GPU: what it works out for each is laid out once, here.

A small layer takes as long as its Python does. A call is alike if its input has the shape, strides and dtype of an
earlier one's, and its parameters and buffers are the same objects, where and as they were: so it was checked, and its
kernels are compiled. What is unusual (a recomputation, a capture, a hook on launches, another device, a dy of other
strides, a tensor that does not begin at a vector) goes autograd.py's way. The results are the same bits.
"""

import weakref
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import comm, recompute
from syncbn.autograd import gradients
from syncbn.backends import Epilogue, Running, name_for, select
from syncbn.backends.recent import Recent

if TYPE_CHECKING:
    from syncbn.backends.gpu_direct import Launches
    from syncbn.backends.gpu_workspace import Workspace

MOST_CALLS = 4096
"""Kinds of calls that are remembered, the oldest forgotten first."""

Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, float | None]
"""running_mean, running_var, num_batches_tracked, momentum"""

Kinds = tuple[tuple[torch.dtype, torch.Size, tuple[int, ...]] | None, ...]


class Call:
    """What calls that are alike share."""

    def __init__(self, x: Tensor, epilogue: Epilogue, running: Running | None, launches: "Launches") -> None:
        owned = (*epilogue[:2], *(running[:3] if running is not None else (None, None, None)))
        self.owned = tuple(_nothing if t is None else weakref.ref(t) for t in owned)
        self.addresses, self.kinds = _addresses(*owned), _kinds(*owned)
        self.activation, self.launches, self.channels = epilogue.activation, launches, x.shape[1]
        residual = epilogue.residual if epilogue.activation is not None else None
        like_y = x.dtype, x.shape, launches.strides
        self.backward_kinds = like_y, *_kinds(x, epilogue.weight, epilogue.bias, residual)
        """Of dy and of what is saved for backward."""
        self.is_single = x.numel() == self.channels
        self.wire = 2 * self.channels + 1
        size = launches.wide.itemsize
        self.mean_at, self.invstd_at = 8 * self.wire, 8 * self.wire + size * self.channels
        # sums, mean and invstd of a call are one allocation of this size; this takes no memory itself
        doubles = self.wire + -(-2 * size * self.channels // 8)
        self.kept = torch.empty(1, dtype=torch.float64, device=x.device).expand(doubles)
        self.reduced = self.kept[: 2 * self.channels]

    def is_of(self, weight: Tensor | None, bias: Tensor | None, statistics: Statistics) -> bool:
        """Whether these are its parameters and buffers, where and as they were."""
        mean, var, tracked, _ = statistics
        a, b, c, d, e = self.owned
        same = a() is weight and b() is bias and c() is mean and d() is var and e() is tracked
        now = weight, bias, mean, var, tracked
        return same and self.addresses == _addresses(*now) and self.kinds == _kinds(*now)

    def unpacked(self, kept: Tensor) -> list[Tensor]:
        """mean, invstd, sums"""
        statistics = kept[self.wire :].view(self.launches.wide)
        return [statistics[: self.channels], statistics[self.channels : 2 * self.channels], kept[: self.wire]]


class NormalizeDirectly(torch.autograd.Function):
    """`NormalizeBatch` of a call that is known, at a time when it can be launched directly."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        call: Call,
        now: tuple["Workspace", ProcessGroup | None, float, tuple[float, ...]],
    ) -> Tensor:
        work, group, eps, floats = now
        launches = call.launches
        kept, y = torch.empty_like(call.kept), torch.empty_like(x)
        stream, at, kept_at = work.stream, x.data_ptr(), kept.data_ptr()
        launches.sums.launch(stream, at, None, work.partials_at, work.semaphores_at, kept_at)
        if group is not None:
            comm.all_sum(kept[: call.wire], group)
        residual_at = None if residual is None else residual.data_ptr()
        results = (y.data_ptr(), kept_at + call.mean_at, kept_at + call.invstd_at)
        launches.normalized.launch(stream, at, residual_at, None, kept_at, *call.addresses, None, *results, *floats)
        ctx.save_for_backward(x, weight, bias, residual if call.activation is not None else None, kept)
        ctx.rest = call, group, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, kept = ctx.saved_tensors
        call, group, eps = ctx.rest
        needs_dx, _, _, needs_dresidual, *_ = needed = ctx.needs_input_grad[:4]
        fused = needs_dresidual and call.activation is not None
        launches = call.launches
        step = launches.both_inputs if fused else launches.inputs
        dy_at, at, residual_at = dy.data_ptr(), x.data_ptr(), None if residual is None else residual.data_ptr()
        work = launches.turn(dy_at | at | (residual_at or 0))
        is_alike = _kinds(dy, x, weight, bias, residual) == call.backward_kinds
        is_ready = is_alike and work is not None and launches.dsums.bind() and step.bind()
        if not (is_ready and needs_dx) or torch.is_grad_enabled():
            epilogue = Epilogue(weight, bias, residual, None, call.activation)
            grads = gradients(dy, x, epilogue, call.unpacked(kept), eps, group, select(x), needed)
            return *grads, None, None
        stream, partials_at, kept_at = work.stream, work.partials_at, kept.data_ptr()
        given = (stream, dy_at, at, residual_at, None, kept_at + call.mean_at, kept_at + call.invstd_at)
        weight_at = bias_at = dweight = dbias = dweight_at = dbias_at = None
        if weight is not None:
            dweight, weight_at = torch.empty_like(weight), weight.data_ptr()
            dweight_at = dweight.data_ptr()
        if bias is not None:
            dbias, bias_at = torch.empty_like(bias), bias.data_ptr()
            dbias_at = dbias.data_ptr()
        dsums = torch.empty_like(call.reduced)
        dsums_at = dsums.data_ptr()
        launches.dsums.launch(
            *given, weight_at, bias_at, partials_at, work.semaphores_at, dsums_at, dweight_at, dbias_at
        )
        if group is not None:
            comm.all_sum(dsums, group)
        dx, dresidual = torch.empty_like(x), torch.empty_like(x) if fused else None
        results = (dx.data_ptr(), None if dresidual is None else dresidual.data_ptr())
        step.launch(*given, weight_at, bias_at, dsums_at, kept_at + call.mean_at - 8, *results)
        return dx, dweight, dbias, dresidual if fused or not needs_dresidual else dy, None, None


# Function.apply first unwraps what outlived a transform of torch.func, in Python; such an x is not let in here.
_apply = super(torch.autograd.Function, NormalizeDirectly).apply
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_calls: Recent[Call] = Recent(MOST_CALLS)


def normalize(
    group: ProcessGroup | None,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
) -> Tensor | None:
    """y of a training call without a mask; None if it is not one that is known here, or not at such a time."""
    call = _calls.get(_key(x, weight, statistics[0], residual, activation))
    momentum = statistics[3]
    if call is None or momentum is None or not call.is_of(weight, bias, statistics):
        return None
    if not recompute.is_ordinary() or _is_wrapped(x) or (residual is not None and _is_wrapped(residual)):
        return None
    launches = call.launches
    if not (launches.sums.bind() and launches.normalized.bind()) or (group is None and call.is_single):
        return None
    work = launches.turn(x.data_ptr() | (0 if residual is None else residual.data_ptr()))
    if work is None:
        return None
    now = (work, group, eps, launches.halves(eps, momentum))
    y: Tensor = _apply(x, weight, bias, residual, call, now)  # type: ignore[no-untyped-call]  # torch's own
    return y


def remember(x: Tensor, epilogue: Epilogue, running: Running | None) -> None:
    """Know calls like this one, which was checked, from now on."""
    if name_for(x) != "gpu" or (running is not None and running.momentum is None):
        return
    weight, bias, residual, _, activation = epilogue
    statistics: Statistics = (None, None, None, 0.0) if running is None else running
    key = _key(x, weight, statistics[0], residual, activation)
    known = _calls.get(key)
    if known is None or not known.is_of(weight, bias, statistics):
        from syncbn.backends import gpu_direct

        launches = gpu_direct.launches_for(x, epilogue, running)
        if launches is not None:
            _calls.put(key, Call(x, epilogue, running, launches))


def _key(
    x: Tensor, weight: Tensor | None, mean: Tensor | None, residual: Tensor | None, activation: str | None
) -> Hashable:
    """Of what is alike; `Call.is_of` looks at the rest. None for what is no tensor or has no strides."""
    try:
        fused = None if residual is None else (residual.shape, residual.stride(), residual.dtype, residual.device)
        return x.shape, x.stride(), x.dtype, x.device, id(weight), id(mean), activation, fused
    except (AttributeError, RuntimeError):
        return None


def _addresses(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple([None if t is None else t.data_ptr() for t in tensors])


def _kinds(*tensors: Tensor | None) -> Kinds:
    """What an address does not tell: a layer that was moved away, cast and moved back may be where it was."""
    return tuple([None if t is None else (t.dtype, t.shape, t.stride()) for t in tensors])


def _nothing() -> None:
    """A reference to None."""
