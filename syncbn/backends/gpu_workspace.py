"""Scratch for the sums of a launch: one workspace a stream, and zeros of its own for every captured launch."""

import functools
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from syncbn import torch_private

MOST_STREAMS = 64
CAPTURED_SEMAPHORES = 1 << 16


class Workspace:
    """float64 scratch and int32 zeros for the launches of one stream.

    They follow each other and leave the zeros as they found them.
    """

    def __init__(self, device: torch.device, stream: int, partials: int, semaphores: int) -> None:
        self.stream = stream
        self.partials = torch.empty(max(partials, 1 << 16), dtype=torch.float64, device=device)
        self.semaphores = torch.zeros(max(semaphores, 1 << 12), dtype=torch.int32, device=device)
        self.partials_at, self.semaphores_at = self.partials.data_ptr(), self.semaphores.data_ptr()
        self.most_partials, self.most_semaphores = self.partials.numel(), self.semaphores.numel()

    def has(self, partials: int, semaphores: int) -> bool:
        """Whether a launch with this need fits."""
        return partials <= self.most_partials and semaphores <= self.most_semaphores


_workspaces: dict[tuple[int, int], Workspace] = {}
_arenas: dict[int, list[Tensor]] = {}
_lock = threading.Lock()


def is_capturing(device: torch.device) -> bool:
    """Whether launches on the current stream are being written to a graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """The handle of the stream that a launch goes to."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def questions(device: torch.device) -> tuple[Callable[[], bool], Callable[[], int]]:
    """`is_capturing` and `current_stream` of this device, without looking at it each time."""
    raw_stream = torch_private.raw_cuda_stream
    if device.type != "cuda" or raw_stream is None:
        return lambda: is_capturing(device), lambda: current_stream(device)
    return torch.cuda.is_current_stream_capturing, functools.partial(raw_stream, device.index)


def workspace(device: torch.device, partials: int, semaphores: int) -> tuple[Tensor, Tensor]:
    """float64 scratch and int32 zeros for one launch on the current stream of the (current) device.

    Under graph capture each launch has its own, since a graph may be replayed on any stream, next to any other.
    """
    if is_capturing(device):
        return torch.empty(partials, dtype=torch.float64, device=device), _captured_zeros(device, semaphores)
    key = (device.index or 0, current_stream(device))
    found = _workspaces.get(key)
    if found is None or not found.has(partials, semaphores):
        found = _grow(key, device, partials, semaphores)
    return found.partials, found.semaphores


def known_workspace(index: int, stream: int) -> Workspace | None:
    """That of a device's stream, if there is one."""
    return _workspaces.get((index, stream))


def _grow(key: tuple[int, int], device: torch.device, partials: int, semaphores: int) -> Workspace:
    """A workspace at least twice the last one; its memory belongs to its stream, which alone reuses it when dropped."""
    with _lock:
        last = _workspaces.pop(key, None)
        if last is not None:
            partials, semaphores = max(partials, 2 * last.most_partials), max(semaphores, last.most_semaphores)
        while len(_workspaces) >= MOST_STREAMS:
            _workspaces.pop(next(iter(_workspaces)))
        if device.type == "cuda" and key[0] not in _arenas:
            _arenas[key[0]] = [torch.zeros(CAPTURED_SEMAPHORES, dtype=torch.int32, device=device)]
        found = Workspace(device, key[1], partials, semaphores)
        _workspaces[key] = found
        return found


def _captured_zeros(device: torch.device, semaphores: int) -> Tensor:
    """Zeros of a captured launch's own: set aside before the capture, or, where none are left, filled by the graph."""
    with _lock:
        left = _arenas.get(device.index or 0)
        if not left or left[0].numel() < semaphores:
            return torch.zeros(semaphores, dtype=torch.int32, device=device)
        mine, left[0] = left[0][:semaphores], left[0][semaphores:]
        return mine
