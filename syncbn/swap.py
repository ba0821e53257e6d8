"""Changing the class of a layer in place, so that nothing on the layer can get lost.

Parameters, buffers, hooks, attributes and mode stay where they are, and so does every reference to the layer: from a
parent, a second parent, an optimizer or a DDP bucket. What changes is which forward runs.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from syncbn.functional import finish
from syncbn.module import SyncBatchNorm


class BatchNorm(_BatchNorm):
    """Ordinary batch norm for (N, C, *S) inputs of any rank: what a synchronized layer of unknown origin becomes.

    It keeps the fused activation and takes the residual; a mask only in eval, where it changes no statistics.
    """

    activation: str | None = None

    def _check_input_dim(self, input: Tensor) -> None:
        """Any rank."""

    def forward(self, input: Tensor, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        return self.normalize(input, residual, mask, self.activation)

    def normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> Tensor:
        """activation(bn(input) + residual)"""
        if mask is not None and self.training:
            raise ValueError(
                "An ordinary batch norm cannot leave positions out of its statistics; got a mask in training. "
                "Train with syncbn.SyncBatchNorm, which runs alone and on CPU too."
            )
        return finish(super().forward(input), residual, activation, mask)


class WithDropAndAct:
    """timm's normalization layers with an activation: act(drop(bn(x))), fused where there is nothing to drop."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        fused = _fusible(self.drop, self.act)
        y: Tensor = self.normalize(input, None, None, fused)  # type: ignore[attr-defined]  # of the norm behind
        return y if fused else self.act(self.drop(y))


class SyncBatchNormAct(WithDropAndAct, SyncBatchNorm):  # type: ignore[misc]  # timm's forward takes the input alone
    """act(drop(bn(x))) with the statistics of all ranks."""


class BatchNormAct(WithDropAndAct, BatchNorm):  # type: ignore[misc]  # the same
    """act(drop(bn(x))) for inputs of any rank."""


def _fusible(drop: nn.Module, act: nn.Module) -> str | None:
    """The name of act if it may run inside the layer: exactly that function, and nobody listens to it."""
    hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (drop, act))
    if type(drop) is not nn.Identity or hooked:
        return None
    if type(act) is nn.LeakyReLU:
        return "leaky_relu" if act.negative_slope == 0.01 else None
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(act))


_FOREIGN = {"SyncBatchNorm", "NaiveSyncBatchNorm", "SyncBatchNormAct"}
_FOREIGN |= {f"SynchronizedBatchNorm{rank}d" for rank in (1, 2, 3)}
"""Names of synchronized batch norms in torch, apex, mmcv, detectron2, timm and older research code."""
_derived: dict[tuple[type, type], type] = {}
_STRUCTURE = ("eps", "momentum", "weight", "bias", "running_mean", "running_var")


def derive(mixin: type, under: Any) -> type:
    """A class that is `under` with `mixin`'s methods before its own; made once, so that it can be compared."""
    if (mixin, under) in _derived:
        return _derived[mixin, under]
    prefix = "Sync" if issubclass(mixin, SyncBatchNorm) else mixin.__name__
    own: dict[str, Any] = {"__module__": __name__, "__doc__": mixin.__doc__, "_mixin": mixin, "_under": under}
    own |= {"__reduce_ex__": _reduce, "_check_input_dim": under._check_input_dim}
    if getattr(under, "cls_to_become", None) is not None:  # a lazy layer, on first use
        own["cls_to_become"] = derive(mixin, under.cls_to_become)
    _derived[mixin, under] = type(prefix + under.__name__, (mixin, under), own)
    return _derived[mixin, under]


def _reduce(layer: Any, protocol: int) -> tuple[Any, ...]:
    """Pickle by recipe: the class is made at run time and cannot be looked up by name."""
    state = layer.__getstate__() if hasattr(layer, "__getstate__") else layer.__dict__
    mixins, cls = [], type(layer)
    while "_under" in vars(cls):
        mixins.append(cls._mixin)
        cls = cls._under
    return _rebuild, (cls, *reversed(mixins)), state


def _rebuild(cls: Any, *mixins: type) -> Any:
    for mixin in mixins:
        cls = derive(mixin, cls)
    return cls.__new__(cls)


def change_class(layer: nn.Module, change: Callable[[type], type]) -> None:
    """layer.__class__ = change(its class); a parametrization stays on top, where torch expects to remove it."""
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


def can_sync(cls: Any) -> bool:
    """Whether a layer of this class does nothing but batch norm, or what WithDropAndAct does."""
    if _is_timm_act(cls) or cls is nn.SyncBatchNorm:
        return True
    return issubclass(cls, _BatchNorm) and bool(cls.forward is _BatchNorm.forward)


def sync_class(cls: Any) -> type:
    """The synchronized class for a class that can be; not a subclass of nn.SyncBatchNorm, which DDP refuses on CPU."""
    ours = SyncBatchNormAct if _is_timm_act(cls) else SyncBatchNorm
    return ours if issubclass(cls, nn.SyncBatchNorm) else derive(ours, cls)


def is_foreign_sync(layer: nn.Module) -> bool:
    """Whether this is another library's synchronized batch norm, by name and structure."""
    return type(layer).__name__ in _FOREIGN and all(hasattr(layer, name) for name in _STRUCTURE)


def why_not_plain(layer: nn.Module) -> str | None:
    """The rule that forbids an ordinary class for this synchronized layer."""
    if getattr(layer, "channel_last", False):
        return (
            "A layer with channel_last=True takes (N, *S, C), which no ordinary batch norm does; build the model with "
            "channel_last=False and permute its input, e.g. x.movedim(-1, 1)."
        )
    if isinstance(layer, SyncBatchNorm) and not _forwards_owner(plain_type(layer)).__module__.startswith("syncbn."):
        return (
            "A subclass with a forward of its own has no ordinary counterpart; tell how with "
            "syncbn.register_converter(cls, to_sync, to_plain)."
        )
    return None


def make_plain(layer: Any) -> None:
    """Give a synchronized layer its ordinary class, in place."""
    activation = "relu" if getattr(layer, "fuse_relu", False) else getattr(layer, "activation", None)
    change_class(layer, functools.partial(_plain_class, activated=activation is not None))
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


def _plain_class(cls: Any, activated: bool) -> type:
    if issubclass(cls, SyncBatchNorm) and "_under" in vars(cls):
        if not issubclass(cls._mixin, SyncBatchNorm):  # frozen: the layer behind changes
            return derive(cls._mixin, _plain_class(cls._under, activated))
        if not activated:
            return cls._under  # type: ignore[no-any-return]  # derive() set a type
    return BatchNormAct if issubclass(cls, SyncBatchNormAct) or _is_timm_act(cls) else BatchNorm


def _is_timm_act(cls: type) -> bool:
    """timm's BatchNormAct2d and SyncBatchNormAct, and subclasses with their forward."""
    owner = _forwards_owner(cls)
    return owner.__module__.startswith("timm.") and owner.__name__ in ("BatchNormAct2d", "SyncBatchNormAct")


def _forwards_owner(cls: type) -> type:
    return next((c for c in cls.__mro__ if "forward" in vars(c)), cls)


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
        place = f"'{name}'" if name else "the root"
        raise TypeError(f"Layers can be swapped in a plain module only; got {type(m).__qualname__} at {place}: {why}.")
