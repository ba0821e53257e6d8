"""The classes of synchronized layers: what tools that look by class, by name or by recipe see of them."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn import classes
from tests.support.layers import PLAIN, SHAPES
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool

BUILT = {1: syncbn.SyncBatchNorm1d, 2: syncbn.SyncBatchNorm2d, 3: syncbn.SyncBatchNorm3d}
of_a_rank = pytest.mark.parametrize("rank", [1, 2, 3])


@of_a_rank
def test_the_class_of_a_rank_is_what_conversion_gives(rank: int) -> None:
    """SyncBatchNorm1d, 2d and 3d are what conversion makes of BatchNorm1d, 2d and 3d, and are both."""
    built = BUILT[rank](3)
    assert isinstance(built, PLAIN[rank])
    assert isinstance(built, syncbn.SyncBatchNorm)
    assert type(syncbn.convert_sync_batchnorm(PLAIN[rank](3))) is BUILT[rank]
    assert not any(isinstance(built, PLAIN[other]) for other in PLAIN if other != rank)


@of_a_rank
def test_it_checks_its_input_as_torchs(rank: int) -> None:
    """An input of another rank is torch's error, before anything moves; one of its own runs."""
    layer = BUILT[rank](3)
    for other, shape in SHAPES.items():
        if other == rank:
            assert layer(torch.randn(shape)).shape == shape
            continue
        with pytest.raises(ValueError, match="expected"):
            layer(torch.randn(shape))
    assert layer.num_batches_tracked == 1


@of_a_rank
def test_its_arguments_are_those_of_the_layer_of_any_rank(rank: int) -> None:
    """All of SyncBatchNorm's arguments are taken, and those that torch's layer has mean what they mean there."""
    layer = BUILT[rank](3, 1e-3, 0.3, True, True, None, "cpu", torch.float64, bias=False, activation="relu")
    assert (layer.eps, layer.momentum, layer.bias, layer.activation) == (1e-3, 0.3, None, "relu")
    x = torch.randn(SHAPES[rank]).double()
    right = PLAIN[rank](3, 1e-3, 0.3).double()
    assert error(layer(x), right(x).relu().detach()) <= UNIT[torch.float64]
    assert layer.state_dict().keys() == right.state_dict().keys() - {"bias"}


@of_a_rank
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_it_pickles_by_its_name(rank: int, how: Callable[[nn.Module], nn.Module]) -> None:
    """Built or converted, a copy is of the same class, which a pickle holds by its public name."""
    for layer in (BUILT[rank](3), syncbn.convert_sync_batchnorm(PLAIN[rank](3))):
        assert type(how(layer)) is BUILT[rank]
        assert f"SyncBatchNorm{rank}d".encode() in pickle.dumps(layer)
        assert b"syncbn.classes" not in pickle.dumps(layer)


@of_a_rank
@pytest.mark.parametrize("activation", [None, "relu"])
def test_reverted_it_is_torchs(rank: int, activation: str | None) -> None:
    """Reverting a built layer gives torch's of that rank, with its activation if it has one, and conversion it back."""
    layer = BUILT[rank](3, activation=activation)
    layer(torch.randn(SHAPES[rank]))
    x = torch.randn(SHAPES[rank])
    right = layer.eval()(x)
    syncbn.revert_sync_batchnorm(layer)
    assert isinstance(layer, PLAIN[rank])
    assert not isinstance(layer, syncbn.SyncBatchNorm)
    assert (type(layer) is PLAIN[rank]) == (activation is None)
    assert torch.equal(layer(x), right)
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(SHAPES[rank % 3 + 1]))
    again = pickle.loads(pickle.dumps(syncbn.convert_sync_batchnorm(pickle.loads(pickle.dumps(layer)))))
    assert type(again) is BUILT[rank]
    assert torch.equal(again(x), right)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_a_layer_of_any_rank_comes_back(activation: str | None) -> None:
    """What was built for any rank can be reverted and converted again."""
    layer = syncbn.revert_sync_batchnorm(syncbn.SyncBatchNorm(3, activation=activation))
    assert type(layer) is classes.BatchNorm
    assert type(syncbn.convert_sync_batchnorm(layer)) is syncbn.SyncBatchNorm
    assert layer.activation == activation


