"""Module swap: batch norm layers into synchronized ones and back, with nothing lost or a refusal in words."""

import contextlib
import fnmatch
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple, TypeVar, cast

from torch import nn

from syncbn import checks, classes, groups, refusals, swap
from syncbn.classes import Frozen
from syncbn.module import SyncBatchNorm
from syncbn.names import name_by_path, numbered
from syncbn.torch_private import BatchNormBase

M = TypeVar("M", bound=nn.Module)
Only = Callable[[str, nn.Module], bool] | str | Iterable[str] | None


class Converter(NamedTuple):
    """How layers of one class are swapped, each way."""

    to_sync: Callable[[nn.Module, groups.Group | None], nn.Module]
    to_plain: Callable[[nn.Module], nn.Module]


_converters: dict[type, Converter] = {}
_ORIGIN = "_converted_from"
"""On a layer that a registered converter made, the class it was made from; copies and pickles keep it."""
reasons: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""Why the last conversion left a layer as it was, for the report."""


def register_converter(
    cls: type,
    to_sync: Callable[[nn.Module, groups.Group | None], nn.Module],
    to_plain: Callable[[nn.Module], nn.Module],
) -> None:
    """Tell `convert_sync_batchnorm` and `revert_sync_batchnorm` how to swap layers of exactly this class.

    Args:
        cls: a normalization layer whose forward does more than batch normalization.
        to_sync: (layer, process_group) -> its synchronized form: the layer itself, changed, or a new one, which is
            then put wherever the layer stood. Hooks and attributes of a replaced layer are this function's business.
        to_plain: the way back.
    """
    _converters[cls] = Converter(to_sync, to_plain)


def convert_sync_batchnorm(
    module: M, process_group: groups.Group | None = None, *, only: Only = None, on_unknown: str = "raise"
) -> M:
    """Make the batch norm layers of module synchronized, module itself included.

    Args:
        module: changed in place. Its layers stay the same objects, with their parameters, buffers, hooks, attributes,
            parametrizations and mode, and still are instances of their class: a BatchNorm2d checks for 4-d inputs.
        process_group: the ranks to synchronise over; None keeps the group of a layer that has one, and means the
            default group for the others.
        only: convert just some: a predicate (name, layer) -> bool, or name patterns such as "backbone.*".
        on_unknown: "raise", or "skip" to leave layers alone of which something would be lost.

    Converted: BatchNorm1d, 2d, 3d (to SyncBatchNorm1d, 2d, 3d), their lazy forms (on first use), subclasses with the
    same forward, timm's BatchNormAct2d and SyncBatchNormAct, nn.SyncBatchNorm, and classes given to
    `register_converter`.
    Left alone: InstanceNorm, GroupNorm, LayerNorm, frozen batch norms, and what is synchronized already.

    A converter of torch's or timm's that is called afterwards replaces these layers, and what torch's do not have is
    lost: `conversion_report` shows it.

    Returns:
        module; only a registered converter can make it another object. `conversion_report` says what happened.

    Raises:
        TypeError: for a batch norm of which something would be lost, by its path: a forward of its own, its class's or
            set on the object as accelerate's hooks do, an `activation` of its own, a class that cannot be extended;
            and for a module that is compiled, scripted or inside DistributedDataParallel. Nothing has been changed
            then.

    Call it alike on every rank, before wrapping the model in DistributedDataParallel.
    """
    if on_unknown not in ("raise", "skip"):
        raise ValueError(
            f"on_unknown must be 'raise' or 'skip'; got {on_unknown!r}. Pass 'skip' to leave such layers as they are."
        )
    checks.check_process_group(process_group)
    refusals.refuse_wrapped(module)
    chosen = _chooser(only)
    wanted, left = [], {}
    for name, layer in module.named_modules():
        if not isinstance(layer, BatchNormBase) and type(layer) not in _converters:
            continue
        reason = _why_not(layer) or (None if chosen(name, layer) else "not chosen by `only`")
        refusal = refusals.why_not_sync(layer) if reason is None and type(layer) not in _converters else None
        if refusal is not None:
            if on_unknown == "raise":
                raise refusal.error(name, layer, ", or leave such layers alone with on_unknown='skip'")
            reason = refusal.short
        if reason is None:
            wanted.append(layer)
        elif _why_not(layer) is None:  # else it shows
            left[layer] = reason
    reasons.update(left)
    root: nn.Module = module
    for layer in wanted:
        reasons.pop(layer, None)
        root = _make_sync(root, layer, process_group)
    _label(root)
    name_by_path(root)
    return cast(M, root)


def _of_class(
    cls: type, module: M, process_group: groups.Group | None = None, *, only: Only = None, on_unknown: str = "raise"
) -> M:
    """`syncbn.convert_sync_batchnorm`, as torch's class has it."""
    return convert_sync_batchnorm(module, process_group, only=only, on_unknown=on_unknown)


