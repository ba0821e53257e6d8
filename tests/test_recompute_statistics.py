"""recompute_statistics: against float64 statistics of all the data, on one to four ranks; and what it leaves alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn.compat import apex
from tests.support.layer_runs import let_torch_warn_of_itself
from tests.support.oracle import error
from tests.support.ranks import RankPool

Sizes = list[list[int]]
SPREAD: dict[int, Sizes] = {
    1: [[3, 2, 4]],
    2: [[3, 2], [4]],
    3: [[2], [], [3, 1, 2]],
    4: [[2, 2], [1], [], [3]],
}
"""Samples of each batch of each rank, by the number of ranks: uneven, and ranks without any."""


class Net(nn.Module):
    """A norm with a mask, and one that is called twice, each behind a convolution; the outputs are in a container."""

    def __init__(self, synchronized: bool = True, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.conv1, self.norm1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.checkpointed = checkpointed
        if synchronized:
            syncbn.convert_sync_batchnorm(self)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> dict[str, list[Tensor]]:
        y = self.conv1(x)
        y = torch.relu(self.norm1(y) if mask is None else self.norm1(y, None, mask))
        block = lambda y: self.norm2(self.conv2(y))  # noqa: E731
        y = checkpoint(block, y, use_reentrant=False) if self.checkpointed else block(y)
        return {"outputs": [self.norm2(self.conv2(torch.relu(y)))]}


def rank_batches(sizes: list[int], rank: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """A rank's batches, with masks; others than another rank's."""
    generator = torch.Generator().manual_seed(100 + rank)
    batches = []
    for size in sizes:
        x = torch.randn(size, 3, 5, 4, generator=generator, dtype=torch.float64) * 2 + 1 + rank
        batches.append((x.to(dtype), torch.rand(size, 5, 4, generator=generator) < 0.7))
    return batches


def oracle(net: Net, steps: list[tuple[Tensor, Tensor | None]]) -> dict[str, Tensor]:
    """Mean and unbiased variance of all that each norm is given over these steps, each normalized by its own."""
    seen: dict[str, list[Tensor]] = {"norm1": [], "norm2": []}

    def norm(layer: nn.Module, name: str, x: Tensor, mask: Tensor | None = None) -> Tensor:
        counted = x.movedim(1, -1)[torch.ones(x[:, 0].shape, dtype=torch.bool) if mask is None else mask]
        seen[name].append(counted)
        mean, var = counted.mean(0).view(1, -1, 1, 1), counted.var(0, correction=0).view(1, -1, 1, 1)
        y = (x - mean) / torch.sqrt(var + layer.eps)
        y = y * layer.weight.double().view(1, -1, 1, 1) + layer.bias.double().view(1, -1, 1, 1)
        return y if mask is None else y * mask[:, None]

    right = copy.deepcopy(net).double()
    with torch.no_grad():
        for x, mask in steps:
            y = torch.relu(norm(net.norm1, "norm1", right.conv1(x.double()), mask))
            y = norm(net.norm2, "norm2", right.conv2(y))
            norm(net.norm2, "norm2", right.conv2(torch.relu(y)))
    found = {}
    for name, parts in seen.items():
        every = torch.cat(parts)
        found |= {f"{name}.running_mean": every.mean(0), f"{name}.running_var": every.var(0)}
    return found


def steps_of(spread: Sizes, together: bool, masked: bool) -> list[tuple[Tensor, Tensor | None]]:
    """What is normalized at once: the ranks' batches of a step together, or each alone."""
    ranks = [rank_batches(sizes, rank) for rank, sizes in enumerate(spread)]
    alone = [[batch] for batches in ranks for batch in batches]
    longest = max(map(len, ranks))
    steps = [[batches[i] for batches in ranks if i < len(batches)] for i in range(longest)] if together else alone
    parts = [tuple(map(torch.cat, zip(*step, strict=True))) for step in steps]
    return [(x, mask if masked else None) for x, mask in parts]


