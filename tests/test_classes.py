"""The classes of synchronized layers: what tools that look by class, by name or by recipe see of them."""

import abc
import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from syncbn import classes
from tests.layers import PLAIN, SHAPES, Tagged
from tests.oracle import UNIT, error
from tests.ranks import RankPool

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


class Keyed(nn.BatchNorm2d):
    """Whose subclasses must say a keyword, and are registered."""

    registry: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, key: str, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        Keyed.registry[key] = cls


class Named(Keyed, key="named"):
    """A subclass of a class whose hook takes keywords."""


class Sealed(nn.BatchNorm2d):
    """A class that wants no subclass."""

    def __init_subclass__(cls) -> None:
        raise TypeError("Sealed is final")


class Listed(nn.BatchNorm2d):
    """A class that counts its subclasses."""

    known: ClassVar[list[type]] = []

    def __init_subclass__(cls, **keywords: Any) -> None:
        Listed.known.append(cls)


class Abstract(nn.BatchNorm2d, metaclass=abc.ABCMeta):
    """A class of a metaclass."""


class Slotted(nn.BatchNorm2d):
    """A class with slots of its own."""

    __slots__ = ("extra",)


SUBCLASSES = [Keyed, Named, Sealed, Listed, Abstract, Slotted, Tagged]


@pytest.mark.parametrize("cls", SUBCLASSES)
def test_every_kind_of_subclass_converts(cls: type) -> None:
    """Whatever a class asks of its subclasses, its layers convert, train, freeze, pickle and come back; it is told of
    none of ours.
    """
    layer = cls(3)
    registry, known = dict(Keyed.registry), list(Listed.known)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(layer))
    assert isinstance(layer, cls)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    net(torch.randn(4, 3, 5, 5)).sum().backward()
    syncbn.freeze(net)
    other = pickle.loads(pickle.dumps(net))
    assert type(other[0]) is type(layer)
    assert type(syncbn.revert_sync_batchnorm(syncbn.unfreeze(other))[0]) is cls
    assert type(syncbn.revert_sync_batchnorm(syncbn.unfreeze(net))[0]) is cls
    assert (Keyed.registry, Listed.known) == (registry, known)


class Meta(type):
    """A metaclass that must be given a keyword."""

    def __new__(mcs, name: str, bases: tuple[type, ...], own: dict[str, Any], *, key: str) -> type:
        return super().__new__(mcs, name, bases, own)

    def __init__(cls, name: str, bases: tuple[type, ...], own: dict[str, Any], *, key: str) -> None:
        super().__init__(name, bases, own)


class Unextendable(nn.BatchNorm2d, metaclass=Meta, key="a"):
    """A class that no class statement without that keyword extends."""


def test_a_class_that_cannot_be_extended_is_refused_in_words() -> None:
    """Where no class can be derived, conversion says so, by path and before anything has changed, or skips it."""
    net = nn.Sequential(nn.BatchNorm2d(3), Unextendable(3))
    with pytest.raises(TypeError, match=r"does not allow; got .*Unextendable at '1'.*'key'.*on_unknown='skip'"):
        syncbn.convert_sync_batchnorm(net)
    assert [type(m) for m in net] == [nn.BatchNorm2d, Unextendable]
    syncbn.convert_sync_batchnorm(net, on_unknown="skip")
    assert [type(m) for m in net] == [syncbn.SyncBatchNorm2d, Unextendable]
    assert syncbn.conversion_report(net)[1].why == "its class cannot be extended"


