"""The order of the steps and what is kept between them; no arithmetic and no transport of its own.

    forward    x ─batch_sums─► Σx, Σx², n ─all_sum─► of all ranks ─normalize─► y, mean, invstd; running statistics move
    backward   dy, x ─grad_sums─► Σdz, Σdz·x̂ ─all_sum─► of all ranks ─grad_input─► dx, dresidual
                          └► dbias, dweight: this rank's own, which DistributedDataParallel averages

How a tensor goes: module.py and functional.py find the way of a call, checks.py looks at it once. Most come here, or to
direct.py, which has the same steps laid out for calls like earlier ones. The four verbs are a back-end's, backends/.
The sum is calls.py's, which knows the layer by its label (names.py), compares a fingerprint of the call and lets the
watch see who waits; comm.py alone talks to other ranks. Whoever looks inside of a call gets the same formula as plain
operations, composed.py: a compiler, a tracer, torch.func, a second derivative, many cotangents at once. A region that
is checkpointed runs twice and sums once, recompute.py.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.distributed import ProcessGroup

from syncbn import calls, composed, profile, recompute, torch_private
from syncbn.backends import Backend, select
from syncbn.formulas import Epilogue, Running
from syncbn.names import BACKWARD, FORWARD, FUNCTION, Call, Label
from syncbn.recompute import Taken

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]
"""Of x, weight, bias and residual."""


class Options(NamedTuple):
    """What a call fixes besides its tensors; group None means that this rank is alone.

    recorded is the grad mode of the caller, which an autograd.Function's forward cannot see.
    """

    eps: float
    activation: str | None
    group: ProcessGroup | None
    running: Running | None
    label: Label = FUNCTION
    recorded: bool = True


class NormalizeBatch(torch.autograd.Function):
    """y = activation(bn(x) + residual) with the statistics of all ranks.

    One collective forward and, iff x needs a gradient, one backward; that must agree across ranks.
    x.grad is the gradient of the sum of the ranks' losses; the parameters' gradients are this rank's sums.
    A recomputation takes the sums of the first pass and moves nothing. A backward that is to be differentiated in turn,
    or mapped over, is composed of operations which autograd can differentiate and vmap can map.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        options: Options,
    ) -> Tensor:
        backend = select(x)
        epilogue = Epilogue(weight, bias, residual, mask, options.activation)

        def take() -> Taken:
            group, activation = options.group, options.activation
            call = None if group is None else Call(options.label, group, x, activation, ctx.needs_input_grad[0])
            sums_local = backend.batch_sums(x, mask, calls.begin(call, FORWARD))
            return Taken(calls.all_sum(sums_local, call), x.shape[1], call)

        with recompute.hidden():
            (sums, _, call), are_new = recompute.taken_once(take, x.shape[1], options.recorded)
            running, mark = (options.running, calls.mark_of(call)) if are_new else (None, calls.NO_MARK)
            y, mean, invstd = backend.normalize(x, sums, epilogue, options.eps, running, *mark)
        if running is not None:
            changed(*running[:3])
        ctx.options, ctx.backend, ctx.call = options, backend, call
        kept = residual if options.activation is not None else None  # only z's sign or value needs it again
        ctx.save_for_backward(x, weight, bias, kept, mask, mean, invstd, sums)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, residual, mask, *statistics = ctx.saved_tensors
        options, needed = ctx.options, ctx.needs_input_grad[:4]
        epilogue = Epilogue(weight, bias, residual, mask, options.activation)
        record = profile.begin_label(BACKWARD, options.label)
        try:
            grads = gradients(dy, x, epilogue, statistics, options.eps, ctx.call, ctx.backend, needed)
        finally:
            profile.end_label(record)
        return *grads, None, None


def changed(*buffers: Tensor | None) -> None:
    """Tell autograd so: a graph that saved a running statistic is not to be run with another, silently."""
    increment_version([t for t in buffers if t is not None])


def gradients(
    dy: Tensor,
    x: Tensor,
    epilogue: Epilogue,
    statistics: list[Tensor],
    eps: float,
    call: Call | None,
    backend: Backend,
    needed: tuple[bool, bool, bool, bool],
) -> Gradients:
    """Those that are needed; statistics are mean, invstd and the sums of all ranks, call is None alone."""
    mean, invstd, sums = statistics
    dy = (
        dy if type(dy) is Tensor else dy.clone()
    ).resolve_neg()  # as kernels read it: it may be on its way, or negated
    if torch.is_grad_enabled() or not torch_private.has_storage(dy):  # create_graph=True, or dy is a batch of them
        dx, dweight, dbias, dresidual = composed.gradients(dy, x, epilogue, eps, call, sums[:-2], needed)
        return dx, dweight, dbias, dresidual
    needs_dx, needs_dweight, needs_dbias, needs_dresidual = needed
    dsums = dweight = dbias = dx = dresidual = None
    mark = calls.NO_MARK
    if needs_dx or needs_dweight or needs_dbias:
        tag = calls.begin(call, BACKWARD) if needs_dx else 0.0
        dsums_local, dweight, dbias = backend.grad_sums(dy, x, mean, invstd, epilogue, tag)
        if needs_dx:
            dsums, mark = calls.all_sum(dsums_local, call), calls.mark_of(call)
    if needs_dresidual and epilogue.activation is None and epilogue.mask is None:
        dresidual, needs_dresidual = dy, False
    if needs_dx or needs_dresidual:
        count = sums[-3:-2]
        dx, dz = backend.grad_input(dy, x, mean, invstd, epilogue, dsums, count, needs_dresidual, *mark)
        dresidual = dz if needs_dresidual else dresidual
    return dx, dweight, dbias, dresidual
