"""How calls are cut into tiles: enough programs for every SM, every element once, vectors where they fit."""

import itertools
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.backends.gpu_efforts import EFFORTS, effort_of
from syncbn.backends.gpu_tiles import (
    MOST_TILES,
    Shape,
    Strides,
    Tile,
    alignment,
    are_small_planes,
    choose,
    collapse,
    combination,
    fold_factor,
    is_even,
    is_wide,
    kind_of,
    merge,
)

SMS = 132
VERBS = list(EFFORTS)

RESNET = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14)]
RESNET += [(512, 7), (2048, 7)]
IMAGES = [(batch, channels, size, size) for batch in (2, 8, 32) for channels, size in RESNET]
IMAGES += [(2, 64, 400, 672), (2, 256, 200, 336), (2, 512, 100, 168), (2, 1024, 50, 84), (2, 2048, 25, 42)]
IMAGES += [(8, channels, 512 // down, 1024 // down) for channels, down in ((64, 2), (256, 4), (512, 8), (2048, 8))]


class Cut(NamedTuple):
    """How a dense tensor is cut, as the launch does it."""

    shape: Shape
    kind: str
    tile: Tile
    align: int

    @property
    def tiles(self) -> int:
        return self.shape.outer * -(-self.shape.inner // self.tile.block_i)


def plan(shape: tuple[int, ...], rows: bool, itemsize: int = 2, verb: str = "batch_sums", light: bool = False) -> Cut:
    samples, channels, *spatial = shape
    pixels = 1
    for size in spatial:
        pixels *= size
    view = Strides(channels * pixels, 1, channels) if rows else Strides(channels * pixels, pixels, 1)
    if are_small_planes(samples, channels, pixels, [view], itemsize):
        cut = Shape(1, channels * pixels, samples, samples * pixels, plane=pixels)
        view = Strides(0, 1, view.outer)
    else:
        outer, inner, (view,) = merge(samples, pixels, [view])
        cut = Shape(outer, channels, inner, samples * pixels)
        if fold := fold_factor(channels, samples * pixels, [view]):
            cut = Shape(1, channels * fold, -(-inner // fold), samples * pixels, fold=channels)
            view = Strides(0, 1, channels * fold)
    kind = kind_of(view, cut.columns, cut.inner)
    align = alignment(cut, kind, [kind], [view], itemsize)
    light = light or align * itemsize < 16 or cut.fold > 0
    layout = "small planes" if cut.plane else kind
    effort = effort_of(verb, layout, cut.columns, samples * channels * pixels * itemsize, SMS)
    return Cut(cut, kind, choose(cut, kind, itemsize, SMS, effort, light), align)


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [*IMAGES, (4096, 2048)], ids=str)
def test_every_benchmark_shape_fills_the_device(shape: tuple[int, ...], rows: bool, verb: str) -> None:
    """A program for each SM, or all tiles at once of the smallest size there is; hardly a lane is idle."""
    cut = plan(shape, rows or len(shape) == 2, verb=verb)
    smallest = cut.tile.splits == cut.tiles and cut.tile.block_c * cut.tile.block_i <= 1024
    assert cut.tile.programs >= SMS or smallest
    lanes = cut.tiles * cut.tile.groups * cut.tile.block_c * cut.tile.block_i
    assert lanes <= 2 * cut.shape.outer * cut.shape.columns * cut.shape.inner or smallest, "half of the lanes are idle"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_programs_are_resident_at_once(shape: tuple[int, ...], rows: bool, verb: str) -> None:
    """No program waits for another to end, but where its tiles would be too many for one pivot."""
    cut = plan(shape, rows, verb=verb)
    threads = 32 * cut.tile.warps * cut.tile.programs
    too_many = -(-cut.tiles // cut.tile.splits) == MOST_TILES or cut.tile.splits == 1
    assert threads <= 512 * SMS or too_many


@pytest.mark.parametrize("verb", ["batch_sums", "grad_sums"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_the_last_program_has_little_to_add_up(shape: tuple[int, ...], rows: bool, verb: str) -> None:
    """At most 72 KB of others' sums: what one SM reads from L2 in about 2 µs."""
    cut = plan(shape, rows, verb=verb)
    sums = combination(cut.shape, cut.tile)
    teams = -(-cut.tile.splits // sums.team) if sums.team else 0
    at_once = max(min(cut.tile.splits, sums.team), teams) if sums.team else cut.tile.splits
    assert at_once * 2 * sums.block_k * 8 <= 72 * 1024


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("channels", [8, 16, 24, 32, 48, 64, 96, 128, 144, 256, 2048])
def test_long_rows_are_read_in_long_runs(channels: int, verb: str) -> None:
    """Of rows of many bytes in all, a tile takes 64 bytes of each or the whole row; of fewer, at least 32."""
    for elements, run in ((1 << 25, 64), (1 << 21, 32)):
        cut = plan((elements // channels, channels), True, verb=verb)
        assert min(cut.tile.group, channels) * 2 >= min(run, 2 * channels)


@pytest.mark.parametrize(
    ("shape", "rows", "vector"),
    [
        ((32, 64, 112, 112), False, 8),
        ((32, 512, 28, 28), False, 8),
        ((32, 1024, 14, 14), False, 8),
        ((32, 2048, 7, 7), False, 8),
        ((32, 20, 3, 3), False, 4),
        ((32, 64, 15, 15), False, 8),
        ((32, 2048, 25, 42), False, 2),
        ((32, 256, 56, 56), True, 8),
        ((32, 3, 112, 112), True, 8),
        ((32, 16, 112, 112), True, 8),
        ((4096, 2048), True, 8),
        ((4096, 1001), True, 1),
    ],
)
def test_vectors(shape: tuple[int, ...], rows: bool, vector: int) -> None:
    """16-byte vectors wherever planes or rows are multiples of them, or 3 channels or small planes make such rows."""
    assert plan(shape, rows).align == vector


@given(
    samples=st.integers(0, 9),
    channels=st.integers(1, 300),
    pixels=st.integers(1, 300),
    rows=st.booleans(),
    itemsize=st.sampled_from([2, 4, 8]),
    light=st.booleans(),
    verb=st.sampled_from(VERBS),
)
def test_every_element_is_in_one_tile(
    samples: int, channels: int, pixels: int, rows: bool, itemsize: int, light: bool, verb: str
) -> None:
    """Groups and tiles cover the columns and positions once; no block is empty or larger than a thread block holds."""
    cut, _, tile, _ = plan((samples, channels, pixels), rows, itemsize, verb, light)
    tiles = cut.outer * -(-cut.inner // tile.block_i)
    assert 1 <= tile.splits <= max(tiles, 1), "a program without a tile"
    assert -(-tiles // tile.splits) <= MOST_TILES
    assert (tile.groups - 1) * tile.group < cut.columns <= tile.groups * tile.group
    assert tile.group <= tile.block_c
    assert tile.group % (cut.plane or cut.fold or 1) == 0, "a channel is in two groups, or in none"
    assert tile.block_c * tile.block_i <= 32 * tile.warps * 32 // itemsize
    assert tile.block_c.bit_count() == tile.block_i.bit_count() == 1, "not powers of two"
    if is_even(cut, tile):
        assert cut.outer * cut.columns * cut.inner == tiles * tile.groups * tile.block_c * tile.block_i
        assert cut.columns * cut.inner * cut.outer == samples * channels * pixels


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("side", range(2, 17))
def test_small_planes_are_cut_at_vectors(side: int, verb: str) -> None:
    """Where whole planes fit a vector's multiple, every group of them begins at a vector."""
    cut = plan((32, 2048, side, side), False, verb=verb)
    if cut.shape.plane:
        assert cut.tile.group * 2 % 16 == 0


@given(splits=st.integers(1, 3000), block_k=st.sampled_from([1, 16, 32, 64, 512]), warps=st.sampled_from([4, 8]))
def test_teams_cover_the_splits(splits: int, block_k: int, warps: int) -> None:
    """Scratch and semaphores suffice for every split's row, every team's row, and a count for each split.

    So they do where registers are short, with no more rows at a time.
    """
    tile = Tile(block_k, block_k, 1, warps, 1, 3, splits)
    shape = Shape(1, 3 * block_k, splits, splits)
    light, full = (combination(shape, tile, is_light) for is_light in (True, False))
    assert light.block_s <= full.block_s
    for sums in (light, full):
        teams = -(-splits // sums.team) if sums.team else 0
        assert sums.team in (0, sums.block_s)
        assert sums.partials == 3 * (splits + teams) * 2 * block_k + splits
        assert sums.semaphores == 3 * (1 + teams)
        assert teams <= splits


@given(
    shape=st.lists(st.integers(1, 4), min_size=2, max_size=5),
    order=st.randoms(use_true_random=False),
    gap=st.sampled_from([1, 2]),
)
def test_collapse_keeps_addresses(shape: list[int], order: object, gap: int) -> None:
    """Where (N, C, *S) collapses, and where N merges too, every element keeps its address."""
    dims = list(range(len(shape)))
    order.shuffle(dims)  # type: ignore[attr-defined]
    strides, step = [0] * len(shape), gap
    for dim in dims:
        strides[dim], step = step, step * shape[dim] + gap - 1
    view = collapse(shape, strides)
    if view is None:
        return
    pixels = list(itertools.product(*map(range, shape[2:])))
    outer, inner, (merged,) = merge(shape[0], len(pixels), [view])
    for n, c, (s, pixel) in itertools.product(range(shape[0]), range(shape[1]), enumerate(pixels)):
        right = sum(i * stride for i, stride in zip((n, c, *pixel), strides, strict=True))
        o, i = divmod(n * len(pixels) + s, inner)
        assert o < outer
        assert right == o * merged.outer + c * merged.channel + i * merged.inner


@pytest.mark.parametrize(("channels", "folded"), [(1, False), (2, True), (3, True), (7, True), (8, False), (64, False)])
def test_few_channels_are_folded(channels: int, folded: bool) -> None:
    """Rows of 2 to 7 channels are joined to at most 512 columns, whole pixels and whole vectors."""
    fold = fold_factor(channels, 10**6, [Strides(0, 1, channels)])
    assert bool(fold) == folded
    assert fold * channels <= 512
    assert fold * channels % 16 == 0
    assert fold_factor(channels, 10**6, [Strides(0, 1, channels + 1)]) == 0


@pytest.mark.parametrize(
    ("view", "inner", "wide"),
    [
        (Strides(0, 1, 64), 2**30, False),
        (Strides(0, 1, 64), 2**31, True),
        (Strides(0, 2**31, 1), 100, True),
        (Strides(2**40, 100, 1), 100, False),
        (Strides(0, 1, 2**31), 100, True),
    ],
)
def test_wide_offsets(view: Strides, inner: int, wide: bool) -> None:
    """64 bits inside a tile only where strides or positions ask for them; a tile's start always has them."""
    cut = Shape(1, 64, inner, inner)
    effort = effort_of("batch_sums", "rows", 64, 128 * inner, SMS)
    assert is_wide(cut, choose(cut, "rows", 2, SMS, effort), [view]) == wide
