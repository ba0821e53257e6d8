"""Layouts as strides, and how they are cut into tiles and programs: pure Python, no Triton, no tensor.

Every (N, C, *S) is seen as (outer, columns, inner). Where all tensors of a call allow it N and S are one dimension,
outer = 1; else outer = N and inner = S. A tile is BLOCK_C columns × BLOCK_I inner positions of one outer index; a
program takes one group of columns and every `splits`-th tile of it, so that the programs, which are all resident at
once, walk through memory together.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from syncbn.backends.gpu_efforts import Effort, pow2

MOST_TILES = 64
"""T tiles per program. A column's pivot is the mean of the first, none being larger: |pivot − mean| ≤ √(T − 1)·σ."""

FOLD_COLUMNS = 512
"""Columns of a folded row, at most: rows of fewer than FOLD_BELOW channels are joined, so that vectors fit."""

FOLD_BELOW = 8

MOST_PLANE = 256
"""Positions of a plane that is seen as a stretch of its sample's row, at most. Such a row is cut between planes, at
vectors if as many planes as that takes, 8 or fewer, fit into a block of columns."""

VECTOR = 16
"""Bytes that a thread loads at once, at most."""

ROW_BYTES = 128
"""Of other programs' sums that a thread has under way when it adds them up."""

MOST_ROWS = 64
"""Rows of other programs' sums that are added up at a time, at most."""

TEAMS_FROM = 3
"""Times that many rows before programs are added up in teams: a team costs a round to memory and back."""

INT32 = 2**31


class Strides(NamedTuple):
    """In elements, of (outer, columns, inner) or (N, C, S)."""

    outer: int
    channel: int
    inner: int


