"""Training under DistributedDataParallel equals training in one process with the whole batch."""

from collections.abc import Iterator
from inspect import signature

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.support.nets import sums_taken
from tests.support.oracle import error
from tests.support.ranks import RankPool

STEPS, PER_RANK = 10, 3
FLAGS = ("static_graph", "gradient_as_bucket_view")
"""Of DDP, each as a mode of its own."""


class Net(nn.Module):
    """conv, norm, residual block, which may be checkpointed, linear; float64."""

    def __init__(self) -> None:
        super().__init__()
        self.checkpointed = False
        self.conv1 = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        return self.head(x.mean((2, 3)))

    def block(self, x: Tensor) -> Tensor:
        return torch.relu(self.norm2(self.conv2(x)) + x)


def build() -> Net:
    torch.manual_seed(3)
    return Net()


def batches(world_size: int, parts: int = 1) -> Iterator[list[Tensor]]:
    """For every step, `parts` times world_size rank batches, and their targets alike."""
    generator = torch.Generator().manual_seed(4)
    for _ in range(STEPS):
        yield [
            torch.randn(PER_RANK, 3, 5, 5, generator=generator, dtype=torch.float64) for _ in range(world_size * parts)
        ]


def loss_of(y: Tensor, x: Tensor) -> Tensor:
    """Mean over samples of a fixed random functional of the output and the input."""
    target = torch.sin(7 * x.mean((1, 2, 3)))[:, None] * torch.arange(1.0, 5.0, dtype=torch.float64)
    return (y - target).square().sum(1).mean()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def train_ranks(mode: str, broadcast_buffers: bool) -> dict[str, Tensor]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = None
    if mode == "groups":
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = pairs[rank // 2]
    net = syncbn.convert_sync_batchnorm(build(), process_group=group)
    net.checkpointed = mode == "checkpoint"
    flag = next(
        k for k in ("forward_sync_buffers", "broadcast_buffers") if k in signature(DistributedDataParallel).parameters
    )
    own = {mode: True} if mode in FLAGS else {}
    model = DistributedDataParallel(net, process_group=group, **{flag: broadcast_buffers, **own})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = 2 if mode in ("no_sync", "twice") else 1
    layers = sum(isinstance(layer, syncbn.SyncBatchNorm) for layer in net.modules())
    for step in batches(world_size, parts):
        optimizer.zero_grad()
        with sums_taken() as taken:
            _backward(model, step[rank::world_size], mode)
        assert sorted(taken) == [2 * 6 + 2] * layers * parts + [2 * 6 + 3] * layers * parts  # six channels
        optimizer.step()
    return state(net)


def _backward(model: DistributedDataParallel, mine: list[Tensor], mode: str) -> None:
    if mode == "no_sync":
        with model.no_sync():
            loss_of(model(mine[0]), mine[0]).div(2).backward()
        loss_of(model(mine[1]), mine[1]).div(2).backward()
    elif mode == "twice":
        sum(loss_of(model(x), x) / 2 for x in mine).backward()
    else:
        loss_of(model(mine[0]), mine[0]).backward()


def train_alone(world_size: int, mode: str, members: slice = slice(None)) -> dict[str, Tensor]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    parts = 2 if mode in ("no_sync", "twice") else 1
    for step in batches(world_size, parts):
        optimizer.zero_grad()
        for part in range(parts):
            x = torch.cat(step[part * world_size : (part + 1) * world_size][members])
            loss_of(model(x), x).div(parts).backward()
        optimizer.step()
    return state(model)


def assert_equal(actual: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(actual) == list(right)
    for name, value in right.items():
        assert error(actual[name], value) <= 1e-10, name


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("mode", ["plain", "no_sync", "twice", "checkpoint", *FLAGS])
def test_ten_steps_equal_one_process(ranks: RankPool, mode: str, broadcast_buffers: bool) -> None:
    """Ten SGD steps on two ranks give the parameters and buffers of one process with all samples."""
    first, second = ranks.run(2, train_ranks, mode, broadcast_buffers)
    assert_equal(first, train_alone(2, mode))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sub_groups(ranks: RankPool) -> None:
    """Two groups of two ranks each train as two processes with their halves of the batch."""
    results = ranks.run(4, train_ranks, "groups", False)
    for rank, members in ((0, slice(0, 2)), (2, slice(2, 4))):
        assert_equal(results[rank], train_alone(4, "groups", members))
        assert all(torch.equal(results[rank][name], results[rank + 1][name]) for name in results[rank])


def _logged() -> int:
    ddp = DistributedDataParallel(syncbn.convert_sync_batchnorm(Net()))
    assert sum(isinstance(module, syncbn.SyncBatchNorm) for module in ddp.modules()) == 2
    return ddp._get_ddp_logging_data()["has_sync_bn"]


def test_the_logged_field_counts_torchs_layers_only(ranks: RankPool) -> None:
    """README's limit: has_sync_bn in DistributedDataParallel's logging data is 0, as it asks for nn.SyncBatchNorm."""
    assert ranks.run(2, _logged) == [0, 0]


def test_unsynchronized_batch_norm_would_fail_here(ranks: RankPool) -> None:
    """The comparison can fail: without synchronization the ten steps end elsewhere."""
    results = ranks.run(2, _train_unsynchronized)
    with pytest.raises(AssertionError):
        assert_equal(results[0], train_alone(2, "plain"))


def _train_unsynchronized() -> dict[str, Tensor]:
    original, syncbn.convert_sync_batchnorm = syncbn.convert_sync_batchnorm, lambda net, process_group: net
    try:
        return train_ranks("plain", True)
    finally:
        syncbn.convert_sync_batchnorm = original
