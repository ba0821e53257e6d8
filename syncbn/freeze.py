"""Freezing batch norm layers so that `.train()` does not thaw them."""

from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.classes import Frozen, derive
from syncbn.swap import change_class, refuse_own_train

M = TypeVar("M", bound=nn.Module)


def freeze(module: M, *, train_affine: bool = False) -> M:
    """Make every batch norm of module, synchronized or not, use its running statistics from now on, in place.

    A frozen layer never communicates and stays frozen through `.train()`, copies and pickles.

    Args:
        module: a model or a layer.
        train_affine: leave weight and bias trainable; by default they stop requiring gradients.

    Raises:
        ValueError: for a layer without running statistics.
        TypeError: for a layer whose train was set on the object. Nothing has been changed then.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, _BatchNorm)]
    for name, layer in layers:
        if layer.running_mean is None:
            raise ValueError(
                f"Only a layer with running statistics can be frozen; got track_running_stats=False at {name!r}. "
                "Freeze a part of the model without it."
            )
    refuse_own_train(layers)
    for _, layer in layers:
        if not isinstance(layer, Frozen):
            change_class(layer, lambda cls: derive(Frozen, cls))
            layer.train(layer.training)
        if not train_affine:
            for name, parameter in layer.named_parameters():
                if parameter.requires_grad and name.split(".")[0] in ("weight", "bias", "parametrizations"):
                    layer.__dict__.setdefault("_frozen_parameters", []).append(name)
                    parameter.requires_grad_(False)
    return module


def unfreeze(module: M) -> M:
    """Undo `freeze`, in place: the class before, the mode of module, and gradients for what `freeze` took them from.

    Raises:
        TypeError: for a layer whose train was set on the object. Nothing has been changed then.
    """
    layers: list[tuple[str, Any]] = [(name, m) for name, m in module.named_modules() if isinstance(m, Frozen)]
    refuse_own_train(layers)
    for _, layer in layers:
        for name in layer.__dict__.pop("_frozen_parameters", []):
            layer.get_parameter(name).requires_grad_(True)
        change_class(layer, lambda cls: cls._under)  # type: ignore[attr-defined]  # derive() sets it
        layer.train(module.training)
    return module
