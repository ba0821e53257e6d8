"""A batch of no samples, with the structure of one that has some.

What is along dimension 0 of a tensor is samples. What is in a list may be samples, or fields that `default_collate` put
into a list because a sample had several; `_Reading` tells which.
"""

import copy
import dataclasses
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, MutableMapping
from enum import Enum
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import default_collate

_PLAIN = (type(None), Number, str, bytes, Enum, torch.dtype, torch.device)
"""Not samples where they stand alone, but something about the batch."""

_BATCH = "batch"
"""What errors call the whole of it."""


def emptied(batch: Any, loader: Any) -> Any:
    """The batch without its samples; loader's batch_size and collate_fn, where it has them, help to read it.

    Raises:
        TypeError: for what has no samples that could be left out, or an object of another library's.
    """
    sizes = _sizes(batch, (collated := getattr(loader, "collate_fn", None) is default_collate))
    if not sizes:
        raise TypeError(
            "A batch must hold samples, in tensors, arrays or lists, for an empty one to be made of it; "
            f"got {type(batch).__name__} without any. "
            "Pass EvenLoader(..., empty=function), from a batch to an empty one."
        )
    hint = getattr(loader, "batch_size", None)
    return _Reading(hint if hint in sizes else sizes[0], collated).without_samples(batch, _BATCH)


class _Reading:
    """How the batch is read: its number of samples, and whether default_collate made it."""

    def __init__(self, size: int, collated: bool) -> None:
        self.size, self.collated = size, collated

    def without_samples(self, value: Any, path: str) -> Any:
        if isinstance(value, _PLAIN) or _is_numpy(value, "generic"):
            return value
        try:
            if isinstance(value, PackedSequence):
                return _packed(value)
            if isinstance(value, Tensor):
                return _tensor(value)
        except Exception as error:  # a layout that cannot be cut
            raise _unknown(value, path) from error
        if _is_numpy(value, "ndarray"):
            return value[:0].copy() if value.ndim else value
        if self._are_samples(value, is_outermost=path == _BATCH):
            return type(value)()
        fields = _fields(value)
        if fields is None:
            raise _unknown(value, path)
        left = {key: self.without_samples(field, f"{path}[{key!r}]") for key, field in fields.items()}
        try:
            return _rebuilt(value, left)
        except Exception as error:  # a container with rules of its own
            raise _unknown(value, path) from error

    def _are_samples(self, values: Any, is_outermost: bool) -> bool:
        """One entry a sample. Where both readings fit, the outermost list holds fields, unless they are dicts.

        A list within has samples then, such as three images of three colours, unless default_collate made it.
        """
        if not _is_plain_sequence(values) or len(values) != self.size:
            return False
        kinds = _kinds(values)
        if kinds <= {"leaf"}:
            return True
        found = [sizes for value in values if (sizes := _sizes(value, self.collated))]
        fields_fit = bool(found) and all(self.size in sizes for sizes in found)
        are_records = kinds <= {kind for kind in kinds if kind[0] == "record"}
        if fields_fit:
            return len(kinds) == 1 and not self.collated and (are_records or not is_outermost)
        return len(kinds) == 1 or are_records


def _sizes(value: Any, collated: bool) -> list[int]:
    """What the number of samples may be, to judge by this value alone; the likeliest first."""
    if isinstance(value, PackedSequence):
        return [int(value.batch_sizes[0])]
    if isinstance(value, Tensor) or _is_numpy(value, "ndarray"):
        return [value.shape[0]] if value.ndim else []
    fields = _fields(value)
    if not fields:
        return []
    found = [sizes for field in fields.values() if (sizes := _sizes(field, collated))]
    votes = Counter(size for sizes in found for size in sizes)
    likeliest = [size for size in votes if votes[size] == max(votes.values())]
    if not _is_plain_sequence(value):
        return likeliest
    kinds = _kinds(value)
    all_agree = bool(found) and votes[likeliest[0]] == len(found)
    are_records = kinds <= {kind for kind in kinds if kind[0] == "record"}
    if kinds <= {"leaf"} or (not all_agree and (len(kinds) == 1 or are_records)):
        return [len(value)]
    if len(kinds) > 1 or collated:
        return likeliest
    both = [len(value), *likeliest] if are_records else [*likeliest, len(value)]
    return list(dict.fromkeys(both))


def _kinds(values: Iterable[Any]) -> set[Any]:
    """Of the entries but None; samples are all of one kind."""
    return {_kind(value) for value in values if value is not None} or {"leaf"}


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor) or _is_numpy(value, "ndarray"):
        return ("tensor", type(value), value.dtype, value.ndim)
    if isinstance(value, Mapping):
        return ("record", type(value), frozenset(value))
    if dataclasses.is_dataclass(value):
        return ("record", type(value))
    return ("list", type(value)) if isinstance(value, (list, tuple)) else "leaf"


def _fields(value: Any) -> dict[Any, Any] | None:
    """What a container holds, by key or place; None where it is none."""
    if isinstance(value, Mapping):
        return dict(value.items())
    if isinstance(value, (list, tuple)):
        return dict(enumerate(value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _rebuilt(value: Any, fields: dict[Any, Any]) -> Any:
    """Another container like value, with these fields."""
    if isinstance(value, tuple) and hasattr(value, "_make"):
        return value._make(fields.values())
    if isinstance(value, (list, tuple)):
        return type(value)(fields.values())
    if isinstance(value, Mapping) and not isinstance(value, MutableMapping):
        return type(value)(fields)  # type: ignore[call-arg]  # as one makes a mapping
    new = copy.copy(value)  # with what else it knows: attributes, a default_factory
    for key, field in fields.items():
        if isinstance(new, MutableMapping):
            new[key] = field
        else:
            object.__setattr__(new, key, field)  # of a dataclass, which may be frozen
    return new


def _tensor(t: Tensor) -> Tensor:
    """Of t's dtype, device, strides and need of a gradient, but not pinned: it has no bytes to copy.

    A tensor of its own, so that t's memory can go.
    """
    if t.ndim == 0:
        return t
    if t.layout != torch.strided:
        return torch.empty((0, *t.shape[1:]), dtype=t.dtype, layout=t.layout, device=t.device)
    return t.detach()[:0].clone().requires_grad_(t.requires_grad)


def _packed(packed: PackedSequence) -> PackedSequence:
    """One step of no sequences, which torch's recurrent layers take; without a step they do not."""
    orders = (
        None if order is None else order[:0].clone() for order in (packed.sorted_indices, packed.unsorted_indices)
    )
    return PackedSequence(_tensor(packed.data), torch.zeros(1, dtype=torch.int64, device="cpu"), *orders)


def _is_plain_sequence(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and not hasattr(value, "_make") and len(value) > 0


def _is_numpy(value: Any, name: str) -> bool:
    """An instance of numpy's class of that name; torch works without numpy."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, getattr(numpy, name))


def _unknown(value: Any, path: str) -> TypeError:
    return TypeError(
        "A batch may hold tensors, arrays, numbers, strings, None, and lists, tuples, mappings and dataclasses of "
        f"them; got {path} of type {type(value).__module__}.{type(value).__qualname__}, which could not be emptied. "
        "Pass EvenLoader(..., empty=function), from a batch to an empty one."
    )
