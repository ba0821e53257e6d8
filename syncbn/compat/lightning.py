"""A Lightning plugin: `Trainer(plugins=[LayerSync()])` in the place of `Trainer(sync_batchnorm=True)`.

Lightning's own plugin converts to nn.SyncBatchNorm, which DDP refuses on CPU, and loses the original classes.
"""

import importlib
import importlib.util
from typing import Any

from torch import nn

from syncbn import convert, groups

_INSTALLED = [name for name in ("lightning", "pytorch_lightning") if importlib.util.find_spec(name)]
_MODULES = {
    "lightning": "lightning.pytorch.plugins.layer_sync",
    "pytorch_lightning": "pytorch_lightning.plugins.layer_sync",
}
if not _INSTALLED:
    raise ImportError("This plugin needs Lightning; neither package is installed. pip install lightning.")
_BASES: Any = tuple(importlib.import_module(_MODULES[name]).LayerSync for name in _INSTALLED)


class LayerSync(*_BASES):  # type: ignore[misc]  # Lightning's classes, under whichever name it is installed
    """Synchronizes the model's batch norms when fitting starts on several devices, and reverts them afterwards.

    Args:
        process_group: the ranks to synchronise over, or what `syncbn.new_group` takes: k for every k ranks, "node".
        arguments: further keyword arguments of `convert_sync_batchnorm`.
    """

    def __init__(self, process_group: groups.Group | int | str | None = None, **arguments: Any) -> None:
        self.process_group = process_group
        self.arguments = arguments

    def apply(self, model: nn.Module) -> nn.Module:
        """Called by the strategy once the processes have joined."""
        group = self.process_group
        if isinstance(group, (int, str)):
            group = groups.new_group(group)
        return convert.convert_sync_batchnorm(model, group, **self.arguments)

    def revert(self, model: nn.Module) -> nn.Module:
        """Called by the strategy when fitting ends."""
        return convert.revert_sync_batchnorm(model)


__all__ = ["LayerSync"]
