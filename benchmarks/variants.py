"""The layers that are compared, each as a function of (x, residual) that carries its own parameters.

Every one is a training call with running statistics, momentum 0.1 and float32 parameters.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from benchmarks.checking import EPS, Case, check, make_case, oracle
from benchmarks.resilience import attempt, ranks
from benchmarks.shapes import LayerCall

MOMENTUM = 0.1


class Variant(NamedTuple):
    """What takes a turn in a comparison.

    forward and backward work on the case that they are given; scope is which batch the output must be that of:
    "local", "global" (all ranks), or None for a yardstick without a right output; is_ours chooses the tolerance.
    """

    name: str
    forward: Callable[[Case], Any]
    backward: Callable[[Case, Any], Any]
    scope: str | None = "local"
    is_ours: bool = False


Apply = Callable[[Tensor, Tensor | None], Tensor]


def variant(
    name: str, apply: Apply, scope: str = "local", is_ours: bool = False, retain_graph: bool = False
) -> Variant:
    """A layer as a variant; the cases that it is called with share its parameters."""

    def backward(given: Case, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, given.leaves(), given.dy, retain_graph=retain_graph)

    return Variant(name, lambda given: apply(given.x, given.residual), backward, scope, is_ours)


BY_RANK = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def batch_norm(case: Case, fused: bool = False, made: type[nn.Module] | None = None) -> Apply:
    """nn.BatchNorm*d, or another, then + residual and ReLU if fused: what one writes without this library."""
    made = made or BY_RANK[case.x.ndim]
    layer = _with_parameters(made(case.x.shape[1], eps=EPS, momentum=MOMENTUM), case)
    return (lambda x, residual: F.relu(layer(x) + residual)) if fused else (lambda x, _: layer(x))


def compiled_batch_norm(case: Case, fused: bool = False) -> Apply:
    """torch.compile of `batch_norm`, for this shape; on CPU without code generation, where only the logic matters."""
    backend = "inductor" if case.x.is_cuda else "aot_eager"
    return torch.compile(batch_norm(case, fused), dynamic=False, backend=backend)


def ours(
    case: Case, group: Any = None, fused: bool = False, made: type[syncbn.SyncBatchNorm] = syncbn.SyncBatchNorm
) -> Apply:
    """syncbn.SyncBatchNorm over group, or one derived from it; residual and ReLU inside it."""
    activation = "relu" if fused else None
    layer = made(case.x.shape[1], EPS, MOMENTUM, process_group=group, activation=activation)
    return _with_parameters(layer, case)


class AllReduce(torch.autograd.Function):
    """The sum over all ranks, and so is its gradient. As in torch.distributed.nn.functional, whose all_reduce is
    deprecated since torch 2.13."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    backward = forward


def naive_sync(case: Case) -> Apply:
    """A composed synchronized batch norm, as one writes it with a differentiable all_reduce and equal batches."""
    channels = case.x.shape[1]
    running_mean, running_var = torch.zeros(channels), torch.ones(channels)

    def apply(x: Tensor, _: Tensor | None) -> Tensor:
        dims = [dim for dim in range(x.ndim) if dim != 1]
        along = (1, -1, *(1,) * (x.ndim - 2))
        wide = x.float()
        count = x.numel() // channels * dist.get_world_size()
        mean, mean_sq = (AllReduce.apply(torch.cat([wide.sum(dims), wide.square().sum(dims)])) / count).chunk(2)
        var = mean_sq - mean.square()
        with torch.no_grad():
            running_mean.lerp_(mean, MOMENTUM)
            running_var.lerp_(var * (count / (count - 1)), MOMENTUM)
        scale = case.weight * torch.rsqrt(var + EPS)
        return ((wide - mean.view(along)) * scale.view(along) + case.bias.view(along)).to(x.dtype)

    return apply


def copy() -> Variant:
    """The floor: one read and one write of the activation each way."""
    return Variant("copy", lambda case: case.x.detach().clone(), lambda case, _: case.dy.clone(), None)


def bare_all_reduce(case: Case) -> Variant:
    """Our collectives and nothing else: 2C+3 float64 forward, 2C+2 backward."""
    channels = case.x.shape[1]
    sums = torch.zeros(2 * channels + 3, dtype=torch.float64, device=case.x.device)
    dsums = torch.zeros(2 * channels + 2, dtype=torch.float64, device=case.x.device)
    return Variant("all_reduce", lambda _: dist.all_reduce(sums), lambda _, __: dist.all_reduce(dsums), None)


def _with_parameters(layer: nn.Module, case: Case) -> nn.Module:
    """layer on the case's device, training, with the case's parameter objects."""
    layer = layer.to(case.x.device).train()
    layer.weight, layer.bias = case.weight, case.bias
    return layer


def right_ones(
    call: LayerCall, case: Case, entrants: list[Variant], rank: int = 0
) -> tuple[list[Variant], dict[str, float], list[str]]:
    """Those with a right output or nothing to check, the errors measured, and what was wrong with the others."""
    expected = {"local": oracle([case], 0, call.fused)}
    if any(v.scope == "global" for v in entrants):
        everyone = [make_case(call.plan, case.x.device, r, call.fused) for r in range(ranks())]
        everyone[rank] = case
        expected["global"] = oracle(everyone, rank, call.fused)
    right, errors, refused = list[Variant](), dict[str, float](), list[str]()
    for v in entrants:
        if v.scope is not None:
            passes = partial(v.forward, case), partial(v.backward, case)
            work = partial(check, v.name, *passes, expected[v.scope], v.is_ours)
            if (off := attempt(f"{call}: {v.name}", work, case.x.device, refused)) is None:
                continue
            errors[v.name] = off
        right.append(v)
    return right, errors, refused
