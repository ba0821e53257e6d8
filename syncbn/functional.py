"""The layer as a function: what is checked, and which of the three ways a call goes."""

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn import checks, composed, direct, groups, profile, symbolic, torch_private
from syncbn.autograd import NormalizeBatch, Options
from syncbn.formulas import PLAIN, Epilogue, Running, Statistics, finish
from syncbn.names import FORWARD, FUNCTION, Call, Label


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    process_group: groups.Group | None = None,
    *,
    residual: Tensor | None = None,
    activation: str | None = None,
    mask: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    skip_nonfinite: bool = True,
) -> Tensor:
    r"""Batch normalization with the statistics of all ranks; the arguments of ``F.batch_norm``, then ours.

    .. math:: y = \mathrm{activation}\Big(\frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}}\,w + b + \mathrm{residual}\Big)

    In training, :math:`\mu` and the biased :math:`\sigma^2` are taken per channel over every position of every rank
    of the group, by one all-reduce of float64 sums, so ranks may hold batches of any size, empty ones too.
    ``running_mean`` and ``running_var`` (unbiased) then move by ``momentum``, to the same bits on all ranks.
    Otherwise nothing is communicated: the running statistics are used, or this rank's batch if there are none.

    Args:
        input: (N, C, \*S), float16, bfloat16, float32 or float64, any strides; y has its dtype and memory format.
        running_mean, running_var: (C,) or None, moved in place in training; a globally empty batch moves neither,
            a global batch of one value does not move the variance.
        weight, bias: (C,) or None, for 1 and 0.
        training: use the batch's statistics.
        momentum: weight of the new value, any finite number; None for the cumulative average, which needs
            ``num_batches_tracked`` in training.
        eps: added to the variance; finite, not negative, and not 0 where the statistics are a batch's.
        process_group: the ranks to synchronise over, a ProcessGroup (see `syncbn.new_group`) or a 1-d DeviceMesh;
            None is the default group, looked up at each call.
        residual: (N, C, \*S), added before the activation.
        activation: None, ``"relu"``, ``"leaky_relu"`` (slope 0.01) or ``"silu"``.
        mask: bool, broadcastable to (N, \*S). Positions where it is False add nothing to the statistics, give y = 0
            and receive no gradient, whatever stands there.
        num_batches_tracked: scalar integer tensor, incremented in training with running statistics.
        skip_nonfinite: leave the running statistics of a channel as they are where its mean or variance is not finite;
            False for torch's behaviour, which keeps a NaN for good.

    Every rank of the group must make the same training calls in the same order, and agree on whether the input
    requires a gradient: then the backward pass has one all-reduce, else none.
    ``input.grad`` is the gradient of the sum of the ranks' losses; ``weight.grad`` and ``bias.grad`` are this rank's
    sums, for DistributedDataParallel to average.
    A call may be compiled, exported, traced, checkpointed, transformed by ``torch.func`` and differentiated again, also
    for many cotangents at once, as many on every rank. To ``torch.fx`` it is one node.
    A recomputation in activation checkpointing communicates and moves nothing.

    Raises:
        TypeError, ValueError: for a wrong argument, before any communication and with all buffers unchanged.
        RuntimeError: likewise, under ``torch.vmap`` with running statistics that are not mapped over; and for a
            checkpointed region that makes another call when it is recomputed; and if the ranks are in different calls,
            or the transport fails, with the layer, the call and where the other ranks are.

    Source: Ioffe and Szegedy, Batch Normalization, 2015 (arXiv:1502.03167), algorithm 1, over all ranks.
    """
    if torch_private.is_fx_tracing():
        given = (input, running_mean, running_var, weight, bias, training, momentum, eps, process_group)
        ours = {
            "residual": residual,
            "activation": activation,
            "mask": mask,
            "num_batches_tracked": num_batches_tracked,
            "skip_nonfinite": skip_nonfinite,
        }
        node: Tensor | None = symbolic.call_function(sync_batch_norm, given, ours)
        if node is not None:
            return node
    statistics = (running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite)
    return normalize(
        process_group, input, statistics, weight, bias, training, eps, residual, activation, mask, FUNCTION
    )


