"""What is done to layers while they are ordinary ones for a while."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import syncbn
from syncbn import classes
from tests.support.layers import reparametrized

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def momentum(layer: nn.Module) -> None:
    layer.momentum, layer.note = 0.5, "new"


INSIDE: dict[str, tuple[Callable[[nn.Module], Any], Callable[[nn.Module], bool]]] = {
    "attributes": (momentum, lambda m: (m.momentum, m.note) == (0.5, "new")),
    "frozen": (syncbn.freeze, lambda m: isinstance(m, classes.Frozen) and not m.weight.requires_grad),
    "parametrized": (reparametrized, lambda m: parametrize.is_parametrized(m, "weight")),
    "a training step": (lambda m: m(X), lambda m: m.num_batches_tracked == 1),
    "a mode": (lambda m: m.eval(), lambda m: not m.training),
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("built", [False, True])
def test_what_is_done_within_plain_stays(name: str, built: bool) -> None:
    """A layer that was changed in the block is synchronized after it, and still is what the block made of it."""
    layer = syncbn.SyncBatchNorm2d(3) if built else syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    change, holds = INSIDE[name]
    with syncbn.plain(nn.Sequential(layer)) as net:
        change(net[0])
        assert not isinstance(net[0], syncbn.SyncBatchNorm)
    assert isinstance(layer, syncbn.SyncBatchNorm2d)
    assert holds(layer)
    syncbn.unfreeze(nn.Sequential(layer).train())
    assert type(layer(X).grad_fn).__name__.startswith("Normalize")


def test_a_lazy_layer_may_be_used_within_plain() -> None:
    """A lazy layer that meets its first input in the block is a synchronized one of that size afterwards."""
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.LazyBatchNorm2d()))
    with syncbn.plain(net):
        net(X)
    assert type(net[0]) is syncbn.SyncBatchNorm2d
    assert net[0].num_features == 3


def test_a_layer_may_be_converted_within_plain() -> None:
    """Layers that are converted in the block, one or all, and frozen then, are synchronized after it, as the others."""
    for only in ("0", "*"):
        for freezes in (False, True):
            net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3)))
            with syncbn.plain(net):
                syncbn.convert_sync_batchnorm(net, only=only)
                if freezes:
                    syncbn.freeze(net)
            assert all(isinstance(m, classes.Frozen) == freezes for m in net)
            assert [type(m) for m in syncbn.unfreeze(net)] == [syncbn.SyncBatchNorm2d] * 2


@pytest.mark.parametrize("change", [syncbn.freeze, reparametrized], ids=["frozen", "parametrized"])
def test_torchs_layer_is_torchs_after_plain(change: Callable[[nn.Module], Any]) -> None:
    """An nn.SyncBatchNorm that is frozen or parametrized in the block is one after it."""
    net = nn.Sequential(nn.SyncBatchNorm(3))
    with syncbn.plain(net):
        change(net[0])
    assert isinstance(net[0], nn.SyncBatchNorm)
    assert isinstance(net[0], classes.Frozen) == (change is syncbn.freeze)
    assert type(syncbn.unfreeze(net)[0]) is nn.SyncBatchNorm or change is reparametrized


@pytest.mark.parametrize("frozen", [False, True])
def test_a_layer_may_be_thawed_or_freed_within_plain(frozen: bool) -> None:
    """What was frozen or parametrized before the block and is not after it is the synchronized layer beneath."""
    layer = syncbn.SyncBatchNorm2d(3)
    syncbn.freeze(layer) if frozen else reparametrized(layer)
    with syncbn.plain(nn.Sequential(layer)) as net:
        syncbn.unfreeze(net) if frozen else parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is syncbn.SyncBatchNorm2d
