"""What a layer calls itself, the same on every rank, so that an error can say which layer it is."""

import itertools
import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.distributed import ProcessGroup

from syncbn import torch_private

FORWARD, BACKWARD = "forward", "backward"
_numbers = itertools.count(1)
_labels: "weakref.WeakSet[Label]" = weakref.WeakSet()
_orders: "weakref.WeakKeyDictionary[ProcessGroup, itertools.count[int]]" = weakref.WeakKeyDictionary()


class _Counts:
    """Of a layer's calls over one group.

    order is the layer's among those without a path that were called there, nth a call's since the last backward.
    """

    __slots__ = ("nth", "order", "went_back")

    def __init__(self) -> None:
        self.order = self.nth = 0
        self.went_back = False


class Label:
    """A layer's name, and how its calls on this rank are counted. Copies and pickles keep the name and count anew.

    channels and activation are the layer's, to tell from its fingerprint a call that only another rank makes.
    identity is what ranks compare: the path; of a layer that has none, its order among the first calls over the group,
    since the number in its name counts layers that one rank may have built for itself.
    """

    __slots__ = (
        "__weakref__",
        *("activation", "calls", "channels", "counts", "identity", "is_path", "name", "tags"),
        *("_by_group", "_group"),
    )

    def __init__(self, name: str, channels: int = 0, activation: str | None = None, is_path: bool = False) -> None:
        self.name, self.channels, self.activation, self.is_path = name, channels, activation, is_path
        self.calls, self.identity = 0, name
        self.counts: _Counts | None = None
        self.tags: dict[tuple[Any, ...], float] = {}
        self._by_group: weakref.WeakKeyDictionary[ProcessGroup, _Counts] = weakref.WeakKeyDictionary()
        self._group: weakref.ref[ProcessGroup] | None = None
        _labels.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Label":
        return Label(self.name, self.channels, self.activation, self.is_path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Label, (self.name, self.channels, self.activation, self.is_path)

    def __repr__(self) -> str:
        return f"Label({self.name!r})"

    def what(self) -> str:
        return f"layer {self.name!r}"

    def group(self) -> ProcessGroup | None:
        """The last one it was called over, if it is still there."""
        return None if self._group is None else self._group()

    def rename(self, path: str) -> None:
        self.name = self.identity = path
        self.is_path = True
        self.tags.clear()

    def counts_over(self, group: ProcessGroup) -> _Counts:
        if self.counts is not None and self.group() is group:
            return self.counts
        counts = self._by_group.get(group)
        if counts is None:
            counts = self._by_group[group] = _Counts()
        self.counts, self._group = counts, weakref.ref(group)
        if not self.is_path and self is not FUNCTION:
            counts.order = counts.order or next(_orders.setdefault(group, itertools.count(1)))
            self.identity = f"#{counts.order}"
            self.tags.clear()
        return counts


class Call:
    """A synchronized call of a layer: its forward, and later its backward. number is the layer's on this rank.

    direction is that of its newest sum over the ranks, tag what stands for that on the wire, turn its place in the
    order of such sums on a device.
    """

    __slots__ = (
        *("activation", "counts", "direction", "dtype", "group", "label"),
        *("needs_grad", "nth", "number", "shape", "tag", "turn"),
    )

    def __init__(self, label: Label, group: ProcessGroup, x: Tensor, activation: str | None, needs_grad: bool) -> None:
        self.counts = counts = label.counts_over(group)
        self.label, self.group, self.needs_grad = label, group, needs_grad
        self.activation = activation if label is FUNCTION else label.activation  # that of a call may depend on hooks
        self.shape, self.dtype = x.shape, x.dtype
        self.number, self.nth = label.calls + 1, 1 if counts.went_back else counts.nth + 1
        self.direction, self.tag, self.turn = "", 0.0, 0

    def went(self, direction: str) -> None:
        """Count it, now that its sum was taken; one that failed before, for want of memory say, is made again."""
        if direction == FORWARD:
            self.label.calls, self.counts.nth, self.counts.went_back = self.number, self.nth, False
        else:
            self.counts.went_back = True

    def what(self) -> str:
        """Whose call it is."""
        return self.label.what()

    def like(self) -> str:
        """What of it must be alike on all ranks, besides its name."""
        return worded(self.shape[1], self.activation, self.needs_grad)


class Step(NamedTuple):
    """Not a layer's call but a loader's, for which ranks wait as well: whether there is a next batch."""

    group: ProcessGroup
    number: int

    def what(self) -> str:
        return "EvenLoader"

    def like(self) -> str:
        return "the next batch"


class Pooling(NamedTuple):
    """The one sum of a function that pools the statistics of all layers."""

    group: ProcessGroup
    function: str
    number: int = 1

    def what(self) -> str:
        return f"syncbn.{self.function}"

    def like(self) -> str:
        return "the sums of all layers"


Place = tuple[Call | Step | Pooling, str, float]
"""A call, its direction, and when it began or ended, by time.monotonic()."""

FUNCTION = Label("syncbn.functional.sync_batch_norm")
"""Of calls that no layer makes."""


def numbered(kind: str, channels: int, activation: str | None) -> Label:
    """The label of a layer that nobody has named: by order of construction."""
    size = f" ({channels} channels)" if channels else ""
    return Label(f"{kind} #{next(_numbers)}{size}", channels, activation)


def worded(channels: int, activation: str | None, needs_grad: bool) -> str:
    """Of a call."""
    parts = (f"{channels} channels", activation, None if needs_grad else "no gradient")
    return ", ".join(filter(None, parts))


def known_labels() -> list[Label]:
    """Of all layers of this process."""
    while True:
        try:
            return list(_labels)
        except RuntimeError:  # another thread made a layer meanwhile
            continue


def name_by_path(root: nn.Module, anew: bool = False) -> None:
    """The labels below root by their layers' paths; those that are paths already stay, unless anew."""
    for name, module in root.named_modules():
        label = module.__dict__.get("_label")
        if isinstance(label, Label) and (anew or not label.is_path) and (path := path_of(root, name)):
            label.rename(path)


def path_of(model: nn.Module, name: str) -> str:
    """A name of `model.named_modules()` without what wrappers put in, such as DDP's `module.`"""
    parts: list[str] = []
    module = model
    for part in name.split(".") if name else ():
        is_wrapper = type(module).__module__.startswith(("torch.nn.parallel.", "torch.distributed."))
        if part not in torch_private.WRAPPED and not (part == "module" and is_wrapper):
            parts.append(part)
        module = module.get_submodule(part)
    return ".".join(parts)
