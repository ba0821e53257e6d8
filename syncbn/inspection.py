"""Check mode: before each collective all ranks tell each other, in messages of one size, which call they are in.

It costs one more collective a call, over gloo and from the CPU, on which the host waits; nothing that could abort or
hang is sent before. `SYNCBN_CHECK=1` turns it on for a process, `checking` for a while; alike on every rank.
Calls in compiled graphs are not looked at; `TORCH_COMPILE_DISABLE=1` runs them uncompiled.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from syncbn import comm, groups
from syncbn.names import BACKWARD, Call

ROW = 512
"""Bytes in which a rank says where it is."""
_open = 0
"""How many `checking` blocks this process is in."""


@functools.cache
def _always() -> bool:
    return os.environ.get("SYNCBN_CHECK", "0") not in ("", "0")


def is_on() -> bool:
    return _open > 0 or _always()


@contextlib.contextmanager
def checking() -> Iterator[None]:
    """Within it, every synchronized call of this process first compares with the other ranks which call it is.

    Layer, direction, channels, dtype, activation and whether a gradient is needed must be alike.
    To be entered alike on every rank, it costs one more collective a call; `SYNCBN_CHECK=1` does the same for a whole
    process. A rank that does not come within the watch's patience (`SYNCBN_WATCH`, 60 s) is an error, too.

    Raises:
        RuntimeError: by the layer's call, on all ranks, with a table of where each of them is; nothing has been sent
            or moved by then.
    """
    global _open
    _open += 1
    try:
        yield
    finally:
        _open -= 1


class Row(NamedTuple):
    """What a rank says of its call; shape is shown, the rest is compared."""

    layer: str
    direction: str
    nth: int
    channels: int
    dtype: str
    activation: str | None
    needs_gradient: bool
    shape: list[int]

    @classmethod
    def of(cls, call: Call, direction: str) -> "Row":
        nth = call.nth if direction is BACKWARD else 0
        name = call.label.name[-ROW // 4 :]
        dtype = str(call.dtype).removeprefix("torch.")
        return cls(name, direction, nth, call.shape[1], dtype, call.activation, call.needs_grad, list(call.shape[:8]))

    def text(self) -> str:
        nth = f" of its call {self.nth} in this step" if self.nth > 1 else ""
        activation = f", {self.activation}" if self.activation else ""
        gradient = "" if self.needs_gradient else ", no gradient"
        return f"{self.layer!r} {self.direction}{nth}: {tuple(self.shape)} {self.dtype}{activation}{gradient}"


def compare(call: Call, direction: str, patience: float) -> str | None:
    """What differs between the ranks, as a table; None if nothing does."""
    ranks = groups.ranks_of(call.group) or ()
    rows = torch.zeros(len(ranks), ROW, dtype=torch.uint8)
    own = json.dumps(Row.of(call, direction)).encode()
    rows[groups.rank(call.group), : len(own)] = torch.frombuffer(bytearray(own), dtype=torch.uint8)
    side = comm.side_group(call.group, patience)
    comm.all_sum(rows, side)
    found = [_decoded(row.numpy().tobytes()) for row in rows]
    if all(row[:-1] == found[0][:-1] for row in found):
        return None
    with contextlib.suppress(RuntimeError):  # whoever raises may end and take its connections with it: let all read on
        comm.all_sum(torch.zeros(1), side)
    return "\n".join(f"  rank {rank}: {row.text()}" for rank, row in zip(ranks, found, strict=True))


def _decoded(raw: bytes) -> Row:
    values: list[Any] = json.loads(raw.rstrip(b"\0"))
    return Row(*values)
