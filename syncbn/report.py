"""What a module's normalization layers are, and what a conversion made of them."""

from typing import NamedTuple

from torch import nn

from syncbn import convert, groups
from syncbn.classes import Frozen
from syncbn.module import SyncBatchNorm
from syncbn.swap import is_foreign_sync, plain_type, was_built
from syncbn.torch_private import BatchNormBase, InstanceNormBase, NormBase
from syncbn.watched import own_call


class Row(NamedTuple):
    """One layer; a shared one has the first of its names."""

    name: str
    before: str
    now: str
    status: str
    why: str
    group: str
    channels: int | None


class Report(list[Row]):
    """The rows of all normalization layers; printed, a table."""

    def __str__(self) -> str:
        head = Row("name", "before", "now", "status", "why", "group", None)
        lines = [[*map(str, row[:-1]), "channels" if row is head else str(row.channels or "")] for row in (head, *self)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )


def conversion_report(module: nn.Module) -> Report:
    """Every normalization layer of module: name, class before and now, converted or why not, group, channels.

    Printed, it is a table. The status is "converted", "synchronized" for a layer that was built so, or "left alone".
    """
    return Report(_row(name, layer) for name, layer in module.named_modules() if _is_norm(layer))


def _is_norm(layer: nn.Module) -> bool:
    norms = (NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return isinstance(layer, norms) or is_foreign_sync(layer) or "FrozenBatchNorm" in type(layer).__name__


def _row(name: str, layer: nn.Module) -> Row:
    cls = plain_type(layer)
    before, status, why, group = cls.__name__, "left alone", "", ""
    if isinstance(layer, SyncBatchNorm):
        under = getattr(cls, "_under", None)
        before = under.__name__ if under else "SyncBatchNorm"
        status = "synchronized" if was_built(layer) or not under else "converted"
        ranks = groups.ranks_of(layer.process_group)
        group = "default" if ranks is None else "ranks " + (" ".join(map(str, ranks)) or "of others")
        group += ", destroyed" if groups.is_destroyed(layer.process_group) else ""
        own = own_call(layer)
        why = f"its {own} was set on the object" if own else ""
        why = "frozen: uses its running statistics" if isinstance(layer, Frozen) else why
    else:
        why = "frozen" if "Frozen" in cls.__name__ else convert.reasons.get(layer) or _why(layer)
    channels = next((getattr(layer, k) for k in ("num_features", "num_channels") if hasattr(layer, k)), None)
    return Row(name, before, cls.__name__, status, why, group, channels)


def _why(layer: nn.Module) -> str:
    if is_foreign_sync(layer):
        return f"synchronized by {plain_type(layer).__module__.partition('.')[0]}, not converted"
    if isinstance(layer, BatchNormBase):
        return "not converted"
    kind = "InstanceNorm" if isinstance(layer, InstanceNormBase) else type(layer).__name__
    return f"{kind} has no batch statistics"
