"""One function of the whole batch, computed by all ranks: what gradcheck and an oracle in one process can look at.

Every rank holds the whole batch and the same parameters; `part` is its share, `whole` puts the shares together again,
and `shared` are parameters whose gradients the ranks add up. Each is the other's derivative, so all may be
differentiated as often as one likes, and every rank computes the same numbers throughout.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def part(t: Tensor) -> Tensor:
    """This rank's of the world_size equal parts of (N, …)."""
    return _Linear.apply(t, _cut, _joined)


def whole(t: Tensor) -> Tensor:
    """All ranks' parts, in rank order."""
    return _Linear.apply(t, _joined, _cut)


def shared(t: Tensor) -> Tensor:
    """t, the same on every rank; its gradient is the sum of the ranks' gradients."""
    return _Linear.apply(t, Tensor.clone, _summed)


Map = Callable[[Tensor], Tensor]


class _Linear(torch.autograd.Function):
    """A linear map, whose derivative is its adjoint: the adjoint's derivative is the map again."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, function: Map, adjoint: Map) -> Tensor:
        ctx.function, ctx.adjoint = function, adjoint
        return function(t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _Linear.apply(grad, ctx.adjoint, ctx.function), None, None


def _cut(t: Tensor) -> Tensor:
    return t.chunk(dist.get_world_size())[dist.get_rank()].clone()


def _joined(t: Tensor) -> Tensor:
    parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, t.contiguous())
    return torch.cat(parts)


def _summed(t: Tensor) -> Tensor:
    t = t.clone()
    dist.all_reduce(t)
    return t
