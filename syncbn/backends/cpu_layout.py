"""How the cpu back-end sees a tensor: two layouts, cut into blocks that stay in cache."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256 * 1024
"""Elements a thread works on at a time. Of 32 K to 256 K the best on every layout (AMD EPYC 9004, 2026-11)."""


class Block(NamedTuple):
    at: tuple[slice, ...]
    channels: slice


class Layout:
    """(N, C, *S) as rows (M, C) when the channels are innermost, else as planes (N, C, S)."""

    def __init__(self, x: Tensor) -> None:
        samples, channels, *spatial = x.shape
        self.spatial = tuple(spatial)
        pixels = spatial[0] if len(spatial) == 1 else torch.Size(spatial).numel()
        planes = pixels > 1 and x.is_contiguous()
        self.rows = not planes and x.movedim(1, -1).is_contiguous()
        self.sizes = (samples, channels, pixels)
        self.shape: tuple[int, ...] = (samples * pixels, channels) if self.rows else self.sizes
        self.dims = (0,) if self.rows else (0, 2)

    def flatten(self, t: Tensor) -> Tensor:
        """A view where t's strides allow it, else a copy."""
        return (t.movedim(1, -1) if self.rows else t).reshape(self.shape)

    def flatten_mask(self, mask: Tensor | None) -> Tensor | None:
        """True where a position is left out; broadcasts over the channels."""
        if mask is None:
            return None
        samples, _, pixels = self.sizes
        return ~mask.reshape((samples * pixels, 1) if self.rows else (samples, 1, pixels))

    def new_like(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """An output in x's shape and format, and the same memory flattened; the output is no view, so that what
        follows the layer may work in place.
        """
        order = (0, *range(2, x.ndim), 1) if self.rows else range(x.ndim)
        t = torch.empty_permuted(x.shape, tuple(order), dtype=x.dtype, device=x.device)
        return t, (t.movedim(1, -1) if self.rows else t).view(self.shape)

    def four(self, t: Tensor) -> Tensor:
        """A flat tensor or block as 4-d, in the memory format for which ATen's batch norm is fast."""
        return t.view(1, t.shape[0], 1, t.shape[1]).permute(0, 3, 1, 2) if self.rows else t.unsqueeze(-1)

    def per_channel(self, t: Tensor) -> Tensor:
        return t if self.rows else t.view(-1, 1)

    def blocks(self) -> Iterator[Block]:
        """Contiguous pieces of at most BLOCK elements for each thread, in a fixed order."""
        limit = BLOCK * torch.get_num_threads()
        samples, channels, pixels = self.sizes
        if self.rows:
            every = slice(None)
            for rows in _ranges(samples * pixels, limit // channels):
                yield Block((rows, every), every)
            return
        for n in _ranges(samples, limit // max(1, channels * pixels)):
            for c in _ranges(channels, limit // max(1, pixels)):
                for s in _ranges(pixels, limit):
                    yield Block((n, c, s), c)


class Scratch:
    """One block-sized buffer, reused for every block of a call."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.buffer = torch.empty(0, dtype=dtype, device="cpu")

    def like(self, block: Tensor) -> Tensor:
        if self.buffer.numel() < block.numel():
            self.buffer = self.buffer.new_empty(block.numel())
        return self.buffer[: block.numel()].view(block.shape)


def _ranges(size: int, step: int) -> Iterator[slice]:
    step = max(1, step)
    return (slice(start, min(start + step, size)) for start in range(0, size, step))
