"""Inputs that are cold: how many copies of them, whether there is room, and an L2 cache with nothing left to write.

Cold means that a call finds its inputs in no cache: the calls of one repetition walk through copies of the inputs that
together are four times the L2 cache, and keep their outputs. Hot means the same inputs again and again.
A cold repetition begins with an L2 that holds nothing to be written: else it would pay for what the variant before it
wrote last, which on an H200 made the one after the copy up to 9 % slower.
"""

import functools

import torch
from torch import Tensor

from benchmarks.checking import Case

COLD_TIMES_L2 = 4
MOST_COPIES = 96
"""Calls in one repetition at most; inputs so small that these are not four times the L2 count as "partial"."""
GIGABYTE = 1 << 30


def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache as the driver reports it; a stand-in on CPU, where only the logic matters."""
    if device.type != "cuda":
        return 1 << 12
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_for(bytes_per_call: int, cold: bool, device: torch.device) -> int:
    """How many copies of the inputs a repetition walks through."""
    if not cold:
        return 1
    wanted = COLD_TIMES_L2 * l2_bytes(device)
    return max(2, min(MOST_COPIES, -(-wanted // max(1, bytes_per_call))))


def cache_state(copies: int, bytes_per_call: int, device: torch.device) -> str:
    """hot, cold, or partial: a walk too short to push everything out of the L2."""
    if copies == 1:
        return "hot"
    return "cold" if copies * bytes_per_call >= COLD_TIMES_L2 * l2_bytes(device) else "partial"


def clean_l2(device: torch.device) -> None:
    """Fill the L2 with what is only read, so that what it had to write is written."""
    _unwritten(device).amax()


@functools.lru_cache(maxsize=1)
def _unwritten(device: torch.device) -> Tensor:
    """Twice the L2 cache of zeros."""
    return torch.zeros(2 * l2_bytes(device) // 4, device=device)


def duplicate(t: Tensor, count: int) -> list[Tensor]:
    """t and count − 1 copies with its strides, each a leaf as t is."""
    return [t, *(t.detach().clone().requires_grad_(t.requires_grad) for _ in range(count - 1))]


def fits(bytes_needed: int, device: torch.device) -> bool:
    """Whether a comparison of that size leaves some memory free, for captures too.

    What the allocator has cached, an earlier graph's pool above all, is nothing that a capture may use or give back:
    where it is needed it is given back now.
    """
    if device.type != "cuda":
        return True
    if bytes_needed + GIGABYTE >= torch.cuda.mem_get_info(device)[0]:
        torch.cuda.empty_cache()
    return bytes_needed + GIGABYTE < torch.cuda.mem_get_info(device)[0]


def rotation(case: Case, copies: int) -> list[Case]:
    """The case and its equals at other addresses; they share the parameters."""
    xs, dys = (duplicate(t, copies) for t in (case.x, case.dy))
    residuals = [None] * copies if case.residual is None else duplicate(case.residual, copies)
    parts = zip(xs, dys, residuals, strict=True)
    return [case._replace(x=x, dy=dy, residual=residual) for x, dy, residual in parts]
