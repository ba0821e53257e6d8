"""Freezing batch norm layers so that `.train()` does not thaw them.

`swa_utils.update_bn` resets the statistics of frozen layers, as of all batch norms: unfreeze them, or leave them out.
"""

from typing import Any, TypeVar

from torch import nn

from syncbn.classes import Frozen, frozen, thawed
from syncbn.refusals import refuse_unfreezable
from syncbn.swap import change_class
from syncbn.torch_private import BatchNormBase

M = TypeVar("M", bound=nn.Module)


def freeze(module: M, *, train_affine: bool = False) -> M:
    """Make every batch norm of module, synchronized or not, use its running statistics from now on, in place.

    A frozen layer never communicates and stays frozen through `.train()`, copies and pickles.

    Args:
        module: a model or a layer.
        train_affine: leave weight and bias trainable; by default they stop requiring gradients.

    Raises:
        ValueError: for a layer without running statistics.
        TypeError: for a layer whose train was set on the object, or whose class cannot be extended. Nothing has been
            changed then.
    """
    layers: list[tuple[str, Any]] = [(name, m) for name, m in module.named_modules() if isinstance(m, BatchNormBase)]
    for name, layer in layers:
        if layer.running_mean is None:
            raise ValueError(
                f"Only a layer with running statistics can be frozen; got track_running_stats=False at {name!r}. "
                "Freeze a part of the model without it."
            )
    refuse_unfreezable(layers, frozen)
    for _, layer in layers:
        if not isinstance(layer, Frozen):
            change_class(layer, frozen)
            layer.train(layer.training)
        if not train_affine:
            named = [(name, p) for name, p in layer.named_parameters() if _is_affine(name)]
            taken = [(name, p) for name, p in named if p.requires_grad and p.is_leaf]
            if taken:
                layer.__dict__.setdefault("_frozen_parameters", []).extend(taken)
            for _, parameter in taken:
                parameter.requires_grad = False  # by assignment: what is lazy takes no other
    return module


def unfreeze(module: M) -> M:
    """Undo `freeze`, in place: the class before, the mode of module, and gradients for what `freeze` took them from.

    Raises:
        TypeError: for a layer whose train was set on the object. Nothing has been changed then.
    """
    layers: list[tuple[str, Any]] = [(name, m) for name, m in module.named_modules() if isinstance(m, Frozen)]
    refuse_unfreezable(layers, thawed)
    for _, layer in layers:
        now = dict(layer.named_parameters())
        for name, parameter in layer.__dict__.pop("_frozen_parameters", []):
            parameter.requires_grad = True
            if name in now:  # where another has taken its place
                now[name].requires_grad = True
        change_class(layer, thawed)
        layer.train(module.training)
    return module


def _is_affine(name: str) -> bool:
    """Whether a parameter of a batch norm is its weight or bias, by this name or what wrappers make of it."""
    return name.startswith(("weight", "bias", "parametrizations."))
