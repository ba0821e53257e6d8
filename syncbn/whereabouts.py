"""Where a rank is, in words: what each says of itself, the table of all, and what usually causes such a picture."""

import json
import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any, NamedTuple

import torch

from syncbn.names import BACKWARD, FORWARD

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
_STANDARD = (sysconfig.get_path("stdlib") + os.sep, "<frozen")
LINES = {"silent": 0, "ended": 1, "outside": 2, "waiting": 3}


class Where(NamedTuple):
    """One rank. state is waiting (in a layer, or EvenLoader), outside (then the layer is its last), ended or silent.

    progress counts the collectives of all kinds that it has started on the group.
    """

    rank: int
    state: str
    layer: str = ""
    direction: str = ""
    call: int = 0
    like: str = ""
    seconds: float = 0.0
    at: str = ""
    progress: int = 0
    host: str = ""

    def encoded(self) -> str:
        """For the store."""
        return json.dumps(self._asdict())

    @classmethod
    def decoded(cls, text: str | bytes) -> "Where":
        return cls(**json.loads(text))

    def line(self) -> str:
        """A row of the table."""
        head = f"rank {self.rank}" + (f" ({self.host})" if self.host else "")
        like = f", {self.like}" if self.like else ""
        layer = f"{self.layer} {self.direction}, call {self.call}{like}" if self.layer else ""
        if self.state == "silent":
            return f"{head}: does not answer"
        if self.state == "ended":
            return f"{head}: has ended{self.at and ': '}{self.at}"
        if self.state == "waiting":
            return f"{head}: {self.seconds:.0f} s in {layer}; {self.at}"
        last = f"; its last was {layer}, {self.seconds:.0f} s ago" if layer else ""
        return f"{head}: in no synchronized layer{last}; {self.at}"


def stack_of_main(inside: bool) -> str:
    """File, line and function of the main thread: the innermost of the user's own, and the library's that it called."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "its main thread has ended"
    frames = [frame]
    while (frame := frame.f_back) is not None:
        frames.append(frame)
    libraries = [each for each in frames if not _is_of(each, _STANDARD)]
    own = [each for each in libraries if not _is_of(each, (_TORCH, _OURS))] or frames
    called = f", inside {_spot(libraries[0])}" if inside and libraries and libraries[0] is not own[0] else ""
    return f"at {_spot(own[0])}{called}"


def table(title: str, found: list[Where]) -> str:
    """The title, a line for each rank, the missing and the most advanced first, and the usual causes."""
    rows = sorted(found, key=lambda w: (LINES[w.state], -w.progress, w.rank))
    return "\n".join([title, *(f"  {row.line()}" for row in rows), *causes(found)])


def causes(found: list[Where]) -> list[str]:
    """What usually causes this picture, and what to do."""
    by_state: dict[str, list[Where]] = {}
    for each in found:
        by_state.setdefault(each.state, []).append(each)
    waiting, outside = by_state.get("waiting", []), by_state.get("outside", [])
    texts = []
    if gone := by_state.get("ended"):
        texts.append(
            f"{_ranks(gone)} ended before the others: an error there, which comes first, or a loader with fewer "
            "batches (syncbn.EvenLoader gives all ranks as many steps)."
        )
    if silent := by_state.get("silent"):
        texts.append(f"{_ranks(silent)}: killed (out of memory?), cut off, stuck where Python cannot answer, or new.")
    if loading := [w for w in outside if "data" in w.at and "loader" in w.at]:
        texts.append(f"{_ranks(loading)} fetching data: a slow or stuck loader.")
    if communicating := [w for w in outside if w not in loading and f"torch{os.sep}distributed" in w.at]:
        texts.append(
            f"{_ranks(communicating)} in another collective: the ranks take different ways. Often one evaluates with "
            "the model in train mode (call model.eval()), or a loader ran dry (syncbn.EvenLoader)."
        )
    if others := [w for w in outside if w not in loading and w not in communicating]:
        texts.append(
            f"{_ranks(others)} at other work: slow, stuck, out of the training loop, or in a branch without this layer."
        )
    calls = {(w.layer, w.direction) for w in waiting}
    if len(calls) > 1:
        texts.append(_of_different(calls))
    elif waiting and len(waiting) == len(found):
        texts.append("All are in the same call: if they wait, the network or earlier work on the device is stuck.")
    return [f"  -> {text}" for text in texts]


def _of_different(calls: set[tuple[str, str]]) -> str:
    if len({layer for layer, _ in calls}) == 1 or {direction for _, direction in calls} == {FORWARD, BACKWARD}:
        return (
            "Some ranks are in a forward and some in a backward pass: one calls the model once more or less, as when "
            "it evaluates in train mode (call model.eval()), or skips a backward pass."
        )
    return (
        "The ranks are in different layers: a branch skips a layer or calls one more often on some ranks. "
        "Call the same layers in the same order on all; an empty batch will do."
    )


def _ranks(found: list[Where]) -> str:
    return f"rank{'s' * (len(found) > 1)} {', '.join(str(w.rank) for w in found)}"


def _spot(frame: FrameType) -> str:
    name: Any = frame.f_code.co_filename
    for prefix in (os.path.dirname(_TORCH[:-1]) + os.sep, os.getcwd() + os.sep):
        name = name.removeprefix(prefix)
    return f"{name}:{frame.f_lineno} in {frame.f_code.co_name}"


def spans(ranks: Sequence[int]) -> str:
    """0-3, 8 for 0, 1, 2, 3, 8."""
    found: list[list[int]] = []
    for rank in sorted(ranks):
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _is_of(frame: FrameType, folders: tuple[str, ...]) -> bool:
    name = frame.f_code.co_filename
    return name.startswith(folders) and not (folders is _STANDARD and "site-packages" in name)
