"""Why a layer cannot be swapped or frozen: what would be lost, by the layer's path, before anything has changed.

Refused by conversion: a forward that was set on a layer object or put on torch's class from elsewhere; an attribute
`activation`, which our layers apply; a weight or statistic that the class computes as a property; a class that cannot
be extended, that pickles by a __reduce__ of its own or whose __new__ needs arguments; a subclass of nn.SyncBatchNorm.
For all of these there is register_converter. Freezing refuses such classes, not such forwards, and a `train` that was
set on the object; reverting refuses a subclass of ours that changes a part of the call.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from syncbn import classes, swap, torch_private, watched
from syncbn.module import SyncBatchNorm

CONVERTER = "Tell how with syncbn.register_converter(cls, to_sync, to_plain)"


class Refusal(NamedTuple):
    """Why: for the report; as a rule; and what to do, which another way out may follow."""

    short: str
    rule: str
    advice: str = CONVERTER

    def error(self, name: str, layer: nn.Module, or_else: str = "") -> TypeError:
        """Of a layer at this path."""
        return TypeError(f"{self.rule}; got {described(name, layer)}. {self.advice}{or_else}.")


def refuse_wrapped(module: nn.Module) -> None:
    """TypeError for a module that is compiled, scripted or in DDP: too late to change its layers."""
    for name, m in module.named_modules():
        if isinstance(m, DistributedDataParallel):
            why = "DistributedDataParallel has taken its parameters and buffers; swap the model's layers, then wrap it"
        elif type(m).__name__ == "OptimizedModule" or torch_private.is_call_compiled(m):
            why = "it is compiled for the layers it has; swap the layers, then compile"
        elif isinstance(m, torch.jit.ScriptModule):
            why = "it is TorchScript; swap the layers, then script"
        else:
            continue
        got = f"{type(m).__qualname__} at {shown(name)}"
        raise TypeError(f"Layers can be swapped in a plain module only; got {got}: {why}.")


def why_not_sync(layer: nn.Module) -> Refusal | None:
    """Why a batch norm cannot be synchronized by its class."""
    cls = swap.plain_type(layer)
    if own := watched.own_call(layer):
        return _hidden(own)
    if issubclass(cls, nn.SyncBatchNorm) and cls is not nn.SyncBatchNorm and not classes.can_sync(cls):
        rule = "A subclass of nn.SyncBatchNorm would not stay one, since DistributedDataParallel refuses those on CPU"
        return Refusal("it is a subclass of nn.SyncBatchNorm", rule)
    if not classes.can_sync(cls):
        rule = "A batch norm with a forward of its own cannot be swapped without losing what that forward does"
        return Refusal("its forward is its own", rule)
    if not issubclass(cls, classes.BatchNorm) and getattr(layer, "activation", None) is not None:
        rule = "A synchronized layer applies its `activation`, which an ordinary one does not"
        return Refusal("it has an activation of its own", rule, "Rename that attribute")
    if own := classes.own_state(cls):
        rule = f"A synchronized layer reads the {own} that is stored, not one that its class computes"
        return Refusal(f"its {own} is computed by its class", rule, "Use torch.nn.utils.parametrize")
    return _unfollowed(layer) or _fixed(layer, classes.sync_class)


def why_not_plain(layer: nn.Module) -> Refusal | None:
    """Why a synchronized layer cannot become an ordinary one."""
    if own := watched.own_call(layer):
        return _hidden(own)
    if getattr(layer, "channel_last", False):
        return Refusal(
            "its channels are last",
            "A layer with channel_last=True takes (N, *S, C), which no ordinary batch norm does",
            "Build the model with channel_last=False and permute its input, e.g. x.movedim(-1, 1)",
        )
    if own := _own_method(classes.thawed(swap.plain_type(layer))):
        return Refusal(f"its {own} is its own", f"A subclass with a {own} of its own has no ordinary counterpart")
    if swap.channels_of(layer) is None:
        rule = "An ordinary batch norm has a number of channels, of which this layer's tensors say nothing"
        return Refusal("its channels are not known", rule)
    return _fixed(layer, lambda cls: classes.plain_class(cls, swap.activation_of(layer) is not None))


def refuse_unfreezable(layers: list[tuple[str, Any]], change: Callable[[type], type]) -> None:
    """TypeError for a layer whose mode or class is not freeze's or unfreeze's to decide."""
    for name, layer in layers:
        is_done = change is classes.frozen and isinstance(layer, classes.Frozen)
        refusal = None if is_done else _unfollowed(layer) or _fixed(layer, change)
        if change is classes.thawed and classes.thawed(cls := swap.plain_type(layer)) is cls:
            refusal = Refusal("its class was derived from a frozen one", "Only what was frozen last can be thawed")
        if watched.is_own(layer, "train"):
            rule = "A layer is frozen by its class, which a train that was set on the object hides"
            refusal = Refusal("its train was set on the object", rule, "Remove it first: del layer.train")
        if refusal is not None:
            raise refusal.error(name, layer)


def shown(name: str) -> str:
    """A path in a model, as errors name it."""
    return f"'{name}'" if name else "the root"


def described(name: str, layer: nn.Module) -> str:
    """A layer's class and path."""
    return f"{type(layer).__module__}.{type(layer).__qualname__} at {shown(name)}"


def _hidden(own: str) -> Refusal:
    rule = f"A layer is swapped by its class, which a {own} that was set on the object hides"
    take_off = "accelerate.hooks.remove_hook_from_module(model, recurse=True) takes such hooks off"
    return Refusal(f"its {own} was set on the object", rule, f"Swap first and set it afterwards; {take_off}")


def _unfollowed(layer: nn.Module) -> Refusal | None:
    """For a layer of a class that could not be pickled with another before it."""
    own = classes.own_recipe(swap.plain_type(layer))
    rule = f"A layer is swapped by a class that extends its own, and pickled by that; its {own} cannot follow"
    return None if own is None else Refusal(f"its class has a {own} of its own", rule)


def _fixed(layer: nn.Module, change: Callable[[type], type]) -> Refusal | None:
    """For a layer whose class cannot be changed so."""
    why = swap.why_fixed(layer, change)
    rule = f"A layer is swapped by a class that extends its own, which this class does not allow ({why})"
    return None if why is None else Refusal("its class cannot be extended", rule)


def _own_method(cls: type) -> str | None:
    """What of a call a user's subclass of ours or of nn.SyncBatchNorm has of its own, or was put on the class."""
    base = SyncBatchNorm if issubclass(cls, SyncBatchNorm) else nn.SyncBatchNorm
    if not issubclass(cls, base) or swap.is_foreign_by_name(cls):  # another library's does what its name says
        return None
    users = [c for c in cls.__mro__[: cls.__mro__.index(base)] if not c.__module__.startswith("syncbn.")]
    names = (*sorted(torch_private.OWN_CALL), "_check_input_dim", "_normalize", "train")
    own = next((name for name in names for c in users if name in vars(c)), None)
    return own or (None if classes.is_forward_unpatched(cls) else "forward")
