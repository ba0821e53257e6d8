"""One function of the whole batch, computed by all ranks: what gradcheck and an oracle in one process can look at.

Every rank holds the whole batch and the same parameters; `part` is its share, `whole` puts the shares together again,
and `shared` are parameters whose gradients the ranks add up. Each is the other's derivative, so all may be
differentiated as often as one likes, and every rank computes the same numbers throughout.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def part(t: Tensor) -> Tensor:
    """This rank's of the world_size equal parts of (N, …)."""
    return _Part.apply(t)


def whole(t: Tensor) -> Tensor:
    """All ranks' parts, in rank order."""
    return _Whole.apply(t)


def shared(t: Tensor) -> Tensor:
    """t, the same on every rank; its gradient is the sum of the ranks' gradients."""
    return _Shared.apply(t)


class _Part(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Whole.apply(grad)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        parts = [torch.empty_like(t, memory_format=torch.contiguous_format) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, t.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Part.apply(grad)


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        return t.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Summed.apply(grad)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        t = t.clone()
        dist.all_reduce(t)
        return t

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Shared.apply(grad)
