"""The classes of swapped layers: one of these before the class that a layer had, so that it still is one of that."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from syncbn import torch_private, watched
from syncbn.formulas import LEAKY_SLOPE, finish
from syncbn.module import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from syncbn.names import Label
from syncbn.symbolic import Leaf
from syncbn.torch_private import BatchNormBase


class BatchNorm(Leaf, BatchNormBase):
    """Ordinary batch norm for (N, C, *S) inputs of any rank: what a synchronized layer of unknown origin becomes.

    It keeps the fused activation and takes the residual; a mask only in eval, where it changes no statistics.
    """

    activation: str | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self._normalize(input, residual, mask, self.activation)

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> Tensor:
        """activation(bn(input) + residual)"""
        if mask is not None and self.training:
            raise ValueError(
                "An ordinary batch norm cannot leave positions out of its statistics; got a mask in training. "
                "Train with syncbn.SyncBatchNorm, which runs alone and on CPU too."
            )
        return finish(super().forward(input), residual, activation, mask)


class WithDropAndAct:
    """timm's normalization layers with an activation: act(drop(bn(x))), fused where there is nothing to drop."""

    def forward(self, x: Tensor) -> Tensor:
        drop, act = (getattr(self, name, None) for name in ("drop", "act"))
        fused = _fusible(drop, act)
        y: Tensor = self._normalize(x, None, None, fused)  # type: ignore[attr-defined]  # of the norm behind
        if fused is None:
            y = y if drop is None else drop(y)
            y = y if act is None else act(y)
        return y


class SyncBatchNormAct(WithDropAndAct, SyncBatchNorm):  # type: ignore[misc]  # timm's forward takes the input alone
    """act(drop(bn(x))) with the statistics of all ranks."""


class BatchNormAct(WithDropAndAct, BatchNorm):  # type: ignore[misc]  # the same
    """act(drop(bn(x))) for inputs of any rank."""


class Frozen:
    """Always in eval: running statistics, no collective; its children follow train()."""

    def train(self, mode: bool = True) -> "Frozen":
        self.training = False
        for child in self.children():  # type: ignore[attr-defined]  # of the module behind
            child.train(mode)
        return self


_FUSED: dict[Any, str] = {nn.ReLU: "relu", nn.SiLU: "silu", nn.LeakyReLU: "leaky_relu"}


def _runs(cls: Any) -> tuple[Any, ...]:
    """What a call of an activation or of Identity runs, unless somebody has put another in its place."""
    name = _FUSED.get(cls, "")
    return cls.__call__, cls._call_impl, cls.forward, getattr(F, name, None), getattr(torch, name, None)


_BY_TORCH = {cls: _runs(cls) for cls in (*_FUSED, nn.Identity)}


def _fusible(drop: nn.Module | None, act: nn.Module | None) -> str | None:
    """The name of act if it may run inside the layer: exactly that function, and nobody could notice."""
    if torch.compiler.is_compiling():  # the compiler fuses it
        return None
    cls: Any = type(act)
    if cls not in _FUSED or type(drop) not in (nn.Identity, type(None)):
        return None
    if cls is nn.LeakyReLU and act.negative_slope != LEAKY_SLOPE:  # type: ignore[union-attr]  # that is its class
        return None
    if _runs(cls) != _BY_TORCH[cls] or _runs(nn.Identity) != _BY_TORCH[nn.Identity]:
        return None
    is_noticed = torch_private.is_everything_heard() or watched.is_watched(act) or watched.is_watched(drop)
    return None if is_noticed else _FUSED[cls]


