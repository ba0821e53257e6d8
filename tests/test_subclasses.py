"""Subclasses of torch's batch norms: whatever they ask of theirs, their layers convert; and models saved whole load."""

import abc
import io
import pickle
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import syncbn
from syncbn import classes
from tests.support.layers import PLAIN, Tagged

BUILT = (syncbn.SyncBatchNorm1d, syncbn.SyncBatchNorm2d, syncbn.SyncBatchNorm3d)


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


class New(nn.BatchNorm2d):
    """A class with a __new__ that needs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "New":
        return super().__new__(cls)


class Closing(nn.BatchNorm2d):
    """A class whose objects have something to close."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.closes = 1

    def __del__(self) -> None:
        self.closes -= 1  # an object that was not made by __init__ would raise here


class ParametrizedBatchNorm2d(nn.BatchNorm2d):
    """A user's class that is called as torch calls those of parametrized layers."""


SUBCLASSES = [ParametrizedBatchNorm2d, Keyed, Named, Sealed, Listed, Abstract, Slotted, Tagged, New, Closing]


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
    with pytest.raises(TypeError, match=r"does not allow .*'key'.*; got .*Unextendable at '1'.*on_unknown='skip'"):
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


class Mine(syncbn.SyncBatchNorm2d):
    """A user's subclass of ours."""


def activated(net: nn.Module) -> nn.Module:
    """Converted, with an activation given afterwards."""
    syncbn.convert_sync_batchnorm(net)[0].activation = "relu"
    return net


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
            nn.Sequential(*(cls(3, activation="relu") for cls in (syncbn.SyncBatchNorm, *BUILT)))
        ),
        "an activated subclass": lambda: syncbn.revert_sync_batchnorm(activated(nn.Sequential(Tagged(3)))),
        "a frozen user's subclass": lambda: syncbn.freeze(nn.Sequential(Mine(3))),
        "torch's, frozen": lambda: syncbn.freeze(nn.Sequential(nn.SyncBatchNorm(3))),
        "reverted and frozen": lambda: syncbn.freeze(
            syncbn.revert_sync_batchnorm(nn.Sequential(syncbn.SyncBatchNorm2d(3, activation="relu")))
        ),
    }
    return made[name]()


WHOLE = ["converted", "built", "frozen", "frozen and converted", "a subclass", "a frozen subclass", "reverted"]
WHOLE += ["reverted and frozen", "an activated subclass", "a frozen user's subclass", "torch's, frozen"]


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_model_loads_with_weights_only(name: str) -> None:
    """What `safe_globals` names is enough for torch.load(weights_only=True) of layers saved whole, and needed."""
    net = whole(name)
    file = io.BytesIO()
    torch.save(net, file)
    given = [Mine] if "user's" in name else [Tagged] if "subclass" in name else []
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


def test_what_rebuild_makes_is_a_batch_norm() -> None:
    """What a pickle may ask of `rebuild` is a class of ours before a batch norm, nothing else."""
    for parts in [(nn.Linear, syncbn.SyncBatchNorm), (nn.BatchNorm2d, nn.Linear), (dict, classes.Frozen)]:
        with pytest.raises(TypeError, match="made of a batch norm"):
            classes.rebuild(*parts)