def with_mask(net: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    net(*batch)


def recomputed(spread: Sizes, synchronized: bool, masked: bool, wrap: Callable[..., nn.Module] | None) -> Any:
    """A rank's state afterwards, and what was said."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    net = Net(synchronized).double()
    wrapped = net if wrap is None else wrap(net)
    said = syncbn.recompute_statistics(
        wrapped, iter(rank_batches(spread[rank], rank)), forward=with_mask if masked else None
    )
    return {k: v.clone() for k, v in net.state_dict().items()}, said


@pytest.mark.parametrize(("synchronized", "masked"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("world", SPREAD)
def test_statistics_are_those_of_all_data(ranks: RankPool, world: int, synchronized: bool, masked: bool) -> None:
    """Of all positions, calls, batches and ranks, to 1e-12 in float64; the same bits on all ranks."""
    spread = SPREAD[world]
    outcomes = ranks.run(world, recomputed, spread, synchronized, masked, None)
    right = oracle(Net(), steps_of(spread, synchronized, masked))
    state, said = outcomes[0]
    for name, value in right.items():
        assert error(state[name], value) <= 1e-12, name
    positions = 20 * sum(map(sum, spread))
    assert said.counts["norm2"] == 2 * positions
    assert (said.counts["norm1"] < positions) if masked else (said.counts["norm1"] == positions)
    assert said.left == {}
    for other, _ in outcomes[1:]:
        assert all(torch.equal(other[name], state[name]) for name in state)
    assert state["norm1.num_batches_tracked"] == 0


def _in_ddp(net: nn.Module) -> nn.Module:
    return DistributedDataParallel(net)


def _compiled(net: nn.Module) -> nn.Module:
    let_torch_warn_of_itself()
    torch.compiler.reset()
    compiled: Any = torch.compile(net, backend="eager")
    with torch.no_grad():
        compiled(torch.randn(2, 3, 5, 4, dtype=torch.float64))  # a graph without anything that looks on
    net.norm1.reset_running_stats()
    net.norm2.reset_running_stats()
    return compiled


def _compiled_ddp(net: nn.Module) -> nn.Module:
    let_torch_warn_of_itself()
    torch.compiler.reset()
    compiled: nn.Module = torch.compile(DistributedDataParallel(net), backend="eager")
    return compiled


def _compiled_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="eager")
    _compiled(net)
    return net


def _checkpointed(net: Net) -> nn.Module:
    net.checkpointed = True
    return net


@pytest.mark.parametrize("wrap", [_in_ddp, _compiled, _compiled_ddp, _compiled_in_place, _checkpointed])
@pytest.mark.parametrize("synchronized", [True, False])
def test_wrapped_models(ranks: RankPool, synchronized: bool, wrap: Callable[..., nn.Module]) -> None:
    """In DistributedDataParallel, compiled or checkpointed, one rank without data: the same bits as the bare model."""
    spread = [[3, 2], []]
    plain, wrapped = (ranks.run(2, recomputed, spread, synchronized, False, w) for w in (None, wrap))
    for (right, _), (state, said) in zip(plain, wrapped, strict=True):
        assert list(said.counts) == ["norm1", "norm2"]
        for name in ("running_mean", "running_var"):
            assert all(torch.equal(state[f"{norm}.{name}"], right[f"{norm}.{name}"]) for norm in ("norm1", "norm2"))


@pytest.mark.parametrize("cut", [[9], [1, 8], [3, 3, 3], [0, 4, 5]])
@pytest.mark.parametrize("cls", [nn.BatchNorm2d, syncbn.SyncBatchNorm])
def test_the_first_layer_does_not_see_how_data_is_cut(cls: type[nn.Module], cut: list[int]) -> None:
    """Its statistics are those of the data, however that is cut into batches, also empty ones."""
    x = torch.randn(9, 3, 5, 4, dtype=torch.float64) * 3 - 2
    layer = cls(3, dtype=torch.float64)
    syncbn.recompute_statistics(layer, x.split(cut))
    flat = x.transpose(0, 1).flatten(1)
    assert error(layer.running_mean, flat.mean(1)) <= 1e-12
    assert error(layer.running_var, flat.var(1)) <= 1e-12


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_single_precision_far_from_zero(offset: float) -> None:
    """Of float32 data, mean/std up to 1e3: to 1e-6 of the variance and of the standard deviation, and rounding."""
    batches = (torch.randn(5, 16, 3, 24, 24) + offset).unbind()
    layer = syncbn.SyncBatchNorm(3)
    syncbn.recompute_statistics(layer, batches)
    flat = torch.cat(batches).double().transpose(0, 1).flatten(1)
    assert ((layer.running_var / flat.var(1)) - 1).abs().max() <= 1e-6
    assert (layer.running_mean - flat.mean(1)).abs().max() <= 1e-6 + offset * 2**-24


def test_channels_last_layers_of_apex() -> None:
    """What is measured is what the layer normalizes, not what it is given: (N, H, W, C) there."""
    x = torch.randn(4, 5, 6, 3, dtype=torch.float64)
    layer = apex.SyncBatchNorm(3, channel_last=True).double()
    syncbn.recompute_statistics(layer, [x])
    assert error(layer.running_mean, x.flatten(0, 2).mean(0)) <= 1e-12


def test_momentum_is_the_share_of_the_way() -> None:
    """0.25 moves the old statistics by a quarter; 0 leaves them; the layer's own momentum has no part in it."""
    x, layer = torch.randn(8, 3, dtype=torch.float64), nn.BatchNorm1d(3, momentum=0.9, dtype=torch.float64)
    syncbn.recompute_statistics(layer, [x], momentum=0.25)
    assert error(layer.running_mean, 0.25 * x.mean(0)) <= 1e-12
    assert error(layer.running_var, 0.75 + 0.25 * x.var(0)) <= 1e-12
    before = layer.running_mean.clone()
    syncbn.recompute_statistics(layer, [x + 1], momentum=0)
    assert torch.equal(layer.running_mean, before)


def test_dropout_is_left_out() -> None:
    """All but the batch norms is in eval mode: what is behind a dropout has the statistics of evaluation."""
    x = torch.randn(50, 3, dtype=torch.float64)
    net = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(3, dtype=torch.float64)).train()
    syncbn.recompute_statistics(net, [x])
    assert error(net[1].running_mean, x.mean(0)) <= 1e-12
    assert net[0].training
