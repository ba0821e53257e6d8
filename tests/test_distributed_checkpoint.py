"""torch.distributed.checkpoint with groups smaller than the world, whose running statistics differ."""

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

import syncbn
from tests.support.ranks import RankPool

STATISTICS = ("0.running_mean", "0.running_var", "1.running_mean", "1.running_var")


def _trained(seed: int) -> nn.Module:
    """Two layers over pairs of ranks, after two steps on data of each rank's own."""
    generator = torch.Generator().manual_seed(seed)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), syncbn.new_group(2))
    for _ in range(2):
        net(torch.randn(5, 3, generator=generator) * (1 + seed) + 10 * seed)
    return net


def _save(state: dict[str, Any], folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own about itself
        dcp.save(state, checkpoint_id=folder)


def _load(state: dict[str, Any], folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)


def _statistics(net: nn.Module) -> list[Tensor]:
    return [net.state_dict()[name].clone() for name in STATISTICS]


def _round_trip(folder: str, how: str) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The statistics of the group, those that were saved, and those that were loaded."""
    net = _trained(dist.get_rank())
    of_group = _statistics(net)
    if how == "synchronized":
        syncbn.synchronize_statistics(net)
    saved = _statistics(net)
    key = f"model of group {dist.get_rank() // 2}" if how == "a key a group" else "model"
    _save({key: net.state_dict()}, folder)
    other = _trained(10 + dist.get_rank())
    state = {key: other.state_dict()}
    _load(state, folder)
    other.load_state_dict(state[key])
    assert os.path.isdir(folder)
    return of_group, saved, _statistics(other)


def _all_equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def test_as_it_is_a_rank_may_load_another_groups(ranks: RankPool, tmp_path: Path) -> None:
    """What the documentation warns of: one rank's are saved for all, so that at least one group gets others than its
    own, while all ranks load the same.
    """
    outcomes = ranks.run(4, _round_trip, str(tmp_path / "saved"), "as it is")
    assert all(_all_equal(loaded, outcomes[0][2]) for _, _, loaded in outcomes)
    assert not all(_all_equal(loaded, saved) for _, saved, loaded in outcomes)


def test_synchronized_before_they_are_the_mixture(ranks: RankPool, tmp_path: Path) -> None:
    """After synchronize_statistics every rank loads what it had, the mixture of the groups', to the bit."""
    outcomes = ranks.run(4, _round_trip, str(tmp_path / "saved"), "synchronized")
    assert all(_all_equal(loaded, saved) for _, saved, loaded in outcomes)
    means = torch.stack([of_group[0] for of_group, _, _ in outcomes]).double()
    variances = torch.stack([of_group[1] for of_group, _, _ in outcomes]).double()
    mean, var = outcomes[0][2][:2]
    torch.testing.assert_close(mean.double(), means.mean(0), rtol=2**-23, atol=0)
    torch.testing.assert_close(var.double(), variances.mean(0) + means.var(0, correction=0), rtol=2**-22, atol=0)
    assert not torch.equal(outcomes[0][0][0], outcomes[2][0][0])  # the groups' own did differ


def test_a_key_a_group_keeps_them_apart(ranks: RankPool, tmp_path: Path) -> None:
    """Saved under a name of the group, each rank loads its group's, to the bit, to go on exactly there."""
    outcomes = ranks.run(4, _round_trip, str(tmp_path / "saved"), "a key a group")
    assert all(_all_equal(loaded, of_group) for of_group, _, loaded in outcomes)
    assert not torch.equal(outcomes[0][2][0], outcomes[2][2][0])


@pytest.mark.parametrize("how", ["as it is", "synchronized"])
def test_a_group_of_all_needs_neither(ranks: RankPool, tmp_path: Path, how: str) -> None:
    """With one group of all ranks the statistics are alike, and each rank loads what it had."""
    outcomes = ranks.run(2, _round_trip, str(tmp_path / "saved"), how)
    assert all(_all_equal(loaded, of_group) for of_group, _, loaded in outcomes)
