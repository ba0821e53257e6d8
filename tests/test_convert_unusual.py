"""Layers of unusual classes and state: they convert, freeze and come back whole, or are refused before any change."""

import abc
import collections.abc
import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import syncbn
from tests.support.layers import Tagged, model, reparametrized
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool
from tests.test_convert_patched_calls import assert_refused

T = TypeVar("T")
X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(5))


def with_an_activation() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.activation = "relu"
    return layer


def with_an_activation_module() -> nn.Module:
    layer = nn.BatchNorm2d(3)
    layer.activation = nn.ReLU()
    return layer


class Abstract(abc.ABC, nn.BatchNorm2d):
    """A layer whose first base has no dictionary, so that Python lets no other class take its place."""


class Typed(Generic[T], nn.BatchNorm2d):
    """The same of a generic class."""


class Sized(collections.abc.Sized, nn.BatchNorm2d):
    """The same of a protocol."""

    def __len__(self) -> int:
        return 1


class Reduced(nn.BatchNorm2d):
    """A layer that is pickled by a recipe of its own."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Reduced, (3,)


class Made(nn.BatchNorm2d):
    """A layer that is made of an argument."""

    def __new__(cls, channels: int) -> "Made":
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[int]:
        return (3,)


class Computed(nn.BatchNorm2d):
    """A layer whose statistic is a property of the class."""

    @property
    def running_var(self) -> Tensor:
        if "running_var" not in self._buffers:
            raise AttributeError
        return self._buffers["running_var"].clamp_min(0.5)

    @running_var.setter
    def running_var(self, value: Tensor) -> None:
        self._buffers["running_var"] = value


class Final(type):
    """A metaclass that forbids subclasses."""

    def __new__(mcs, name: str, bases: tuple[type, ...], own: dict[str, Any]) -> type:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("it is final")
        return super().__new__(mcs, name, bases, own)


class Unique(nn.BatchNorm2d, metaclass=Final):
    """A layer of it."""


class MySync(nn.SyncBatchNorm):
    """A subclass of torch's synchronized layer."""


Case = tuple[Callable[[], nn.Module], str]
REFUSED: dict[str, Case] = {
    "an activation": (with_an_activation, "applies its `activation`.*Rename"),
    "an activation module": (with_an_activation_module, "applies its `activation`"),
    "abstract": (lambda: Abstract(3), "does not allow.*layout"),
    "generic": (lambda: Typed(3), "does not allow.*layout"),
    "a protocol": (lambda: Sized(3), "does not allow.*layout"),
    "reduced": (lambda: Reduced(3), "its __reduce__ cannot follow"),
    "made of an argument": (lambda: Made(3), "its __new__ cannot follow"),
    "computed": (lambda: Computed(3), "reads the running_var that is stored.*parametrize"),
    "final": (lambda: Unique(3), r"does not allow \(it is final\)"),
    "a subclass of nn.SyncBatchNorm": (lambda: MySync(3), "would not stay one"),
}
CLASS_BOUND = ("abstract", "generic", "a protocol", "reduced", "made of an argument", "final")
"""Of those, what concerns freezing too, which leaves the forward as it is."""


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_lost_is_refused_first(name: str) -> None:
    """Conversion refuses by path before any change, or skips and reports."""
    make, text = REFUSED[name]
    net = nn.Sequential(nn.BatchNorm2d(3), make())
    assert_refused(syncbn.convert_sync_batchnorm, net, rf"{text}.*|.*at '1'.*on_unknown='skip'")
    with pytest.raises(TypeError, match=text):
        syncbn.convert_sync_batchnorm(net)
    syncbn.convert_sync_batchnorm(net, on_unknown="skip")
    assert [isinstance(m, syncbn.SyncBatchNorm) for m in net] == [True, False]
    assert syncbn.conversion_report(net)[1].why.startswith("it")


@pytest.mark.parametrize("name", REFUSED)
def test_freezing_refuses_what_a_class_forbids(name: str) -> None:
    """freeze refuses, before any change, a class that cannot be extended, and freezes all others, which thaw."""
    make, text = REFUSED[name]
    net = nn.Sequential(nn.BatchNorm2d(3), make())
    if name in CLASS_BOUND:
        assert_refused(syncbn.freeze, net, rf"{text}.*")
        assert net[0].weight.requires_grad
        return
    cls = type(net[1])
    right = copy.deepcopy(net).eval()(X) if cls is not MySync else None
    assert right is None or torch.equal(syncbn.freeze(net).train()(X), right)
    syncbn.unfreeze(net)
    assert type(net[1]) is cls


