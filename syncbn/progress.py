"""How far a device has come with the calls that the host has enqueued, and whether one of them was mixed up.

A kernel after each sum compares the fingerprint and writes what it finds, and the number of its turn, to a few bytes of
pinned host memory; the host reads them when it enqueues the next call, and the watch now and then. Nobody waits.

    report    tag of the first call that was mixed up, or 0; the sums V and Q it found; the last turn that came
"""

import ctypes
import threading
import time

from torch import Tensor

from syncbn.fingerprint import Found
from syncbn.names import Call

Place = tuple[Call, str, float]
RECENT = 4096
"""Calls that the host may be ahead of the device and still know by name."""
_Four = ctypes.c_double * 4


class Progress:
    """Of one device."""

    def __init__(self, report: Tensor) -> None:
        self._kept = report
        self._report = _Four.from_address(report.data_ptr())
        self._places: list[Place | None] = [None] * RECENT
        self._lock = threading.Lock()
        self.turns = 0
        self._seen = 0, 0.0
        self._shown: tuple[int, Place] | None = None

    def enqueue(self, call: Call, direction: str) -> int:
        """The number of this call's turn."""
        with self._lock:
            self.turns += 1
            self._places[self.turns % RECENT] = call, direction, time.monotonic()
            return self.turns

    def mixed_up(self) -> tuple[Place | None, Found] | None:
        """The first call of which the device found other ranks in another one, once; None if there is none."""
        if self._report[0] == 0.0:
            return None
        found = Found(*self._report[:3])
        self._report[0] = 0.0
        return next((p for p in self._places if p is not None and p[2] == found.tag), None), found

    def waiting(self) -> Place | None:
        """The call whose turn has not come, since it was enqueued or the one before it came."""
        came, turns = int(self._report[3]), self.turns
        if came >= turns:
            return None
        if came != self._seen[0]:
            self._seen = came, time.monotonic()
        place = self._places[(came + 1) % RECENT] if turns - came < RECENT else None
        if place is None:
            return None
        if self._shown is None or self._shown[0] != came:
            self._shown = came, (place[0], place[1], max(place[2], self._seen[1]))
        return self._shown[1]
