"""How far a device has come with the calls that the host has enqueued, and whether one of them was mixed up.

A kernel after each sum compares the fingerprint and writes what it finds, and the number of its turn, to a few bytes of
the host's memory, see gpu_report.py; the host reads them when it enqueues the next call, and the watch now and then.
Nobody waits for a device, and what is captured in a graph takes no turn.
"""

import ctypes
import threading
import time
from typing import NamedTuple

import torch

from syncbn.backends import is_capturing, name_for, report_of
from syncbn.fingerprint import Found
from syncbn.names import Call, Place

RECENT = 4096
"""Calls that the host may be ahead of the device and still know by name."""
TURNS = 1 << 30
"""They are counted from 1 to this, and again: a kernel takes an int32."""
_Four = ctypes.c_double * 4


class _Enqueued(NamedTuple):
    place: Place
    tag: float


class Progress:
    """Of one device."""

    def __init__(self, device: torch.device) -> None:
        self._kept = report_of(device)
        self._report = _Four.from_address(self._kept.data_ptr())
        self._recent: list[_Enqueued | None] = [None] * RECENT
        self._lock = threading.Lock()
        self._turns, self._came, self._since = 0, 0, 0.0
        self._shown: tuple[int, Place] | None = None

    def enqueue(self, call: Call) -> int:
        """The number of the turn of this call's sum."""
        with self._lock:
            self._turns = self._turns % TURNS + 1
            place = call, call.direction, time.monotonic()
            self._recent[self._turns % RECENT] = _Enqueued(place, call.tag)
            return self._turns

    def mixed_up(self) -> Found | None:
        """The first call of which the device found other ranks in another one."""
        return Found(*self._report[:3]) if self._report[0] else None

    def forget(self) -> None:
        """What was mixed up has been raised."""
        self._report[0] = 0.0

    def clear(self) -> None:
        """Of calls over a group that is gone."""
        self._recent, self._shown = [None] * RECENT, None

    def place_of(self, tag: float) -> Place | None:
        """The newest call that had it."""
        known = [each.place for each in self._recent if each is not None and each.tag == tag]
        return max(known, key=lambda place: place[2], default=None)

    def waiting(self) -> Place | None:
        """The call whose turn has not come, since it was enqueued or since the one before it came."""
        came = int(self._report[3])
        if came != self._came:
            self._came, self._since = came, time.monotonic()
        ahead, next_one = (self._turns - came) % TURNS, self._recent[(came % TURNS + 1) % RECENT]
        if not 0 < ahead < RECENT or next_one is None:
            return None
        if self._shown is None or self._shown[0] != came:
            call, direction, since = next_one.place
            self._shown = came, (call, direction, max(since, self._since))
        return self._shown[1]


_all: dict[int, Progress] = {}


def of(device: torch.device) -> Progress | None:
    """Of a device whose kernels write; None while a graph is captured there, and where none do."""
    if device.type != "cuda" or is_capturing(device):
        return None
    found = _all.get(device.index or 0)
    if found is None and name_for(torch.empty(0, dtype=torch.float64, device=device)) == "gpu":
        found = _all.setdefault(device.index or 0, Progress(device))
    return found


def every() -> list[Progress]:
    return list(_all.values())
