"""Swap batch norm layers for synchronized ones, and back, in place: the layer objects stay, their class changes.

So nothing else of a layer can get lost: parameters, buffers, hooks, attributes, mode, and every reference to it, from
a parent, a second parent or an optimizer.
"""

from typing import TypeVar

from torch import nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.module import SyncBatchNorm

M = TypeVar("M", bound=nn.Module)


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """What nn.BatchNorm1d becomes: synchronized, still of its class, still (N, C) or (N, C, L) only."""

    _check_input_dim = nn.BatchNorm1d._check_input_dim


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """What nn.BatchNorm2d becomes: synchronized, still of its class, still (N, C, H, W) only."""

    _check_input_dim = nn.BatchNorm2d._check_input_dim


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """What nn.BatchNorm3d becomes: synchronized, still of its class, still (N, C, D, H, W) only."""

    _check_input_dim = nn.BatchNorm3d._check_input_dim


_SYNCED: dict[type[_BatchNorm], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: SyncBatchNorm1d,
    nn.BatchNorm2d: SyncBatchNorm2d,
    nn.BatchNorm3d: SyncBatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}


def convert_sync_batchnorm(module: M, process_group: ProcessGroup | None = None) -> M:
    """Make every BatchNorm1d, 2d, 3d and nn.SyncBatchNorm of module synchronized, module itself included.

    Args:
        module: changed in place; its layers, parameters and buffers stay the same objects.
        process_group: the ranks to synchronise over; None keeps the group of an nn.SyncBatchNorm, and means the
            default group for the others.

    Returns:
        module.

    Raises:
        TypeError: for a batch norm of another class, whose forward may do more; nothing has been changed then.

    Call it before wrapping the model in DistributedDataParallel, alike on every rank.
    """
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
    ]
    for name, layer in layers:
        if type(layer) not in _SYNCED:
            raise TypeError(
                f"Only BatchNorm1d, BatchNorm2d, BatchNorm3d and nn.SyncBatchNorm can be converted; got "
                f"{type(layer).__qualname__} at {name or 'the root'!r}. Replace that layer by one of these first."
            )
    for _, layer in layers:
        group = getattr(layer, "process_group", None) if process_group is None else process_group
        layer.__dict__.update(process_group=group, activation=None, _class_before=type(layer))
        layer.__class__ = _SYNCED[type(layer)]
    return module


def revert_sync_batchnorm(module: M) -> M:
    """Give every converted layer of module the class it had, in place; module itself included.

    A `SyncBatchNorm` that was built as such becomes an ordinary batch norm for inputs of any rank; one that fuses an
    activation is refused, as that class has no place for it.

    Raises:
        TypeError: for a layer with a fused activation; nothing has been changed then.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, SyncBatchNorm)]
    for name, layer in layers:
        if layer.activation is not None:
            raise TypeError(
                f"A layer with a fused activation has no ordinary counterpart; got activation={layer.activation!r} at "
                f"{name or 'the root'!r}. Set layer.activation = None and apply the activation after the layer."
            )
    for _, layer in layers:
        before = layer.__dict__.pop("_class_before", BatchNorm)
        del layer.activation
        if before is not nn.SyncBatchNorm:
            del layer.process_group
        layer.__class__ = before
    return module


class BatchNorm(_BatchNorm):
    """Ordinary batch norm for (N, C, *S) inputs of any rank."""

    def _check_input_dim(self, input: object) -> None:
        pass
