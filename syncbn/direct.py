"""The steps of autograd.py for calls that are all alike: what it works out for each of them is laid out once, here.

A small layer takes as long as its Python does. A call is alike if all its tensors have the shapes, strides, dtypes and
device of an earlier one's: so it was checked, and it is launched directly once its kernels are compiled. What is
unusual (a recomputation, a capture, a hook on launches, another device, a dy of other strides, a tensor that does not
begin at a vector, a call that autograd does not record) goes autograd.py's way. The results are the same bits.
"""

import math
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import calls, groups, profile, recompute, torch_private
from syncbn.autograd import changed, gradients
from syncbn.backends import is_capturing, launches_for, name_for, select
from syncbn.backends.recent import Recent
from syncbn.formulas import Epilogue, Running, Statistics
from syncbn.names import BACKWARD, FORWARD, Call, Label

if TYPE_CHECKING:
    from syncbn.backends import Launches, Work

MOST_CALLS = 4096
"""Kinds of calls that are remembered, the oldest forgotten first."""

Kinds = tuple[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device] | None, ...]


class Kind:
    """What calls that are alike share."""

    def __init__(self, x: Tensor, epilogue: Epilogue, launches: "Launches") -> None:
        self.activation, self.launches, self.channels = epilogue.activation, launches, x.shape[1]
        residual = epilogue.residual if epilogue.activation is not None else None
        like_y = x.shape, launches.strides, x.dtype, x.device
        self.backward_kinds = like_y, *_kinds(x, epilogue.weight, epilogue.bias, residual)
        """Of dy and of what is saved for backward."""
        self.is_single = x.numel() == self.channels
        self.wire = 2 * self.channels + 3
        size = launches.wide.itemsize
        self.mean_at, self.invstd_at = 8 * self.wire, 8 * self.wire + size * self.channels
        # sums, mean and invstd of a call are one allocation of this size; this takes no memory itself
        doubles = self.wire + -(-2 * size * self.channels // 8)
        self.kept = torch.empty(1, dtype=torch.float64, device=x.device).expand(doubles)
        self.reduced, self.count_at = self.kept[: 2 * self.channels + 2], 16 * self.channels

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
        kind: Kind,
        now: tuple["Work", ProcessGroup | None, Label, float, tuple[float, ...], tuple[int | None, ...]],
    ) -> Tensor:
        work, group, label, eps, floats, addresses = now
        launches = kind.launches
        kept, y = torch.empty_like(kind.kept), torch.empty_like(x)
        stream, at, kept_at = work.stream, x.data_ptr(), kept.data_ptr()
        call = None if group is None else Call(label, group, x, kind.activation, ctx.needs_input_grad[0])
        tag = calls.begin(call, FORWARD)
        launches.sums.launch(stream, at, None, work.partials_at, work.semaphores_at, kept_at, tag)
        if call is not None:
            calls.all_sum(kept[: kind.wire], call)
        residual_at = None if residual is None else residual.data_ptr()
        results = (y.data_ptr(), kept_at + kind.mean_at, kept_at + kind.invstd_at, launches.report_at)
        numbers = *floats, *calls.mark_of(call)
        launches.normalized.launch(stream, at, residual_at, None, kept_at, *addresses, None, *results, *numbers)
        ctx.save_for_backward(x, weight, bias, residual if kind.activation is not None else None, kept)
        ctx.rest = kind, call, eps, label
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        record = profile.begin_label(BACKWARD, ctx.rest[-1])
        try:
            return NormalizeDirectly._backward(ctx, dy)
        finally:
            profile.end_label(record)

    @staticmethod
    def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, kept = ctx.saved_tensors
        kind, call, eps, _ = ctx.rest
        needs_dx, _, _, needs_dresidual, *_ = needed = ctx.needs_input_grad[:4]
        fused = needs_dresidual and kind.activation is not None
        launches = kind.launches
        step = launches.both_inputs if fused else launches.inputs
        dy_at = dy.data_ptr() if torch_private.has_storage(dy) else 1  # a batch has none; 1 is no vector's
        at, residual_at = x.data_ptr(), None if residual is None else residual.data_ptr()
        work = launches.turn(dy_at | at | (residual_at or 0))
        is_alike = type(dy) is Tensor and _kinds(dy, x, weight, bias, residual) == kind.backward_kinds
        is_ready = is_alike and not dy.is_neg() and work is not None and launches.dsums.bind() and step.bind()
        if not (is_ready and needs_dx) or torch.is_grad_enabled():
            epilogue = Epilogue(weight, bias, residual, None, kind.activation)
            grads = gradients(dy, x, epilogue, kind.unpacked(kept), eps, call, select(x), needed)
            return *grads, None, None
        stream, partials_at, kept_at = work.stream, work.partials_at, kept.data_ptr()
        given = (stream, dy_at, at, residual_at, None, kept_at + kind.mean_at, kept_at + kind.invstd_at)
        weight_at = bias_at = dweight = dbias = dweight_at = dbias_at = None
        if weight is not None:
            dweight, weight_at = torch.empty_like(weight), weight.data_ptr()
            dweight_at = dweight.data_ptr()
        if bias is not None:
            dbias, bias_at = torch.empty_like(bias), bias.data_ptr()
            dbias_at = dbias.data_ptr()
        dsums = torch.empty_like(kind.reduced)
        dsums_at = dsums.data_ptr()
        sums_at = dsums_at, dweight_at, dbias_at
        tag = calls.begin(call, BACKWARD)
        launches.dsums.launch(*given, weight_at, bias_at, partials_at, work.semaphores_at, *sums_at, tag)
        if call is not None:
            calls.all_sum(dsums, call)
        dx, dresidual = torch.empty_like(x), torch.empty_like(x) if fused else None
        results = dx.data_ptr(), None if dresidual is None else dresidual.data_ptr(), launches.report_at
        mark = calls.mark_of(call)
        step.launch(*given, weight_at, bias_at, dsums_at, kept_at + kind.count_at, *results, *mark)
        return dx, dweight, dbias, dresidual if fused or not needs_dresidual else dy, None, None