class _Derived:
    """Of every derived class, whose two parts are its `_mixin` and its `_under`."""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """The hook of the class behind is not told: this is no new kind of layer, and its keywords are not known."""
        if "_under" not in vars(cls):
            super().__init_subclass__(**keywords)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle by recipe: the class is made at run time and cannot be looked up by name."""
        mixins, cls = [], type(self)
        while "_under" in vars(cls):
            mixins.append(cls._mixin)  # type: ignore[attr-defined]
            cls = cls._under  # type: ignore[attr-defined]
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__  # all have it from 3.11 on
        return rebuild, (cls, *reversed(mixins)), state


_NAMES = {SyncBatchNorm: "Sync", SyncBatchNormAct: "Sync", BatchNorm: "Activated", Frozen: "Frozen"}
_ACTIVATED: tuple[type, ...] = (SyncBatchNormAct, BatchNormAct)
_BUILT: tuple[Any, ...] = (SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d)
_derived: dict[tuple[type, type], type] = {(SyncBatchNorm, cls._under): cls for cls in _BUILT}


def derive(mixin: type, under: Any) -> type:
    """A class that is `under` with `mixin`'s methods before its own; made once, so that it can be compared.

    Tools tell by the module of a class what they know of it; a frozen layer is to them what it was.
    """
    if (mixin, under) not in _derived:
        own: dict[str, Any] = {"__doc__": mixin.__doc__, "_mixin": mixin, "_under": under}
        own |= {"__module__": under.__module__ if mixin is Frozen else __name__}
        if mixin is not Frozen:
            own |= {name: inspect.getattr_static(under, name) for name in _KEPT if _has_own(under, name)}
        if getattr(under, "cls_to_become", None) is not None:  # a lazy layer, on first use
            own["cls_to_become"] = derive(mixin, under.cls_to_become)
        bases = (mixin, under) if issubclass(under, _Derived) else (_Derived, mixin, under)
        _derived[mixin, under] = type(_NAMES[mixin] + under.__name__, bases, own)
    return _derived[mixin, under]


_KEPT = ("_check_input_dim", "reset_parameters", "extra_repr")
"""Methods of a mixin that give way to those of the class behind it, which say how its layers differ from others."""
_STATE = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
_RECIPES = ("__reduce__", "__reduce_ex__", "__getnewargs__", "__getnewargs_ex__")


def _has_own(cls: type, name: str) -> bool:
    """Whether a class has this otherwise than torch's batch norms do."""
    return inspect.getattr_static(cls, name, None) is not inspect.getattr_static(BatchNormBase, name, None)


def own_recipe(cls: type) -> str | None:
    """What of a class makes or pickles its objects in a way that a class derived from it cannot follow."""
    if issubclass(cls, _Derived):
        return None
    if not _is_made_of_nothing(cls):
        return "__new__"
    return next((name for name in _RECIPES if _has_own(cls, name)), None)


def _is_made_of_nothing(cls: Any) -> bool:
    """Whether __new__ needs no more than the class."""
    try:
        inspect.signature(cls.__new__).bind(cls)
    except (TypeError, ValueError):  # it takes more, or does not say what
        return False
    return True


def own_state(cls: type) -> str | None:
    """A parameter or buffer that the class computes; the layers here read what is stored."""
    return next((name for name in _STATE if _has_own(cls, name)), None)


def rebuild(cls: Any, *mixins: type) -> Any:
    """An empty object of the class that `derive` makes of these, for what was pickled."""
    if not (isinstance(cls, type) and issubclass(cls, BatchNormBase) and _NAMES.keys() >= set(mixins)):
        raise TypeError(f"A layer is made of a batch norm and classes of syncbn; got {cls} and {mixins}.")
    for mixin in mixins:
        cls = derive(mixin, cls)
    return cls.__new__(cls)


def can_sync(cls: Any) -> bool:
    """Whether a layer of this class does nothing but batch norm, or what WithDropAndAct does."""
    if _is_timm_act(cls):
        return True
    ours = (nn.SyncBatchNorm,) if cls is nn.SyncBatchNorm else (BatchNormBase, BatchNorm, WithDropAndAct)
    return issubclass(cls, BatchNormBase) and forwards_owner(cls) in ours and is_forward_unpatched(cls)


