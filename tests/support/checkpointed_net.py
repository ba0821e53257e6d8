"""A net whose regions are checkpointed in one of several ways, and what a step of it leaves behind."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import syncbn
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives

Wrap = Callable[[Callable[[Tensor], Tensor], Tensor], Tensor]


class Region(nn.Module):
    """Three calls of two layers, one of them called twice; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.twice = syncbn.SyncBatchNorm(4, activation="relu")
        self.last = syncbn.SyncBatchNorm(4, momentum=None)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.twice(self.conv(x))
        y = self.twice(self.conv(y), residual=y)
        return self.last(y.sin())


class Net(nn.Module):
    """Two passes through one region, and a layer outside; `wrap` checkpoints."""

    CALLS = 7

    def __init__(self, wrap: Wrap, halves: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.wrap, self.halves = wrap, halves
        self.region, self.outside = Region(), syncbn.SyncBatchNorm(4).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.outside(x)
        if self.halves:
            return self.wrap(lambda t: self.wrap(self.region, self.wrap(self.region, t).sin()), x)
        return self.wrap(self.region, self.wrap(self.region, x).sin())


def plain(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return region(x)


def reentrant(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")  # of a region in a region
        return checkpoint(region, x, use_reentrant=True)


def by_hooks(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(region, x, use_reentrant=False)


def to_the_end(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Without early stop the recomputation runs through calls whose tensors are all there already."""
    with set_checkpoint_early_stop(False):
        return checkpoint(region, x, use_reentrant=False)


def reentrant_in_hooks(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return by_hooks(lambda t: reentrant(region, t), x)


def hooks_in_reentrant(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return reentrant(lambda t: by_hooks(region, t), x)


class CheckpointFunction(torch.autograd.Function):
    """As libraries with a checkpoint of their own have it (fairscale, DeepSpeed, Megatron), by this name."""

    @staticmethod
    def forward(ctx: Any, region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.region, ctx.x = region, x.detach()
        with torch.no_grad():
            return region(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor | None]:
        x = ctx.x.detach().requires_grad_()
        with torch.enable_grad():
            y = ctx.region(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


class Reversible(CheckpointFunction):
    """The same under a name that promises nothing."""


def reentrant_elsewhere(region: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return CheckpointFunction.apply(region, x)


def selective(policy: Callable[[object], CheckpointPolicy]) -> Wrap:
    contexts = functools.partial(create_selective_checkpoint_contexts, lambda ctx, op, *args, **kwargs: policy(op))
    return lambda region, x: checkpoint(region, x, use_reentrant=False, context_fn=contexts)


def save_convolutions(op: object) -> CheckpointPolicy:
    keep = op is torch.ops.aten.convolution.default
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def save_everything(op: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def save_nothing(op: object) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


WRAPS = {
    "reentrant": reentrant,
    "reentrant_elsewhere": reentrant_elsewhere,
    "by_hooks": by_hooks,
    "to_the_end": to_the_end,
    "reentrant_in_hooks": reentrant_in_hooks,
    "hooks_in_reentrant": hooks_in_reentrant,
    "save_convolutions": selective(save_convolutions),
    "save_everything": selective(save_everything),
    "save_nothing": selective(save_nothing),
}


def step(net: Net, retain: bool = False) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """What a step leaves behind, and its collectives forward and backward; the batches differ between ranks."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    x = torch.randn(2 + 3 * rank, 4, 5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    dy = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9 + rank))
    x.requires_grad_()
    with Collectives() as forward:
        y = net(x)
    with Collectives() as backward:
        y.backward(dy, retain_graph=retain)
        if retain:
            y.backward(dy)
    left = {"y": y.detach(), "dx": x.grad, **dict(net.named_buffers())}
    left |= {f"d{name}": p.grad for name, p in net.named_parameters()}
    return left, (forward.count, backward.count)


def assert_equal_bits(ours: dict[str, Tensor], right: dict[str, Tensor], but_order: bool = False) -> None:
    """but_order: torch adds up the gradients of a parameter that is used in several reentrant regions region by region,
    in another order than without; everything else is still compared bit by bit.
    """
    for name, value in right.items():
        if but_order and name.startswith("dregion"):
            assert error(ours[name], value) <= UNIT[torch.float64], name
        else:
            assert torch.equal(ours[name], value), name