def test_the_report_tells_built_from_converted() -> None:
    """The same class is "synchronized" where it was built and "converted" where it was converted."""
    net = nn.Sequential(syncbn.SyncBatchNorm2d(3), syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)))
    rows = syncbn.conversion_report(pickle.loads(pickle.dumps(net)))
    assert [(row.before, row.status) for row in rows] == [
        ("BatchNorm2d", "synchronized"),
        ("BatchNorm2d", "converted"),
    ]


def decay_groups(model: nn.Module) -> set[str]:
    """The parameters that a recipe leaves without weight decay: those of norms, by torch's classes."""
    norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm)
    return {f"{name}.{p}" for name, m in model.named_modules() if isinstance(m, norms) for p, _ in m.named_parameters()}


def frozen(model: nn.Module) -> set[str]:
    """What a freezer by class freezes."""
    return {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.train(False).training}


def reset(model: nn.Module) -> set[str]:
    """The norms whose statistics precise-BN resets: fvcore takes these classes, in training."""
    found = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    return {name for name, m in model.named_modules() if isinstance(m, found) and m.training}


def counted(model: nn.Module) -> set[str]:
    """The modules that a counter by exact or base class finds a rule for."""
    rules = {nn.BatchNorm2d: "2 an element", nn.Conv2d: "a product"}
    return {name for name, m in model.named_modules() if any(cls in rules for cls in type(m).__mro__)}


@pytest.mark.parametrize("tool", [decay_groups, frozen, reset, counted], ids=lambda f: f.__name__)
def test_tools_that_look_by_class_find_it(tool: Callable[[nn.Module], set[str]]) -> None:
    """A model built with SyncBatchNorm2d is to such a tool what one with BatchNorm2d is, and so is a converted one."""

    def build(norm: Callable[[int], nn.Module]) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 1), norm(4), nn.Sequential(norm(4), nn.Conv2d(4, 2, 1)))

    right = tool(build(nn.BatchNorm2d))
    assert right
    assert tool(build(syncbn.SyncBatchNorm2d)) == right
    assert tool(syncbn.convert_sync_batchnorm(build(nn.BatchNorm2d))) == right


def get_norm(norm: str | Callable[[int], nn.Module], channels: int) -> nn.Module:
    """A NORM factory as detectron2's: a name or a callable."""
    return {"BN": nn.BatchNorm2d, "GN": lambda channels: nn.GroupNorm(2, channels)}.get(norm, norm)(channels)


def _from_a_factory() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), get_norm(syncbn.SyncBatchNorm2d, 4)).double()
    rank = torch.distributed.get_rank()
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    right = nn.Sequential(copy.deepcopy(net[0]), nn.BatchNorm2d(4).double())
    right[0].load_state_dict(net[0].state_dict())
    mine = slice(2 * rank, 2 * rank + 2)
    torch.distributed.broadcast(net[0].weight.data, 0)
    torch.distributed.broadcast(net[0].bias.data, 0)
    right[0].load_state_dict(net[0].state_dict())
    assert error(net(x[mine]), right(x)[mine].detach()) <= UNIT[torch.float64]


def test_a_factory_takes_it(ranks: RankPool) -> None:
    """Given to a NORM factory as a callable, it is synchronized on two ranks."""
    ranks.run(2, _from_a_factory)


@pytest.mark.parametrize("cls", [syncbn.SyncBatchNorm, *BUILT.values()])
def test_a_users_subclass_of_ours_reverts_to_the_class_behind(cls: type) -> None:
    """A subclass without a forward of its own becomes torch's layer of its rank, or one for any."""
    layer = type("Mine", (cls,), {})(3)
    right = getattr(cls, "_under", classes.BatchNorm)
    assert type(syncbn.revert_sync_batchnorm(layer)) is right
    assert isinstance(layer, _BatchNorm)
