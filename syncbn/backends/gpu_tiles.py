"""Layouts as strides, and how they are cut into tiles and programs: pure Python, no Triton, no tensor.

Every (N, C, *S) is seen as (outer, columns, inner). Where all tensors of a call allow it N and S are one dimension,
outer = 1; else outer = N and inner = S. A tile is BLOCK_C columns × BLOCK_I inner positions of one outer index; a
program takes one group of columns and a run of consecutive tiles.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

THREAD_BYTES = 32
"""What a thread holds of a full tile: two 16-byte vectors, so that 1024 threads keep 32 KiB of an SM in flight."""

WAVES = 8
"""Programs per SM to aim for before a program gets more than one tile."""

MOST_TILES = 64
"""Tiles per program. A lane's pivot is the first of its at most 64 values, so |pivot − mean| ≤ √63·σ of the lane."""

FOLD_COLUMNS = 512
"""Columns of a folded row, at most: rows of fewer than FOLD_BELOW channels are joined, so that vectors fit."""

FOLD_BELOW = 8

INT32 = 2**31


class Strides(NamedTuple):
    """In elements, of (outer, columns, inner) or (N, C, S)."""

    outer: int
    channel: int
    inner: int


class Shape(NamedTuple):
    """What the tiles cover; fold is the number of channels that a row's columns wrap around, 0 where they do not."""

    outer: int
    columns: int
    inner: int
    fold: int
    positions: int

    @property
    def channels(self) -> int:
        return self.fold or self.columns


class Tile(NamedTuple):
    """One program's work: `per_program` tiles of block_c × block_i; the grid is groups × splits programs."""

    block_c: int
    block_i: int
    warps: int
    per_program: int
    groups: int
    splits: int

    @property
    def programs(self) -> int:
        return self.groups * self.splits


def collapse(shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    """(N, C, *S) with these strides as (N, C, S); None where the spatial dimensions are not one."""
    inner = 0
    covered = 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size == 1:
            continue
        if covered == 1:
            inner = stride
        elif stride != inner * covered:
            return None
        covered *= size
    return Strides(strides[0], strides[1] if shape[1] > 1 else 0, inner)


def merge(samples: int, spatial: int, views: Sequence[Strides]) -> tuple[int, int, list[Strides]]:
    """outer, inner and the strides of (outer, C, inner): N and S as one where every view allows it, or none is left."""
    if samples * spatial == 0:
        return 1, 0, [Strides(0, view.channel, view.inner) for view in views]
    if spatial == 1:
        return 1, samples, [Strides(0, view.channel, view.outer) for view in views]
    if samples == 1 or all(view.outer == view.inner * spatial for view in views):
        return 1, samples * spatial, [Strides(0, view.channel, view.inner) for view in views]
    return samples, spatial, list(views)


def kind_of(view: Strides, columns: int, inner: int) -> str:
    """Where a vector lies: along the columns ("rows"), along the positions ("planes"), nowhere ("strided")."""
    if view.inner == 1 and (columns == 1 or view.channel != 1 or inner > columns):
        return "planes"
    if view.channel == 1 or (columns == 1 and inner == 1):
        return "rows"
    return "planes" if inner == 1 and view.channel != 0 else "strided"


def fold_factor(channels: int, positions: int, views: Sequence[Strides]) -> int:
    """How many pixels make one row of at most FOLD_COLUMNS; 0 where the rows are long enough or have gaps."""
    dense = all(view == Strides(0, 1, channels) for view in views)
    if not dense or not 1 < channels < FOLD_BELOW or not 0 < positions * channels < INT32 - FOLD_COLUMNS**2:
        return 0
    pixels = 16 // math.gcd(16, channels)
    return pixels * (FOLD_COLUMNS // (pixels * channels))


def alignment(shape: Shape, kind: str, kinds: Sequence[str], views: Sequence[Strides], itemsize: int) -> int:
    """The largest power of two, up to one 16-byte vector, that divides every row or plane start and length."""
    numbers = []
    if kind == "rows":
        numbers.append(shape.columns)
    elif kind == "planes":
        numbers.append(shape.inner)
    if shape.fold:
        numbers.append(shape.positions)
    for each, view in zip(kinds, views, strict=True):
        if each == "rows":
            numbers += [view.outer, view.inner]
        elif each == "planes":
            numbers += [view.outer, view.channel]
    return math.gcd(16 // itemsize, *numbers)


def choose(shape: Shape, kind: str, itemsize: int, sms: int, light: bool = False) -> Tile:
    """The tile of this call: the largest that still gives two programs to each SM, or the smallest there is.

    light: a lane needs more registers than its sums and its value (its own count, or an address of its own where
    vectors do not fit), so that it gets half as many values.
    """
    sizes = [(8, THREAD_BYTES), (4, THREAD_BYTES), (4, THREAD_BYTES // 2)]
    if light:
        sizes = [(4, THREAD_BYTES // 2)]
    for warps, thread_bytes in sizes:
        block_c, block_i = _best_block(shape, kind, itemsize, warps * 32 * thread_bytes // itemsize)
        groups = _cdiv(shape.columns, block_c)
        tiles = shape.outer * _cdiv(shape.inner, block_i)
        if groups * tiles >= 2 * sms:
            break
    per_program = min(max(groups * tiles // (WAVES * sms), 1), MOST_TILES)
    return Tile(block_c, block_i, warps, per_program, groups, max(_cdiv(tiles, per_program), 1))


def is_even(shape: Shape, tile: Tile) -> bool:
    """Whether no tile reaches over an edge."""
    if shape.positions == 0 or shape.columns % tile.block_c or shape.inner % tile.block_i:
        return False
    return not shape.fold or shape.positions * shape.fold == shape.inner * shape.columns


def is_wide(shape: Shape, tile: Tile, views: Sequence[Strides]) -> bool:
    """Whether offsets inside a tile, or a position, need 64 bits; a tile's own start always has them."""
    far = max((v.channel * (tile.block_c - 1) + v.inner * (tile.block_i - 1) for v in views), default=0)
    return max(far, shape.inner + tile.block_i, shape.columns + tile.block_c) >= INT32


def _best_block(shape: Shape, kind: str, itemsize: int, elements: int) -> tuple[int, int]:
    """block_c × block_i ≤ elements with the fewest idle lanes and runs of 128 bytes or more."""
    if shape.fold:
        block_c = _pow2(shape.columns)
        return block_c, max(1, min(elements // block_c, _pow2(shape.inner)))
    best = (0.0, 0, 1, 1)
    for block_c in _powers(min(elements, _pow2(shape.columns))):
        block_i = max(1, min(elements // block_c, _pow2(shape.inner)))
        run, whole = (block_c, shape.columns) if kind == "rows" else (block_i, shape.inner)
        used = _used(shape.columns, block_c) * _used(shape.inner, block_i) * (block_c * block_i / elements)
        used *= (
            1.0 if run >= whole else min(1.0, {32: 0.6, 64: 0.93, 128: 0.99}.get(run * itemsize, run * itemsize / 64))
        )
        best = max(best, (round(used, 3), -block_c, block_c, block_i))
    return best[2:]


def _used(size: int, block: int) -> float:
    return size / (_cdiv(size, block) * block) if size else 1.0


def _powers(limit: int) -> Iterator[int]:
    return (1 << bit for bit in range(limit.bit_length()))


def _pow2(size: int) -> int:
    return 1 << max(size - 1, 0).bit_length()


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