def normalize(
    process_group: groups.Group | None,
    x: Tensor,
    statistics: Statistics,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    residual: Tensor | None,
    activation: str | None,
    mask: Tensor | None,
    label: Label,
) -> Tensor:
    """`sync_batch_norm` of whoever is called so; statistics are its running ones, and how they move.

    A call like an earlier one has been checked, but for its numbers and its group.
    """
    record = profile.begin_label(FORWARD, label)
    try:
        is_traced = torch_private.is_jit_tracing()
        is_composed = (training or statistics[0] is None) and (
            is_traced or _is_looked_into(x, residual, weight, bias, mask, statistics)
        )
        if training and mask is None and not is_composed:
            y = direct.normalize(process_group, x, statistics, weight, bias, eps, residual, activation, label)
            if y is not None:
                return y
        epilogue = Epilogue(weight, bias, residual, mask, activation)
        given = process_group, x, training, statistics, epilogue, eps, is_composed
        call = torch_private.untraced(checks.checked, *given) if is_traced else checks.checked(*given)
        if call.running is not None and not training:
            return _evaluate(call.x, call.running, _whole(call), call.eps)
        if is_composed:
            is_written = is_traced or torch.compiler.is_compiling()  # to a graph, in which no call has a name
            named = None if call.group is None or is_written else Call(label, call.group, x, activation, True)
            name = groups.name_of(call.group)
            return composed.normalize_batch(x, _whole(call), call.eps, name, call.running, call=named)
        if not torch_private.are_transforms_active():
            return _by_backend(call, label)
        with torch_private.unmapped():
            return _by_backend(call, label)
    finally:
        profile.end_label(record)


def _is_looked_into(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    statistics: Statistics,
) -> bool:
    """Whether a call is compiled, or its x or residual is dual, without storage or a subclass's, or torch.func
    transforms any of its tensors.
    """
    return (
        torch.compiler.is_compiling()
        or type(x) not in PLAIN
        or (residual is not None and (type(residual) not in PLAIN or residual.is_meta))
        or (
            torch_private.are_transforms_active()
            and torch_private.is_any_wrapped(x, residual, weight, bias, mask, *statistics[:3])
        )
        or torch_private.is_forward_ad_on(x, residual, weight, bias)
        or x.is_meta
    )


def _by_backend(call: checks.Checked, label: Label) -> Tensor:
    """With the batch's statistics."""
    x, epilogue, running, eps, group = call
    weight, bias, residual, mask, activation = epilogue if epilogue.mask is None else _whole(call)
    x, residual = x.resolve_neg(), None if residual is None else residual.resolve_neg()  # kernels read what is stored
    options = Options(eps, activation, group, running, label, torch.is_grad_enabled())
    y: Tensor = NormalizeBatch.apply(x, weight, bias, residual, mask, options)  # type: ignore[no-untyped-call]  # torch's own
    if mask is None:
        direct.remember(x, epilogue, running)
    return y


def _whole(call: checks.Checked) -> Epilogue:
    """The epilogue with the mask at its full shape, (N, *S)."""
    x, epilogue, mask = call.x, call.epilogue, call.epilogue.mask
    return epilogue if mask is None else epilogue._replace(mask=mask.expand(x.shape[0], *x.shape[2:]))


def _evaluate(x: Tensor, running: Running, epilogue: Epilogue, eps: float) -> Tensor:
    """With the running statistics, whatever the ranks."""
    weight, bias, residual, mask, activation = epilogue
    if mask is not None:  # what stands behind it must not reach a gradient either
        x = torch.where(mask.unsqueeze(1), x, 0)
        residual = None if residual is None else torch.where(mask.unsqueeze(1), residual, 0)
    return finish(_normalize_eval(x, running.mean, running.var, weight, bias, eps), residual, activation, mask)


def _normalize_eval(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """F.batch_norm itself, so that export, tracing and conv-bn folding see an ordinary batch norm."""
    parameters = (mean, var, weight, bias)
    dtypes = {t.dtype for t in parameters if t is not None}
    if dtypes not in ({x.dtype}, {torch.float32}) or (x.dtype == torch.float64 and dtypes != {x.dtype}):
        common = torch.promote_types(x.dtype, torch.float32)  # ATen takes one parameter dtype: x's or float32
        mean, var = mean.to(common), var.to(common)
        weight, bias = (None if t is None else t.to(common) for t in (weight, bias))
    if eps == 0:  # F.batch_norm of torch 2.11 wants more in eval too
        return torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, torch.backends.cudnn.enabled)
    return F.batch_norm(x, mean, var, weight, bias, training=False, momentum=0.0, eps=eps)