# Function.apply first unwraps what outlived a transform of torch.func, in Python; such an x has no address.
_apply = super(torch.autograd.Function, NormalizeDirectly).apply
_calls: Recent[Kind | None] = Recent(MOST_CALLS)
"""None for those that are unusual."""


def normalize(
    process_group: groups.Group | None,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    label: Label,
) -> Tensor | None:
    """y of a training call without a mask; None if it is not one that is known here, or not at such a time."""
    mean, var, tracked, momentum, skip_nonfinite = statistics
    owned = weight, bias, mean, var, tracked
    kind = _calls.get(_key(activation, skip_nonfinite, x, residual, *owned))
    if kind is None or not (type(eps) is float and 0 < eps < math.inf):
        return None
    momentum = float(momentum) if type(momentum) is int else momentum
    if not (type(momentum) is float and -math.inf < momentum < math.inf):
        return None
    try:
        group = groups.usual_peers(process_group)
    except groups.Unusual:
        return None
    if mean is not None and (mean.requires_grad or var.requires_grad):  # type: ignore[union-attr]  # both or neither
        return None
    if not recompute.is_ordinary() or x.is_neg() or (residual is not None and residual.is_neg()):
        return None
    if (weight is not None and weight.is_neg()) or (bias is not None and bias.is_neg()):
        return None
    if torch_private.are_transforms_active():  # of other tensors, but `_apply` knows nothing of that
        return None
    try:
        at = x.data_ptr()
        residual_at, *addresses = _addresses(residual, *owned)
    except RuntimeError:  # what outlived a transform of torch.func has none
        return None
    launches = kind.launches
    if not (launches.sums.bind() and launches.normalized.bind()) or (group is None and kind.is_single):
        return None
    work = launches.turn(at | (residual_at or 0))
    if work is None or residual_at == 0 or 0 in addresses:
        return None
    now = (work, group, label, eps, launches.halves(eps, momentum), addresses)
    y: Tensor = _apply(x, weight, bias, residual, kind, now)  # type: ignore[no-untyped-call]  # torch's own
    if mean is not None:
        changed(mean, var, tracked)
    return y


def remember(x: Tensor, epilogue: Epilogue, running: Running | None) -> None:
    """Know calls like this one, which was checked, from now on."""
    if name_for(x) == "reference" or (running is not None and running.momentum is None):
        return
    weight, bias, residual, _, activation = epilogue
    *buffers, _, skip_nonfinite = (None, None, None, None, True) if running is None else running
    key = _key(activation, skip_nonfinite, x, residual, weight, bias, *buffers)
    if key is None or key in _calls:
        return
    if not is_capturing(x.device):  # else what is allocated for it were the graph's
        launches = launches_for(x, epilogue, running)
        _calls.put(key, None if launches is None else Kind(x, epilogue, launches))


def _key(activation: str | None, skip_nonfinite: bool, x: Tensor, *tensors: Tensor | None) -> Hashable:
    """Of what is alike; None for what is no tensor or has no strides."""
    if not (activation is None or type(activation) is str):
        return None
    try:
        return name_for(x), activation, skip_nonfinite, _kinds(x, *tensors)
    except (AttributeError, RuntimeError):
        return None


def _kinds(*tensors: Tensor | None) -> Kinds:
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def _addresses(*tensors: Tensor | None) -> tuple[int | None, ...]:
    return tuple([None if t is None else t.data_ptr() for t in tensors])