def sync_class(cls: Any) -> type:
    """The synchronized class for a class that can be; not a subclass of nn.SyncBatchNorm, which DDP refuses on CPU."""
    if vars(cls).get("_mixin") is Frozen:
        return derive(Frozen, sync_class(cls._under))
    if issubclass(cls, SyncBatchNorm):
        return cls  # type: ignore[no-any-return]  # a class
    if issubclass(cls, BatchNorm):
        if hasattr(cls, "_under"):
            return sync_class(cls._under)
        return SyncBatchNormAct if issubclass(cls, BatchNormAct) else SyncBatchNorm
    ours = SyncBatchNormAct if _is_timm_act(cls) else SyncBatchNorm
    return ours if issubclass(cls, nn.SyncBatchNorm) else derive(ours, cls)


def plain_class(cls: Any, activated: bool) -> type:
    """The ordinary class for a synchronized one, with a place for an activation or without."""
    if vars(cls).get("_mixin") is Frozen:  # the layer behind changes
        return derive(Frozen, plain_class(cls._under, activated))
    if not (issubclass(cls, SyncBatchNorm) and hasattr(cls, "_under")):
        return BatchNormAct if issubclass(cls, SyncBatchNormAct) or _is_timm_act(cls) else BatchNorm
    under: type = cls._under
    return derive(BatchNorm, under) if activated and cls._mixin is SyncBatchNorm else under


def frozen(cls: Any) -> type:
    """The class with Frozen before it."""
    return derive(Frozen, cls)


def thawed(cls: Any) -> Any:
    """The class without Frozen before it."""
    return cls._under if vars(cls).get("_mixin") is Frozen else cls


def forwards_owner(cls: type) -> type:
    """The class that a layer of this class has its forward from."""
    return next((c for c in cls.__mro__ if "forward" in vars(c)), cls)


def _is_timm_act(cls: type) -> bool:
    """timm's BatchNormAct2d and SyncBatchNormAct, and subclasses with their forward."""
    owner = forwards_owner(cls)
    is_named = owner.__module__.startswith("timm.") and owner.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")
    return is_named and is_forward_unpatched(cls)


def is_forward_unpatched(cls: type) -> bool:
    """Whether the forward was written where its class was, and not put there from elsewhere."""
    owner = forwards_owner(cls)
    return getattr(vars(owner)["forward"], "__globals__", {}).get("__name__") == owner.__module__


def safe_globals(*classes: type) -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What ``torch.load(weights_only=True)`` has to be allowed of ours, to load a model that was saved whole.

    It goes to ``torch.serialization.add_safe_globals``, or to the context manager ``safe_globals`` beside it, together
    with the other classes of the model, which ``torch.serialization.get_unsafe_globals_in_checkpoint`` lists.
    A state_dict needs none of it.

    Args:
        classes: batch norm classes that the model's layers were converted from and that are not torch's, such as a
            subclass of nn.BatchNorm2d or timm's BatchNormAct2d; they are allowed, too.

    Example::

        >>> torch.serialization.add_safe_globals([*syncbn.safe_globals(), nn.Sequential, nn.Conv2d])
        >>> model = torch.load("model.pt", weights_only=True)
    """
    ranks = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    lazy = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
    ordinary: list[Any] = [*ranks, *lazy, *(cls for cls in classes if not issubclass(cls, SyncBatchNorm))]
    made: set[Any] = {sync_class(cls) for cls in ordinary}
    made |= {plain_class(cls, activated=True) for cls in made}
    made |= {frozen(cls) for cls in (*ordinary, *classes, *made, SyncBatchNorm, BatchNorm, *_ACTIVATED)}
    # each by a name of its own: classes of two libraries may be called alike
    named = [(cls, f"{cls.__name__} {id(cls)}") for cls in made]
    return [rebuild, Label, Frozen, SyncBatchNorm, BatchNorm, *_ACTIVATED, *_BUILT, *ordinary, *classes, *named]
