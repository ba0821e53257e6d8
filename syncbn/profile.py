"""Where synchronized layers spend their time: how long their sums over the ranks take, and which rank came last.

Of the ranks in a sum, the one that came last waits least. So each rank measures how long it was in each sum, by its own
clock, or on a GPU by events on the stream; the ranks' times are put together once, at the end.
"""

import contextlib
import os
import time
from array import array
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import comm, groups, torch_private
from syncbn.names import Call, Label, Pooling, Step

recording: "Profile | None" = None
"""The one that is open in this process."""
_HEADS = ("layer", "direction", "calls", "bytes", "ms a call", "% of time", "ms waited", "came last")


class Row(NamedTuple):
    """The sums of one layer in one direction. bytes are those that a rank gave to all calls; seconds is the time in
    them, the mean over the ranks, and share that of the block's; last is the rank that the others waited longest for,
    waited how long that was, and last_calls in how many calls it came last; -1 and 0 of one rank's view alone.
    """

    layer: str
    direction: str
    calls: int
    bytes: int
    seconds: float
    share: float
    waited: float
    last: int
    last_calls: int


class _Sums:
    """Of one group on this rank, in order: which of `kinds` it was, and when it began and ended.

    A kind has what is alike on all ranks, a layer's identity, the direction and the bytes; and what this rank calls it.
    """

    def __init__(self) -> None:
        self.kinds: dict[tuple[str, str, int, str], int] = {}
        self.which, self.spans = array("I"), list[Any]()

    def seconds(self) -> "array[float]":
        """On a GPU, when it has come so far."""
        times = ((a, b) if isinstance(a, float) else (0.0, a.elapsed_time(b) / 1e3) for a, b in self.spans)
        return array("d", (end - begin for begin, end in times))


