"""Changing the class of a layer in place, so that nothing on the layer can get lost.

Parameters, buffers, hooks, attributes and mode stay where they are, and so does every reference to the layer: from a
parent, a second parent, an optimizer or a DDP bucket. What changes is which forward runs.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torch.nn.utils import parametrize

from syncbn import classes, torch_private, watched
from syncbn.module import SyncBatchNorm
from syncbn.torch_private import BatchNormBase

_FOREIGN = {"SyncBatchNorm", "NaiveSyncBatchNorm", "SyncBatchNormAct"}
_FOREIGN |= {f"SynchronizedBatchNorm{rank}d" for rank in (1, 2, 3)}
"""Names of synchronized batch norms in torch, apex, mmcv, detectron2, timm and older research code."""
_STRUCTURE = ("eps", "momentum", "weight", "bias", "running_mean", "running_var")


def change_class(layer: nn.Module, change: Callable[[type], type]) -> None:
    """layer.__class__ = change(its class); what torch put on top stays there, where torch expects to remove it."""
    watched.forget_bound(layer)
    object.__setattr__(layer, "__class__", _changed(type(layer), change))


def why_fixed(layer: nn.Module, change: Callable[[type], type]) -> str | None:
    """What Python or the class itself has against that change; nothing has been changed."""
    try:
        changed = _changed(type(layer), change)
        if not hasattr(layer, "__del__"):  # else the probe's would be run
            probe = object.__new__(type(layer))
            object.__setattr__(probe, "__class__", changed)
    except TypeError as error:
        return str(error)
    return None


def _changed(cls: Any, change: Callable[[type], type]) -> type:
    if not _is_wrapper(cls):
        return change(cls)
    *others, inner = cls.__bases__
    base = _changed(inner, change)
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__doc__")}
    if not others:  # torch's parametrizations give a class without one theirs
        own.pop("__deepcopy__", None)
        own |= {} if hasattr(base, "__deepcopy__") else {"__deepcopy__": _deepcopy}
    return type(cls.__name__.removesuffix(inner.__name__) + base.__name__, (*others, base), own)


def _is_wrapper(cls: Any) -> bool:
    """Whether torch put this class on top of a layer's: for a parametrization, or FSDP's or another parallelism."""
    refusal = vars(cls).get("__getstate__")  # to be pickled, which each parametrized class has
    is_parametrized = getattr(refusal, "__module__", None) == parametrize.__name__
    return is_parametrized or (len(cls.__bases__) == 2 and cls.__module__.startswith("torch.distributed."))


def _deepcopy(layer: Any, memo: dict[int, Any]) -> Any:
    """As torch's parametrizations copy, whose class refuses to be pickled."""
    new = memo[id(layer)] = object.__new__(type(layer))
    new.__dict__.update(copy.deepcopy(layer.__dict__, memo))
    return new


class State(NamedTuple):
    """A layer's class, also without what torch put on top, and its attributes at a time."""

    cls: type
    plain: Any
    attributes: dict[str, Any]

    @classmethod
    def of(cls, layer: nn.Module) -> "State":
        return cls(type(layer), plain_type(layer), dict(layer.__dict__))


def restore(layer: nn.Module, before: State, then: State) -> None:
    """Undo a change of class that made `then` of `before`; what was done to the layer since stays."""

    def back(now: Any) -> Any:
        if now is then.plain:
            return before.plain
        if classes.thawed(now) is then.plain:  # frozen since
            return classes.frozen(before.plain)
        if classes.thawed(then.plain) is now:  # thawed since
            return classes.thawed(before.plain)
        return classes.sync_class(now)  # a lazy layer that was used, or one that was synchronized

    if type(layer) is then.cls:
        object.__setattr__(layer, "__class__", before.cls)
    else:
        change_class(layer, back)
    own = layer.__dict__
    for name in before.attributes.keys() | then.attributes.keys():
        was, became = (state.attributes.get(name, _MISSING) for state in (before, then))
        if was is not became and own.get(name, _MISSING) is became:
            own.pop(name, None) if was is _MISSING else own.update({name: was})


_MISSING = object()


def plain_type(layer: nn.Module) -> Any:
    """layer's class without what torch put on top."""
    cls: Any = type(layer)
    while _is_wrapper(cls):
        cls = cls.__bases__[-1]
    return cls


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put new wherever old stands below root; the root after that."""
    if old is not new:
        for parent in list(root.modules()):
            children = torch_private.own_parts(parent)[2]
            for name in [name for name, child in children.items() if child is old]:
                children[name] = new
    return new if old is root else root


def is_foreign_sync(layer: nn.Module) -> bool:
    """Whether this is torch's or another library's synchronized batch norm, by class, or by name and structure."""
    cls = classes.thawed(plain_type(layer))
    is_one = is_foreign_by_name(cls) or issubclass(cls, nn.SyncBatchNorm)
    return is_one and all(hasattr(layer, name) for name in _STRUCTURE)


def is_foreign_by_name(cls: type) -> bool:
    """Whether a class is called as a synchronized batch norm in another library is."""
    return cls.__name__ in _FOREIGN and not issubclass(cls, SyncBatchNorm) and cls is not nn.SyncBatchNorm


def was_built(layer: nn.Module) -> bool:
    """Whether the constructor of our layers has run, which gives both; conversion leaves them to the class."""
    return {"activation", "process_group"} <= vars(layer).keys()


def activation_of(layer: nn.Module) -> str | None:
    """What a synchronized layer applies, ours or apex's."""
    activation: str | None = "relu" if getattr(layer, "fuse_relu", False) else getattr(layer, "activation", None)
    return activation


def channels_of(layer: Any) -> int | None:
    """num_features, as the layer or its tensors say; None if nothing does."""
    if isinstance(layer, BatchNormBase) and "num_features" in layer.__dict__:
        return layer.num_features
    return next((t.numel() for t in (layer.running_mean, layer.weight, layer.bias) if t is not None), None)


def make_plain(layer: Any) -> None:
    """Give a synchronized layer its ordinary class, in place."""
    activation = activation_of(layer)
    change_class(layer, functools.partial(classes.plain_class, activated=activation is not None))
    if activation is not None:
        layer.activation = activation
    elif was_built(layer):
        del layer.activation
    for ours in ("process_group", "_label"):
        layer.__dict__.pop(ours, None)
    layer.num_features = channels_of(layer)
    layer.__dict__.setdefault("affine", layer.weight is not None)
    layer.__dict__.setdefault("track_running_stats", layer.running_mean is not None)
    if "num_batches_tracked" not in torch_private.own_parts(layer)[1]:
        layer.register_buffer("num_batches_tracked", None)
