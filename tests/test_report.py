"""The conversion report."""

from collections.abc import Callable

import pytest
import torch.distributed as dist
from torch import nn

import syncbn
from tests.support.ranks import RankPool


def test_every_norm_has_its_line() -> None:
    """Name, class before and now, status, reason and channels of every normalization layer, and of nothing else."""
    net = nn.ModuleDict(
        {
            "conv": nn.Conv2d(3, 4, 1),
            "a": nn.BatchNorm2d(4),
            "b": nn.SyncBatchNorm(5),
            "c": nn.GroupNorm(2, 6),
            "d": nn.InstanceNorm1d(7),
            "e": nn.BatchNorm3d(8),
            "f": syncbn.SyncBatchNorm(9),
        }
    )
    assert syncbn.conversion_report(net)[0].why == "not converted"
    syncbn.convert_sync_batchnorm(net, only="[a-d]")
    assert [tuple(row) for row in syncbn.conversion_report(net)] == [
        ("a", "BatchNorm2d", "SyncBatchNorm2d", "converted", "", "default", 4),
        ("b", "SyncBatchNorm", "SyncBatchNorm", "synchronized", "", "default", 5),
        ("c", "GroupNorm", "GroupNorm", "left alone", "GroupNorm has no batch statistics", "", 6),
        ("d", "InstanceNorm1d", "InstanceNorm1d", "left alone", "InstanceNorm has no batch statistics", "", 7),
        ("e", "BatchNorm3d", "BatchNorm3d", "left alone", "not chosen by `only`", "", 8),
        ("f", "SyncBatchNorm", "SyncBatchNorm", "synchronized", "", "default", 9),
    ]


def test_it_prints_as_a_table() -> None:
    """Printed, it has a header and one aligned line for each layer."""
    net = syncbn.freeze(syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(12), nn.BatchNorm2d(3))))
    head, first, second = str(syncbn.conversion_report(net)).split("\n")
    assert head.split() == ["name", "before", "now", "status", "why", "group", "channels"]
    assert "frozen: uses its running statistics" in first
    assert first.index("12") == second.index("3") == head.index("channels")
    assert str(syncbn.conversion_report(nn.ReLU())).split() == head.split()


def _group_names() -> list[str]:
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), syncbn.new_group(2))
    assert dist.get_world_size() == 4
    return [row.group for row in syncbn.conversion_report(net)]


def test_it_names_the_group(ranks: RankPool) -> None:
    """A layer's group is shown by its ranks."""
    assert ranks.run(4, _group_names) == [["ranks 0 1"], ["ranks 0 1"], ["ranks 2 3"], ["ranks 2 3"]]


def convert_none(net: nn.Module) -> nn.Module:
    return syncbn.convert_sync_batchnorm(net, only=[])


def activate(net: nn.Module) -> nn.Module:
    net[0].activation = "relu"
    return net


convert, revert = syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm
CHAINS: dict[str, tuple[tuple[Callable[[nn.Module], nn.Module], ...], tuple[str, str]]] = {
    "nothing": ((), ("left alone", "not converted")),
    "frozen": ((syncbn.freeze, convert), ("left alone", "frozen")),
    "thawed": ((syncbn.freeze, convert, syncbn.unfreeze), ("left alone", "not converted")),
    "reverted": ((convert, convert, revert), ("left alone", "not converted")),
    "not chosen": ((convert_none,), ("left alone", "not chosen by `only`")),
    "not chosen, frozen": ((convert_none, syncbn.freeze), ("left alone", "frozen")),
    "not chosen, chosen, reverted": ((convert_none, convert, revert), ("left alone", "not converted")),
    "activated": ((convert, activate), ("converted", "")),
    "converted and frozen": ((convert, syncbn.freeze), ("converted", "frozen: uses its running statistics")),
}


@pytest.mark.parametrize(("chain", "expected"), CHAINS.values(), ids=CHAINS)
def test_it_is_true_after_any_chain(
    chain: tuple[Callable[[nn.Module], nn.Module], ...], expected: tuple[str, str]
) -> None:
    """Status and reason are those of the layer as it is, not of what was done to it before."""
    net = nn.Sequential(nn.BatchNorm2d(3))
    for change in chain:
        change(net)
    row = syncbn.conversion_report(net)[0]
    assert (row.status, row.why) == expected