class Profile:
    """What `profiling` found, alike on every rank once its block has been left.

    rows has a `Row` for each layer and direction, the longest waited for first; waited_for is by rank how long the
    others waited for it; seconds is the block's time, the mean over the ranks; str() of it is a table.
    """

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.waited_for: dict[int, float] = {}
        self.seconds = 0.0
        self._begun = time.perf_counter()
        self._sums: dict[tuple[int, ...], _Sums] = {}
        self._devices: set[torch.device] = set()

    def mark(self, wire: Tensor) -> Any:
        """This moment, on the host or in the stream; None while a graph is captured."""
        if not wire.is_cuda:
            return time.perf_counter()
        if torch.cuda.is_current_stream_capturing():
            return None
        self._devices.add(wire.device)
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's own
        event.record()
        return event

    def add(self, what: "Call | Step | Pooling", direction: str, size: int, begun: Any, ended: Any) -> None:
        """A sum of so many bytes has been taken, between these marks."""
        if begun is None or ended is None:
            return
        sums = self._sums.setdefault(groups.ranks_of(what.group) or (), _Sums())
        label = what.label if isinstance(what, Call) else None
        names = (what.what(),) * 2 if label is None else (label.identity, label.name)
        kind = names[0], direction, size, names[1]
        sums.which.append(sums.kinds.setdefault(kind, len(sums.kinds)))
        sums.spans.append((begun, ended))

    def close(self, is_whole: bool) -> None:
        """Put the ranks' times together; of a block that raised, this rank's alone."""
        for device in self._devices:
            torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - self._begun
        own = {ranks: (list(s.kinds), s.which, s.seconds()) for ranks, s in self._sums.items()}
        world, rank = groups.world(), 0 if groups.world() is None else groups.rank()
        found = {rank: (self.seconds, own)}
        if is_whole and world is not None and groups.size_of(world) > 1:
            found = dict(zip(groups.ranks_of(world) or (), comm.from_all(found[rank], world), strict=True))
        self.seconds = sum(seconds for seconds, _ in found.values()) / len(found)
        all_ranks = dict.fromkeys(ranks for _, sums in found.values() for ranks in sums)
        rows = [row for ranks in all_ranks for row in _rows(ranks, found, self.waited_for)]
        self.rows = sorted(rows, key=lambda row: -row.waited)

    def straggler(self) -> int | None:
        """The rank that the others waited longest for; None if that is not known."""
        return max(self.waited_for, key=self.waited_for.__getitem__, default=None)

    def __str__(self) -> str:
        if not self.rows:
            return f"No sums over ranks in {self.seconds:.3f} s: this process is alone, or called no layer in training."
        cells = [_HEADS, *(_cells(row) for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        total, calls = sum(row.seconds for row in self.rows), sum(row.calls for row in self.rows)
        lines += [
            f"{calls} sums of {sum(row.bytes for row in self.rows)} bytes in {self.seconds:.3f} s: "
            f"{total:.3f} s in sums, {100 * total / self.seconds:.1f} %"
        ]
        rank = self.straggler()
        if rank is not None:
            waited, most = self.waited_for[rank], next((row for row in self.rows if row.last == rank), self.rows[0])
            text = f"The others waited longest for rank {rank}: {waited:.3f} s, most in {most.layer!r} {most.direction}"
            lines.append(text)
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """A picture of the 30 rows with most time in them, and of how much of that was waiting; needs matplotlib."""
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("Profile.plot draws with matplotlib; got none. Call pip install matplotlib.") from error
        shown = sorted(self.rows, key=lambda row: row.seconds)[-30:]
        figure = Figure(figsize=(9, 1.5 + 0.28 * len(shown)), layout="constrained")
        axes = figure.add_subplot()
        names = [f"{row.layer} {row.direction}" for row in shown]
        axes.barh(names, [1e3 * row.seconds / row.calls for row in shown], color="tab:blue", label="in the sum")
        waited = [1e3 * row.waited / row.calls for row in shown]
        axes.barh(names, waited, 0.4, color="tab:orange", label="others waited for this rank")
        for at, row in enumerate(shown):
            axes.annotate(f" {_who(row)}", (waited[at], at), fontsize=7, va="center")
        axes.set_xlabel("ms a call")
        axes.legend(loc="lower right")
        figure.savefig(path)


def _cells(row: Row) -> tuple[str, ...]:
    per_call, waited = 1e3 * row.seconds / row.calls, 1e3 * row.waited / row.calls
    last = f"{_who(row)}, {row.last_calls} of {row.calls}" if row.last >= 0 else _who(row)
    numbers = str(row.calls), str(row.bytes), f"{per_call:.3f}", f"{100 * row.share:.1f}", f"{waited:.3f}"
    return row.layer, row.direction, *numbers, last


def _who(row: Row) -> str:
    return "not known" if row.last < 0 else f"rank {row.last}"


def _rows(ranks: tuple[int, ...], found: dict[int, Any], waited_for: dict[int, float]) -> Iterator[Row]:
    """Of one group, from what each of its ranks has seen; sums that not all have seen as the same are left out."""
    seen = {rank: found[rank][1][ranks] for rank in ranks if rank in found and ranks in found[rank][1]}
    whole = sum(found[rank][0] for rank in seen)
    kinds = [[kinds[kind] for kind in which] for kinds, which, _ in seen.values()]
    by_kind: dict[tuple[str, str, int, str], list[list[float]]] = {}
    for kind, *others, times in zip(*kinds, zip(*(times for *_, times in seen.values()), strict=False), strict=False):
        if all(other[:-1] == kind[:-1] for other in others):
            by_kind.setdefault(kind, []).append(list(times))
    for (_, direction, size, layer), calls in by_kind.items():
        waited = dict.fromkeys(seen, 0.0)
        came_last = dict.fromkeys(seen, 0)
        for times in calls:
            last = list(seen)[times.index(min(times))]
            waited[last] += max(times) - min(times)
            came_last[last] += 1
        total, last = sum(map(sum, calls)), max(waited, key=lambda rank: (waited[rank], came_last[rank]))
        counted = len(calls), size * len(calls), total / len(seen), total / whole
        if len(seen) < 2:
            yield Row(layer, direction, *counted, 0.0, -1, 0)
            continue
        for rank, seconds in waited.items():
            waited_for[rank] = waited_for.get(rank, 0.0) + seconds
        yield Row(layer, direction, *counted, waited[last], last, came_last[last])


@contextlib.contextmanager
def profiling() -> Iterator[Profile]:
    """Measures the sums over the ranks of every synchronized layer that is called within.

    For each layer and direction: how often, how many bytes, how long a rank is in it on average, which share of the
    block's time that is, which rank came last, and how long the others waited for it. To be entered and left alike on
    every rank: there is one gather at the end. On a GPU events are recorded around each sum, without a wait of the host
    until then. Calls in compiled graphs, and in CUDA graphs that are replayed, are not seen. Nor is it seen when a rank
    is waited for elsewhere, as where DistributedDataParallel sends buffers before the first layer (they are alike, so
    broadcast_buffers=False will do).

    Raises:
        RuntimeError: within another one.

    Example::

        >>> with syncbn.profiling() as profile:
        ...     for images, labels in itertools.islice(loader, 20):
        ...         train_step(images, labels)
        >>> print(profile)
    """
    global recording
    if recording is not None:
        raise RuntimeError("Sums are profiled by one at a time; got profiling() within another. Leave that one first.")
    profile = recording = Profile()
    is_whole = False
    try:
        yield profile
        is_whole = True
    finally:
        recording = None
        profile.close(is_whole)


def begin_label(direction: str, label: Label) -> torch.profiler.record_function | None:
    """Names what runs from now on, in the records of torch.profiler and, by emit_nvtx, NVTX; None if nobody records.

    No context manager, since in a call that nobody records even an empty one would take as long as all else here.
    """
    if torch.compiler.is_compiling() or not torch_private.is_profiled() or torch_private.is_jit_tracing():
        return None
    record = torch.profiler.record_function(f"syncbn.{direction} {label.name}")
    record.__enter__()  # type: ignore[no-untyped-call]  # torch's own
    return record


def end_label(record: torch.profiler.record_function | None) -> None:
    if record is not None:
        record.__exit__(None, None, None)
