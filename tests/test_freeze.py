"""Frozen layers stay frozen."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn.utils import parametrize, prune

import syncbn
from syncbn import classes
from tests.support.layers import PLAIN, SHAPES, model, reparametrized
from tests.support.ranks import RankPool


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_train_does_not_thaw(rank: int, convert: bool) -> None:
    """After .train() a frozen layer still uses its running statistics, moves nothing and gives its eval bits."""
    layer = PLAIN[rank](3)
    layer(torch.randn(SHAPES[rank]))
    if convert:
        syncbn.convert_sync_batchnorm(layer)
    x = torch.randn(SHAPES[rank])
    right = layer.eval()(x)
    net = syncbn.freeze(nn.Sequential(layer).train()).train()
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(net(x), right)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert isinstance(layer, PLAIN[rank])
    assert isinstance(layer, syncbn.SyncBatchNorm) == convert


def test_gamma_and_beta_stop_or_go_on() -> None:
    """By default weight and bias stop requiring gradients; with train_affine they go on."""
    layer = syncbn.freeze(nn.BatchNorm2d(3))
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    layer = syncbn.freeze(nn.BatchNorm2d(3), train_affine=True)
    layer(torch.randn(2, 3, 4, 4)).sum().backward()
    assert layer.weight.grad is not None


def test_unfreeze_undoes_exactly_that() -> None:
    """unfreeze gives back class, mode and the gradients that freeze took, and no others."""
    net = syncbn.convert_sync_batchnorm(model())
    net[1].bias.requires_grad_(False)
    classes = [type(m) for m in net]
    syncbn.freeze(syncbn.freeze(net))
    syncbn.unfreeze(net.train())
    assert [type(m) for m in net] == classes
    assert net[1].training
    assert net[1].weight.requires_grad
    assert not net[1].bias.requires_grad


def test_a_parametrized_layer_freezes_its_original() -> None:
    """A parametrized weight stops training too, and starts again."""
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    syncbn.freeze(layer)
    assert not layer.parametrizations.weight.original.requires_grad
    syncbn.unfreeze(layer)
    assert layer.parametrizations.weight.original.requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("convert", [False, True])
def test_copies_stay_frozen(copied, convert: bool) -> None:
    """A copy or pickle of a frozen model is frozen and can be thawed."""
    net = model()
    if convert:
        syncbn.convert_sync_batchnorm(net)
    thawed = type(net[1])
    other = copied(syncbn.freeze(net)).train()
    assert not other[1].training
    assert type(syncbn.unfreeze(other)[1]) is thawed


def test_reverting_a_frozen_layer_keeps_it_frozen() -> None:
    """revert gives a frozen synchronized layer its class and leaves it frozen."""
    net = syncbn.freeze(syncbn.convert_sync_batchnorm(model()))
    syncbn.revert_sync_batchnorm(net).train()
    assert not isinstance(net[1], syncbn.SyncBatchNorm)
    assert isinstance(net[1], nn.BatchNorm2d)
    assert not net[1].training
    assert type(syncbn.unfreeze(net)[1]) is nn.BatchNorm2d


def test_a_layer_without_statistics_cannot_freeze() -> None:
    """Freezing a layer without running statistics is refused before anything has changed."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="track_running_stats=False at '1'"):
        syncbn.freeze(net)
    assert type(net[0]) is nn.BatchNorm2d


def _frozen_on_ranks() -> int:
    net = syncbn.freeze(syncbn.convert_sync_batchnorm(model()), train_affine=True).train()
    with CommDebugMode() as mode:
        net(torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    return mode.get_total_counts()


def test_frozen_layers_do_not_communicate(ranks: RankPool) -> None:
    """On two ranks in train mode a frozen model starts no collective, forward or backward."""
    assert ranks.run(2, _frozen_on_ranks) == [0, 0]


def pruned(layer: nn.Module) -> None:
    prune.identity(layer, "weight")


def freed(layer: nn.Module) -> None:
    parametrize.remove_parametrizations(layer, "weight")


@pytest.mark.parametrize(
    ("before", "between"),
    [(None, reparametrized), (None, pruned), (reparametrized, freed), (pruned, None), (reparametrized, None)],
    ids=["parametrized", "pruned", "freed", "pruned before", "parametrized before"],
)
def test_what_freezing_took_is_given_back_under_any_name(before: Any, between: Any) -> None:
    """All of weight and bias stops training, however they are stored, and starts again, whatever they became."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    if before is not None:
        before(net[1])
    syncbn.freeze(net)
    assert not any(p.requires_grad for p in net.parameters())
    if between is not None:
        between(net[1])
    other = pickle.loads(pickle.dumps(net)) if between is None and before is not reparametrized else copy.deepcopy(net)
    for each in (net, other):
        syncbn.unfreeze(each.train())
        assert all(p.requires_grad for p in each.parameters())
        assert not any(isinstance(m, classes.Frozen) for m in each)


def test_a_lazy_layer_can_be_frozen() -> None:
    """A lazy layer among others is frozen and thawed with them."""
    net = syncbn.freeze(nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(3)))
    assert not any(p.requires_grad for p in net.parameters())
    net(torch.randn(4, 3, 5, 5))
    assert all(p.requires_grad for p in syncbn.unfreeze(net).parameters())


def test_what_is_derived_from_a_frozen_class_says_that_it_cannot_thaw() -> None:
    """A class of a user's above a frozen one is refused, not left frozen silently."""
    layer = type("Above", (type(syncbn.freeze(nn.BatchNorm2d(3))),), {})(3)
    with pytest.raises(TypeError, match="frozen last"):
        syncbn.unfreeze(nn.Sequential(layer))