class ZeroInit(nn.BatchNorm2d):
    """A subclass that starts at 0, as residual blocks like."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.weight)


def test_how_a_subclass_starts_is_kept() -> None:
    """reset_parameters of a converted subclass is its own."""
    layer = syncbn.convert_sync_batchnorm(ZeroInit(3))
    nn.init.ones_(layer.weight)
    layer.reset_parameters()
    assert layer.weight.abs().sum() == 0


def whole(name: str) -> nn.Module:
    """A model that was saved whole."""
    made = {
        "converted": lambda: syncbn.convert_sync_batchnorm(nn.Sequential(*(PLAIN[rank](3) for rank in PLAIN))),
        "built": lambda: nn.Sequential(syncbn.SyncBatchNorm(3, activation="relu"), syncbn.SyncBatchNorm2d(3)),
        "frozen": lambda: syncbn.freeze(nn.Sequential(nn.BatchNorm2d(3), syncbn.SyncBatchNorm(3))),
        "frozen and converted": lambda: syncbn.freeze(syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)))),
        "a subclass": lambda: syncbn.convert_sync_batchnorm(nn.Sequential(Tagged(3, tag="t"))),
        "a frozen subclass": lambda: syncbn.freeze(nn.Sequential(Tagged(3), syncbn.convert_sync_batchnorm(Tagged(3)))),
        "reverted": lambda: syncbn.revert_sync_batchnorm(
            nn.Sequential(*(cls(3, activation="relu") for cls in (syncbn.SyncBatchNorm, *BUILT.values())))
        ),
        "reverted and frozen": lambda: syncbn.freeze(
            syncbn.revert_sync_batchnorm(nn.Sequential(syncbn.SyncBatchNorm2d(3, activation="relu")))
        ),
    }
    return made[name]()


WHOLE = ["converted", "built", "frozen", "frozen and converted", "a subclass", "a frozen subclass", "reverted"]
WHOLE += ["reverted and frozen"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_loads_with_weights_only(name: str) -> None:
    """What `safe_globals` names is enough for torch.load(weights_only=True) of layers saved whole, and needed."""
    net = whole(name)
    file = io.BytesIO()
    torch.save(net, file)
    given = [Tagged] if "subclass" in name else []
    with torch.serialization.safe_globals([nn.Sequential]):
        file.seek(0)
        with pytest.raises(pickle.UnpicklingError):
            torch.load(file, weights_only=True)
        with torch.serialization.safe_globals(syncbn.safe_globals(*given)):
            file.seek(0)
            other = torch.load(file, weights_only=True)
    assert [type(m) for m in other] == [type(m) for m in net]
    for mine, theirs in zip(other.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs)


def test_classes_of_one_name_are_told_apart() -> None:
    """Two libraries' classes that are called alike are both allowed."""
    other = type("Tagged", (nn.BatchNorm2d,), {})
    made = [entry[0] if isinstance(entry, tuple) else entry for entry in syncbn.safe_globals(Tagged, other)]
    names = [entry[1] for entry in syncbn.safe_globals(Tagged, other) if isinstance(entry, tuple)]
    assert len(set(names)) == len(names)
    assert {classes.sync_class(Tagged), classes.sync_class(other)} <= set(made)


def test_a_state_dict_needs_nothing() -> None:
    """weights_only=True loads a state_dict of converted and frozen layers as it is."""
    net, file = whole("frozen and converted"), io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    net.load_state_dict(torch.load(file, weights_only=True))


@pytest.mark.parametrize("cls", [syncbn.SyncBatchNorm, *BUILT.values()])
def test_a_users_subclass_of_ours_reverts_to_the_class_behind(cls: type) -> None:
    """A subclass without a forward of its own becomes torch's layer of its rank, or one for any."""
    layer = type("Mine", (cls,), {})(3)
    right = getattr(cls, "_under", classes.BatchNorm)
    assert type(syncbn.revert_sync_batchnorm(layer)) is right
    assert isinstance(layer, _BatchNorm)


def test_what_rebuild_makes_is_a_batch_norm() -> None:
    """What a pickle may ask of `rebuild` is a class of ours before a batch norm, nothing else."""
    for parts in [(nn.Linear, syncbn.SyncBatchNorm), (nn.BatchNorm2d, nn.Linear), (dict, classes.Frozen)]:
        with pytest.raises(TypeError, match="made of a batch norm"):
            classes.rebuild(*parts)
