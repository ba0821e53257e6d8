"""How calls are cut into tiles: enough programs for every SM, every element once, vectors where they fit."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.backends.gpu_tiles import (
    MOST_TILES,
    Shape,
    Strides,
    Tile,
    alignment,
    choose,
    collapse,
    fold_factor,
    is_even,
    is_wide,
    kind_of,
    merge,
)

SMS = 132

RESNET = [(64, 112), (64, 56), (256, 56), (128, 56), (128, 28), (512, 28), (256, 28), (256, 14), (1024, 14), (512, 14)]
RESNET += [(512, 7), (2048, 7)]
IMAGES = [(batch, channels, size, size) for batch in (2, 8, 32) for channels, size in RESNET]
IMAGES += [(2, 64, 400, 672), (2, 256, 200, 336), (2, 512, 100, 168), (2, 1024, 50, 84), (2, 2048, 25, 42)]
IMAGES += [(8, channels, 512 // down, 1024 // down) for channels, down in ((64, 2), (256, 4), (512, 8), (2048, 8))]


def plan(shape: tuple[int, ...], rows: bool, itemsize: int = 2) -> tuple[Shape, str, Tile, int]:
    """Shape, kind, tile and alignment of a dense tensor, as the launch makes them."""
    samples, channels, *spatial = shape
    pixels = 1
    for size in spatial:
        pixels *= size
    view = Strides(channels * pixels, 1, channels) if rows else Strides(channels * pixels, pixels, 1)
    outer, inner, (view,) = merge(samples, pixels, [view])
    cut = Shape(outer, channels, inner, 0, samples * pixels)
    if fold := fold_factor(channels, samples * pixels, [view]):
        cut = Shape(1, channels * fold, -(-inner // fold), channels, samples * pixels)
        view = Strides(0, 1, channels * fold)
    kind = kind_of(view, cut.columns, cut.inner)
    align = alignment(cut, kind, [kind], [view], itemsize)
    return cut, kind, choose(cut, kind, itemsize, SMS, align * itemsize < 16), align


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("shape", [*IMAGES, (4096, 2048)], ids=str)
def test_every_benchmark_shape_fills_the_device(shape: tuple[int, ...], rows: bool) -> None:
    """At least 132 programs, or the smallest tiles there are: 4 warps with one 16-byte vector a thread."""
    cut, _, tile, _ = plan(shape, rows or len(shape) == 2)
    smallest = tile.per_program == 1 and tile.block_c * tile.block_i <= 1024
    assert tile.programs >= SMS or smallest
    lanes = tile.programs * tile.per_program * tile.block_c * tile.block_i
    assert lanes <= 2 * cut.outer * cut.columns * cut.inner or smallest, "more than half of the lanes are idle"


@pytest.mark.parametrize(
    ("shape", "rows", "vector"),
    [
        ((32, 64, 112, 112), False, 8),
        ((32, 512, 28, 28), False, 8),
        ((32, 1024, 14, 14), False, 4),
        ((32, 2048, 7, 7), False, 1),
        ((32, 256, 56, 56), True, 8),
        ((32, 3, 112, 112), True, 8),
        ((32, 16, 112, 112), True, 8),
        ((4096, 2048), True, 8),
        ((4096, 1001), True, 1),
    ],
)
def test_vectors(shape: tuple[int, ...], rows: bool, vector: int) -> None:
    """16-byte vectors wherever planes or rows are multiples of them; 3 channels are folded into wide rows."""
    assert plan(shape, rows)[3] == vector


@given(
    samples=st.integers(0, 9),
    channels=st.integers(1, 300),
    pixels=st.integers(1, 300),
    rows=st.booleans(),
    itemsize=st.sampled_from([2, 4, 8]),
    light=st.booleans(),
)
def test_every_element_is_in_one_tile(
    samples: int, channels: int, pixels: int, rows: bool, itemsize: int, light: bool
) -> None:
    """Programs × their runs cover the tiles without overlap; no block is empty or larger than a thread block holds."""
    cut, kind, _, _ = plan((samples, channels, pixels), rows, itemsize)
    tile = choose(cut, kind, itemsize, SMS, light)
    tiles = cut.outer * -(-cut.inner // tile.block_i)
    starts = range(0, tile.splits * tile.per_program, tile.per_program)
    covered = [t for start in starts for t in range(start, min(start + tile.per_program, tiles))]
    assert covered == list(range(tiles))
    assert tile.splits == 1 or starts[-1] < tiles, "a program without a tile"
    assert (tile.groups - 1) * tile.block_c < cut.columns <= tile.groups * tile.block_c
    assert 1 <= tile.per_program <= MOST_TILES
    assert tile.block_c * tile.block_i <= 32 * tile.warps * 32 // itemsize
    assert tile.block_c.bit_count() == tile.block_i.bit_count() == 1, "not powers of two"
    if is_even(cut, tile):
        assert cut.outer * cut.columns * cut.inner == tiles * tile.groups * tile.block_c * tile.block_i
        assert cut.columns * cut.inner * cut.outer == samples * channels * pixels


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
    cut = Shape(1, 64, inner, 0, inner)
    assert is_wide(cut, choose(cut, "rows", 2, SMS), [view]) == wide