SyncBatchNorm.convert_sync_batchnorm = classmethod(_of_class)  # type: ignore[assignment]  # mypy does not bind it


def name_layers(model: M) -> M:
    """Call every synchronized layer of model by its path in it, such as ``layer1.0.bn1``, in errors and reports.

    `convert_sync_batchnorm` does so for the layers that have no path yet, and so does the first training step within
    DistributedDataParallel; others are numbered as they are built.
    The ranks compare paths in each training call: call it alike on every rank, with models that are alike.
    What DistributedDataParallel, torch.compile and other wrappers of torch put into a path is left out.

    Returns:
        model; copies and pickles keep the names.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"A model to name the layers of must be an nn.Module; got {type(model).__name__}. Pass the model itself."
        )
    _label(model)
    name_by_path(model, anew=True)
    return model


def revert_sync_batchnorm(module: M) -> M:
    """Give every synchronized layer of module the ordinary class it had, in place; module itself included.

    Also takes the layers of torch, timm, apex, mmcv and detectron2 that are synchronized batch norms by name and
    structure, so that a published model runs on one device. A layer that was built synchronized has no ordinary class
    and becomes a `classes.BatchNorm`, for inputs of any rank, with its fused activation.
    In eval the output keeps its bits. Afterwards nothing of module communicates.

    Raises:
        TypeError: for a synchronized layer with a layout or forward of its own, its class's or set on the object, or
            a subclass with another part of the call of its own. Nothing has been changed then.
    """
    return cast(M, _revert(module)[0])


@contextlib.contextmanager
def plain(module: M) -> Iterator[M]:
    """Within the block, module's synchronized layers are ordinary ones: to export or trace in the middle of training.

    The layers are swapped in place and swapped back, whatever happens inside; what is done to them inside stays.
    It refuses what `revert_sync_batchnorm` refuses.
    """
    before = [(layer, swap.State.of(layer)) for layer in module.modules()]
    root, replaced = _revert(module)
    swapped = [(layer, state, swap.State.of(layer)) for layer, state in before if type(layer) is not state.cls]
    try:
        yield cast(M, root)
    finally:
        for old, new in replaced:
            root = swap.replace(root, new, old.train(new.training))
        for layer, state, then in swapped:
            swap.restore(layer, state, then)


def _label(root: nn.Module) -> None:
    """The layers that were changed into synchronized ones have none yet."""
    for layer in root.modules():
        if isinstance(layer, SyncBatchNorm) and layer._label is None:
            layer.__dict__["_label"] = numbered(type(layer).__name__, swap.channels_of(layer) or 0, layer.activation)


def _why_not(layer: nn.Module) -> str | None:
    if isinstance(layer, Frozen):
        return "frozen"
    return "synchronized already" if isinstance(layer, SyncBatchNorm) else None


def _make_sync(root: nn.Module, layer: nn.Module, process_group: groups.Group | None) -> nn.Module:
    """root with layer synchronized."""
    cls = type(layer)
    if cls in _converters:
        new = _converters[cls].to_sync(layer, process_group)
        new.__dict__[_ORIGIN] = cls
        return swap.replace(root, layer, new)
    swap.change_class(layer, classes.sync_class)
    if process_group is not None:
        layer.__dict__["process_group"] = process_group
    groups.ranks_of(layer.process_group)  # type: ignore[arg-type]  # then they outlive it
    return root


def _revert(module: nn.Module) -> tuple[nn.Module, list[tuple[nn.Module, nn.Module]]]:
    """The root, and which layer a registered converter gave way to which."""
    refusals.refuse_wrapped(module)
    layers, origins = [], []
    for name, layer in module.named_modules():
        if _ORIGIN in layer.__dict__:
            if layer.__dict__[_ORIGIN] not in _converters:
                rule = "A layer that a registered converter made can be reverted by that only"
                raise refusals.Refusal("its converter is gone", rule).error(name, layer)
            origins.append(layer)
        elif isinstance(layer, SyncBatchNorm) or swap.is_foreign_sync(layer):
            if refusal := refusals.why_not_plain(layer):
                raise refusal.error(name, layer)
            layers.append(layer)
    root, replaced = module, []
    for old in origins:
        new = _converters[old.__dict__[_ORIGIN]].to_plain(old)
        new.__dict__.pop(_ORIGIN, None)
        replaced.append((old, new))
        root = swap.replace(root, old, new)
    remaining = set(root.modules())  # without what was inside of a replaced layer
    for layer in layers:
        if layer in remaining:
            reasons.pop(layer, None)
            swap.make_plain(layer)
    return root, replaced


def _chooser(only: Only) -> Callable[[str, nn.Module], bool]:
    if only is None:
        return lambda name, layer: True
    if callable(only):
        return only
    patterns = [only] if isinstance(only, str) else list(only)
    return lambda name, layer: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