class Locked(nn.BatchNorm2d):
    """A layer that lets no attribute be set from outside, its class included."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "__class__":
            raise RuntimeError("locked")
        super().__setattr__(name, value)


class Static(nn.BatchNorm2d):
    """A layer whose check is a static method."""

    @staticmethod
    def _check_input_dim(input: Tensor) -> None:
        if input.dim() != 4:
            raise ValueError("static")


class Described(nn.BatchNorm2d):
    """A layer that describes itself."""

    def extra_repr(self) -> str:
        return "described"


@pytest.mark.parametrize("cls", [Locked, Static, Described, Tagged])
def test_a_class_with_ways_of_its_own_keeps_them(cls: type) -> None:
    """What a class says of its attributes, its input and itself holds for a synchronized and a frozen layer."""
    net = nn.Sequential(cls(3))
    right = copy.deepcopy(net)(X)
    syncbn.convert_sync_batchnorm(net)
    assert error(net(X), right.double()) <= UNIT[torch.float32]
    with pytest.raises(ValueError, match="static" if cls is Static else "expected 4D"):
        net(X[0])
    assert cls is not Described or repr(net[0]).endswith("(described)")
    syncbn.freeze(net)(X)
    syncbn.revert_sync_batchnorm(syncbn.unfreeze(net))
    assert type(net[0]) is cls


class Guarded(nn.BatchNorm2d):
    """A layer with a lock, which its state leaves out and finds anew."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.lock, self.restored = threading.Lock(), 0

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.lock, self.restored = threading.Lock(), self.restored + 1


class Copied(nn.BatchNorm2d):
    """A layer that copies itself."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "Copied":
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new.copied = True
        return new


def _copies() -> None:
    group = syncbn.new_group(1)
    for layer in (Guarded(3), syncbn.convert_sync_batchnorm(Guarded(3), group), syncbn.freeze(Guarded(3))):
        other = copy.deepcopy(layer)
        assert (type(other), other.restored) == (type(layer), 1)
        assert other.lock is not layer.lock
        assert pickle.loads(pickle.dumps(layer)).restored == 1
        assert not isinstance(layer, syncbn.SyncBatchNorm) or other.process_group is group
    for layer in (Copied(3), syncbn.convert_sync_batchnorm(Copied(3)), syncbn.freeze(Copied(3))):
        assert copy.deepcopy(layer).copied


def test_a_class_that_copies_and_pickles_itself_does_so(ranks: RankPool) -> None:
    """__getstate__, __setstate__ and __deepcopy__ of a class are used for its converted and frozen layers too."""
    ranks.run(1, _copies)


CHAINS: list[tuple[Callable[[nn.Module], nn.Module], ...]] = [
    (),
    (syncbn.freeze,),
    (syncbn.freeze, syncbn.unfreeze),
    (syncbn.convert_sync_batchnorm,),
    (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm),
    (syncbn.convert_sync_batchnorm, syncbn.freeze),
]


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: " ".join(f.__name__ for f in chain))
def test_a_parametrized_layer_can_always_be_copied(chain: tuple[Callable[[nn.Module], nn.Module], ...]) -> None:
    """deepcopy of a parametrized layer works after every change of its class, as before."""
    layer = nn.BatchNorm2d(3)
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    for change in chain:
        change(layer)
    other = copy.deepcopy(layer)
    assert type(other) is type(layer)
    assert torch.equal(other.eval()(X), layer.eval()(X))


def _torchs_and_ours(name: str) -> None:
    made: dict[str, Callable[[], nn.Module]] = {
        "frozen": lambda: syncbn.unfreeze(
            syncbn.revert_sync_batchnorm(syncbn.freeze(nn.Sequential(nn.SyncBatchNorm(3))))
        ),
        "parametrized": lambda: syncbn.revert_sync_batchnorm(nn.Sequential(parametrized(nn.SyncBatchNorm(3)))),
        "a subclass": lambda: syncbn.revert_sync_batchnorm(nn.Sequential(MySync(3))),
        "itself": lambda: syncbn.revert_sync_batchnorm(nn.Sequential(nn.SyncBatchNorm(3))),
    }
    net = made[name]().train()
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in net.modules())
    right = nn.BatchNorm2d(3)
    assert torch.equal(net(X), right(X))


def parametrized(layer: nn.Module) -> nn.Module:
    reparametrized(layer)
    return layer


def frozen(layer: nn.Module) -> nn.Module:
    return syncbn.freeze(layer)


@pytest.mark.parametrize("name", ["frozen", "parametrized", "a subclass", "itself"])
def test_no_layer_of_torchs_is_left_to_communicate(ranks: RankPool, name: str) -> None:
    """nn.SyncBatchNorm reverts whether it is frozen, parametrized or of a subclass, and runs on two CPU ranks."""
    ranks.run(2, _torchs_and_ours, name)


@pytest.mark.parametrize("own", ["forward", "__call__", "_call_impl", "_check_input_dim", "train", "_normalize"])
@pytest.mark.parametrize("base", [syncbn.SyncBatchNorm, syncbn.SyncBatchNorm2d])
@pytest.mark.parametrize("frozen", [False, True])
def test_a_users_subclass_is_not_flattened(own: str, base: type, frozen: bool) -> None:
    """Reverting refuses a subclass of ours that has a part of the call of its own, frozen too."""
    layer = type("Mine", (base,), {own: lambda self, *args: getattr(base, own)(self, *args)})(3)
    net = nn.Sequential(syncbn.freeze(layer) if frozen else layer)
    assert_refused(syncbn.revert_sync_batchnorm, net, rf"a {own} of its own")


def test_a_patch_of_our_class_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverting refuses while another forward stands on our class."""
    net = syncbn.convert_sync_batchnorm(model())
    monkeypatch.setattr(syncbn.SyncBatchNorm, "forward", lambda self, x: x)
    assert_refused(syncbn.revert_sync_batchnorm, net, "a forward of its own")
