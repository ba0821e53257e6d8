"""What a device tells the host while nobody waits for it: a few numbers in pinned memory of the host.

    report (4) float64    tag of the first call that was mixed up, or 0; the sums V and Q that it found, see
                          fingerprint.py; the turn of the last call that the device has come to

Kernels write there over the bus, a number or two a call. It never moves: captured launches keep its address.
"""

import threading

import torch
from torch import Tensor

from syncbn.backends.gpu_workspace import is_capturing

_reports: dict[int, Tensor] = {}
_lock = threading.Lock()


def report_of(device: torch.device) -> Tensor:
    """That of a device; where there is none, as in Triton's interpreter, an ordinary tensor.

    Pinned memory cannot be had within a capture: a device's first call, if captured, reports to nobody.
    """
    index = device.index or 0
    found = _reports.get(index)
    if found is None:
        if is_capturing(device):
            return torch.zeros(4, dtype=torch.float64, device=device)
        with _lock:
            found = _reports.setdefault(index, torch.zeros(4, dtype=torch.float64, pin_memory=device.type == "cuda"))
    return found
