"""The batch norms of a model whose statistics can be replaced, and the sums of all that they normalize for a while."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from syncbn import torch_private
from syncbn.backends import select
from syncbn.classes import BatchNorm, Frozen
from syncbn.module import SyncBatchNorm
from syncbn.names import path_of
from syncbn.swap import is_foreign_sync
from syncbn.torch_private import BatchNormBase

Layers = dict[str, BatchNormBase]
"""By path; a shared layer once."""


def layers_of(model: nn.Module) -> tuple[Layers, dict[str, str]]:
    """Those that have statistics of their own to be replaced, and why the others have not."""
    layers: Layers = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        path = path_of(model, name)
        path = name if path in layers or path in left else path
        is_frozen = "FrozenBatchNorm" in type(module).__name__
        if not (isinstance(module, BatchNormBase) or is_frozen or is_foreign_sync(module)):
            continue
        why = _why_not(module, is_frozen, model.training)
        if why:
            left[path] = why
        else:
            layers[path] = module
    return layers, left


def _why_not(module: nn.Module, is_frozen: bool, in_training: bool) -> str:
    if isinstance(module, Frozen) or is_frozen:
        return "frozen"
    if not isinstance(module, BatchNormBase):
        return f"{type(module).__name__} is no batch norm of torch's"
    if module.running_mean is None:
        return "it has no running statistics"
    if in_training and not module.training:
        return "frozen: in eval mode in a model in training mode"
    return ""


def is_synchronized(layers: Layers) -> bool:
    """Whether a training call of one may wait for other ranks."""
    return any(isinstance(layer, SyncBatchNorm | nn.SyncBatchNorm) for layer in layers.values())


@contextlib.contextmanager
def measuring(model: nn.Module, layers: Layers) -> Iterator[dict[str, Tensor]]:
    """Meanwhile these layers normalize by the statistics of each batch, and all else is in eval mode.

    What is yielded has Σx, Σx² and the count, (2C + 1) float64, of all that a layer was given, by its path. No running
    statistic moves, nothing is recorded for a backward, and what was compiled runs uncompiled, as its graph has no
    place for this. All is as before afterwards.
    """
    sums: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    tracking = {layer: layer.track_running_stats for layer in layers.values()}
    with contextlib.ExitStack() as undo:
        undo.enter_context(torch.no_grad())
        if torch_private.COMPILER in sys.modules:  # else nothing is compiled
            undo.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            for module in modes:
                module.training = False
            for name, layer in layers.items():
                layer.training, layer.track_running_stats = True, False
                undo.callback(_observe(layer, _Adding(sums, name)))
            yield sums
        finally:
            for module, mode in modes.items():
                module.training = mode
            for layer, was in tracking.items():
                layer.track_running_stats = was


class _Adding:
    """To the sums of one layer."""

    def __init__(self, sums: dict[str, Tensor], name: str) -> None:
        self.sums, self.name = sums, name

    def __call__(self, x: Tensor, mask: Tensor | None = None) -> None:
        found = select(x).batch_sums(x, mask)[: 2 * x.shape[1] + 1]
        before = self.sums.get(self.name)
        self.sums[self.name] = found if before is None else before + found


def _observe(layer: BatchNormBase, add: _Adding) -> Callable[[], Any]:
    """Let add see what the layer normalizes from now on; what ends that."""
    if not isinstance(layer, SyncBatchNorm | BatchNorm):

        def see(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            add(*given[:1] or named.values())

        return layer.register_forward_hook(see, with_kwargs=True).remove

    normalize = layer._normalize  # through which every forward of such a layer goes, whatever it is given

    def observed(x: Tensor, residual: Tensor | None, mask: Tensor | None, activation: str | None) -> Tensor:
        y = normalize(x, residual, mask, activation)
        add(x, mask)
        return y

    before = layer.__dict__.get("_normalize")
    layer.__dict__["_normalize"] = observed

    def end() -> None:
        if before is None:
            del layer.__dict__["_normalize"]
        else:
            layer.__dict__["_normalize"] = before

    return end