class Shape(NamedTuple):
    """What the tiles cover, and which channel a column belongs to: column, column % fold, or column // plane."""

    outer: int
    columns: int
    inner: int
    positions: int
    fold: int = 0
    plane: int = 0

    @property
    def channels(self) -> int:
        return self.fold or (self.columns // self.plane if self.plane else self.columns)


class Tile(NamedTuple):
    """One program's work: every `splits`-th tile of block_c × block_i, of which `group` columns are its own."""

    group: int
    block_c: int
    block_i: int
    warps: int
    stages: int
    groups: int
    splits: int

    @property
    def programs(self) -> int:
        return self.groups * self.splits


def collapse(shape: Sequence[int], strides: Sequence[int]) -> Strides | None:
    """(N, C, *S) with these strides as (N, C, S); None where the spatial dimensions are not one."""
    if 0 in shape:
        return Strides(0, 0, 0)
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


def are_small_planes(samples: int, channels: int, spatial: int, views: Sequence[Strides], itemsize: int) -> bool:
    """Whether a sample is better seen as one row of all its planes: vectors do not fit into them, or hardly."""
    dense = all(view.channel == spatial and view.inner == 1 for view in views)
    odd = spatial * itemsize % 16 != 0 or spatial * itemsize < 64
    return dense and odd and samples > 0 and channels > 1 and 1 < spatial <= MOST_PLANE


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


def choose(shape: Shape, kind: str, itemsize: int, sms: int, effort: Effort, light: bool = False) -> Tile:
    """The tile of this call: the largest that still gives two programs to each SM, or the smallest there is.

    light: a lane needs more registers than its sums and its value (its own count, or an address of its own where
    vectors do not fit), so that it gets half as many values.
    """
    sizes = [(effort.warps, effort.thread_bytes), (4, effort.thread_bytes), (4, VECTOR)]
    if light:
        sizes = [(4, VECTOR)]
    for warps, thread_bytes in sizes:
        elements = warps * 32 * thread_bytes // itemsize
        group, block_c, block_i = _best_block(shape, kind, itemsize, elements, effort.columns)
        groups = _cdiv(shape.columns, group)
        tiles = shape.outer * _cdiv(shape.inner, block_i)
        if groups * tiles >= 2 * sms:
            break
    resident = sms * max(1, effort.resident * effort.warps // warps)
    splits = max(min(resident // groups, tiles), _cdiv(tiles, MOST_TILES), 1)
    return Tile(group, block_c, block_i, warps, effort.stages, groups, splits)


class Combination(NamedTuple):
    """How programs' sums become a group's: block_k channels from at most block_p columns each; teams of splits, 0 for
    none, whose rows are read block_s at a time; how many float64 that takes, each split's count under a mask included,
    and how many semaphores."""

    block_k: int
    block_p: int
    team: int
    block_s: int
    partials: int
    semaphores: int


def combination(shape: Shape, tile: Tile, light: bool = False) -> Combination:
    """As many rows at a time as keep ROW_BYTES of each thread under way; in teams, where that were many times.

    light: half as many, as in `choose`.
    """
    here = shape.fold or (tile.group // shape.plane if shape.plane else tile.group)
    block_k = pow2(here)
    row_bytes = ROW_BYTES // 2 if light else ROW_BYTES
    block_s = max(1, min(MOST_ROWS, row_bytes // 8 * tile.warps * 32 // (2 * block_k)))
    team = block_s if tile.splits > TEAMS_FROM * block_s > TEAMS_FROM else 0
    teams = _cdiv(tile.splits, team) if team else 0
    partials = tile.groups * (tile.splits + teams) * 2 * block_k + tile.splits
    return Combination(block_k, pow2(tile.group // here), team, block_s, partials, tile.groups * (1 + teams))


def is_even(shape: Shape, tile: Tile) -> bool:
    """Whether no tile reaches over an edge."""
    if shape.positions == 0 or tile.group != tile.block_c:
        return False
    if shape.columns % tile.block_c or shape.inner % tile.block_i:
        return False
    return not shape.fold or shape.positions * shape.fold == shape.inner * shape.columns


def is_wide(shape: Shape, tile: Tile, views: Sequence[Strides]) -> bool:
    """Whether offsets inside a tile, or a position, need 64 bits; a tile's own start always has them."""
    far = max((v.channel * (tile.block_c - 1) + v.inner * (tile.block_i - 1) for v in views), default=0)
    return max(far, shape.inner + tile.block_i, shape.columns + tile.block_c) >= INT32


def _best_block(shape: Shape, kind: str, itemsize: int, elements: int, columns: int) -> tuple[int, int, int]:
    """group, block_c × block_i ≤ elements with the fewest idle lanes and the longest runs; of rows, ≤ columns."""
    if shape.fold or shape.plane:
        group = shape.columns if shape.fold else _planes(shape, itemsize, elements, columns)
        block_c = pow2(group)
        return group, block_c, max(1, min(elements // block_c, pow2(shape.inner)))
    best = (0.0, 0, 1, 1)
    for block_c in _powers(min(elements, pow2(shape.columns), columns if kind == "rows" else elements)):
        block_i = max(1, min(elements // block_c, pow2(shape.inner)))
        run, whole = (block_c, shape.columns) if kind == "rows" else (block_i, shape.inner)
        used = _used(shape.columns, block_c) * _used(shape.inner, block_i) * (block_c * block_i / elements)
        used *= (
            1.0 if run >= whole else min(1.0, {32: 0.6, 64: 0.93, 128: 0.99}.get(run * itemsize, run * itemsize / 64))
        )
        best = max(best, (round(used, 3), -block_c, block_c, block_i))
    return best[2], *best[2:]


def _planes(shape: Shape, itemsize: int, elements: int, columns: int) -> int:
    """Columns of as many whole planes as fit, or as many as it takes to begin the next at a vector."""
    vector = VECTOR // itemsize
    unit = vector // math.gcd(vector, shape.plane)
    planes = min(min(elements, max(columns, unit * shape.plane)) // shape.plane, shape.channels)
    if planes < shape.channels and planes > unit:
        planes -= planes % unit
    return planes * shape.plane


def _used(size: int, block: int) -> float:
    return size / (_cdiv(size, block) * block) if size else 1.0


def _powers(limit: int) -> Iterator[int]:
    return (1 << bit for bit in range(limit.bit_length()))


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
