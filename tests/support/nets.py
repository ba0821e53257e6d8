"""A small convolutional net with converted layers, and what a step of it is held to."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import calls, groups
from syncbn.names import Call
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives


class Net(nn.Module):
    """Two convolutions with batch norms, a residual between them; converted, so that the layers are BatchNorm2d too."""

    LAYERS = 2

    def __init__(self, process_group: groups.Group | None = None, checkpointed: object = None) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.checkpointed = checkpointed
        syncbn.convert_sync_batchnorm(self, process_group)

    def block(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(x)) + x)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        if self.checkpointed is None:
            return self.block(y)
        arguments = {} if self.checkpointed == "all" else {"context_fn": self.checkpointed}
        return checkpoint(self.block, y, use_reentrant=False, **arguments)


def batch(samples: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A rank's input and the cotangent of its output; ranks differ."""
    generator = torch.Generator().manual_seed(100 * seed + dist.get_rank())
    x, dy = (torch.randn(samples, channels, 6, 5, generator=generator) for channels in (3, 8))
    return x.requires_grad_(), dy


@contextlib.contextmanager
def sums_taken(note: Callable[[Tensor], Any] = Tensor.numel) -> Iterator[list[Any]]:
    """The lengths, or another note, of what eager layers reduce, where others use the group too."""
    taken: list[Any] = []
    original = calls.all_sum

    def noted(wire: Tensor, call: Call | None) -> Tensor:
        taken.append(note(wire))
        return original(wire, call)

    calls.all_sum = noted
    try:
        yield taken
    finally:
        calls.all_sum = original


Called = Callable[[Tensor], Tensor]


def assert_step(called: Called, x: Tensor, dy: Tensor, right: nn.Module, collectives: int | None = Net.LAYERS) -> None:
    """A step is that of the eager net `right`, with as many collectives each way as it has layers."""
    x_right = x.detach().clone().requires_grad_()
    with Collectives() as forward:
        y = called(x)
    with Collectives() as backward:
        y.backward(dy)
    y_right = right(x_right)
    y_right.backward(dy)
    if collectives is not None:
        assert (forward.count, backward.count) == (collectives, collectives)
    # Two normalizations of float32 a side, compiled and eager, each right to UNIT.
    assert error(y, y_right) <= 4 * UNIT[torch.float32]
    assert error(x.grad, x_right.grad) <= 4 * UNIT[torch.float32]


def assert_same_state(ours: nn.Module, right: nn.Module) -> None:
    for (name, actual), expected in zip(ours.state_dict().items(), right.state_dict().values(), strict=True):
        assert error(actual, expected.double()) <= 2 * UNIT[torch.float32], name
    for (name, p), q in zip(ours.named_parameters(), right.parameters(), strict=True):
        assert error(p.grad, q.grad.double()) <= 4 * UNIT[torch.float32], name
