"""Changing the class of a layer in place, so that nothing on the layer can get lost.

Parameters, buffers, hooks, attributes and mode stay where they are, and so does every reference to the layer: from a
parent, a second parent, an optimizer or a DDP bucket. What changes is which forward runs.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from syncbn import classes, watched
from syncbn.module import SyncBatchNorm

_FOREIGN = {"SyncBatchNorm", "NaiveSyncBatchNorm", "SyncBatchNormAct"}
_FOREIGN |= {f"SynchronizedBatchNorm{rank}d" for rank in (1, 2, 3)}
"""Names of synchronized batch norms in torch, apex, mmcv, detectron2, timm and older research code."""
_STRUCTURE = ("eps", "momentum", "weight", "bias", "running_mean", "running_var")


def change_class(layer: nn.Module, change: Callable[[type], type]) -> None:
    """layer.__class__ = change(its class); a parametrization stays on top, where torch expects to remove it."""
    watched.forget_bound(layer)
    cls = type(layer)
    if not parametrize.is_parametrized(layer):
        layer.__class__ = change(cls)
        return
    own = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__", "__deepcopy__", "__doc__")}
    base = change(cls.__bases__[0])
    layer.__class__ = type(f"Parametrized{base.__name__}", (base,), own)


def plain_type(layer: nn.Module) -> Any:
    """layer's class without a parametrization on top."""
    cls = type(layer)
    return cls.__bases__[0] if parametrize.is_parametrized(layer) else cls


def replace(root: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """Put new wherever old stands below root; the root after that."""
    if old is not new:
        for parent in list(root.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    return new if old is root else root


def is_foreign_sync(layer: nn.Module) -> bool:
    """Whether this is another library's synchronized batch norm, by name and structure."""
    return type(layer).__name__ in _FOREIGN and all(hasattr(layer, name) for name in _STRUCTURE)


def why_not(layer: nn.Module) -> str | None:
    """The rule that forbids to change what a call of this layer runs, by its class."""
    if own := watched.own_call(layer):
        return (
            f"A layer is swapped by its class, which a {own} that was set on the object hides; swap first and set it "
            "after that. accelerate's hooks go by accelerate.hooks.remove_hook_from_module(model, recurse=True)."
        )
    return None


def refuse_own_train(layers: Iterable[tuple[str, nn.Module]]) -> None:
    """TypeError for a layer whose train was set on the object: it decides the mode, whatever the class says."""
    for name, layer in layers:
        if watched.is_own(layer, "train"):
            raise TypeError(
                "A layer is frozen by its class, which a train that was set on the object hides; got "
                f"{type(layer).__qualname__} at {shown(name)}. Remove it first: del layer.train."
            )


def shown(name: str) -> str:
    """A path in a model, as errors name it."""
    return f"'{name}'" if name else "the root"


def why_not_plain(layer: nn.Module) -> str | None:
    """The rule that forbids an ordinary class for this synchronized layer."""
    if reason := why_not(layer):
        return reason
    if getattr(layer, "channel_last", False):
        return (
            "A layer with channel_last=True takes (N, *S, C), which no ordinary batch norm does; build the model with "
            "channel_last=False and permute its input, e.g. x.movedim(-1, 1)."
        )
    if isinstance(layer, SyncBatchNorm) and not classes.forwards_owner(plain_type(layer)).__module__.startswith(
        "syncbn."
    ):
        return (
            "A subclass with a forward of its own has no ordinary counterpart; tell how with "
            "syncbn.register_converter(cls, to_sync, to_plain)."
        )
    return None


def make_plain(layer: Any) -> None:
    """Give a synchronized layer its ordinary class, in place."""
    activation = "relu" if getattr(layer, "fuse_relu", False) else getattr(layer, "activation", None)
    change_class(layer, functools.partial(classes.plain_class, activated=activation is not None))
    if activation is not None:
        layer.activation = activation
    else:
        layer.__dict__.pop("activation", None)
    layer.__dict__.pop("process_group", None)
    if not isinstance(layer, _BatchNorm) or "num_features" not in layer.__dict__:
        layer.num_features = next(t.numel() for t in (layer.running_mean, layer.weight) if t is not None)
    layer.__dict__.setdefault("affine", layer.weight is not None)
    layer.__dict__.setdefault("track_running_stats", layer.running_mean is not None)
    if "num_batches_tracked" not in layer._buffers:
        layer.register_buffer("num_batches_tracked", None)


def refuse_wrapped(module: nn.Module) -> None:
    """TypeError for a module that is compiled, scripted or in DDP: too late to change its layers."""
    for name, m in module.named_modules():
        if isinstance(m, DistributedDataParallel):
            why = "DistributedDataParallel has taken its parameters and buffers; swap the model's layers, then wrap it"
        elif type(m).__name__ == "OptimizedModule" or getattr(m, "_compiled_call_impl", None) is not None:
            why = "it is compiled for the layers it has; swap the layers, then compile"
        elif isinstance(m, torch.jit.ScriptModule):
            why = "it is TorchScript; swap the layers, then script"
        else:
            continue
        got = f"{type(m).__qualname__} at {shown(name)}"
        raise TypeError(f"Layers can be swapped in a plain module only; got {got}: {why}.")
