# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""Kernels that do one thing that the library's kernels do."""

import triton
import triton.language as tl

from syncbn.backends.gpu_blocks import program_share, scaled
from syncbn.backends.gpu_sums import add_two


@triton.jit
def two_sums_kernel(x_ptr, sums_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """Σx and Σx² along an axis, one after the other"""
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    sum_x, sum_sq = tl.reduce((x, x * x), AXIS, add_two)
    LEFT: tl.constexpr = ROWS if AXIS else COLUMNS
    tl.store(sums_ptr + tl.arange(0, LEFT), sum_x)
    tl.store(sums_ptr + LEFT + tl.arange(0, LEFT), sum_sq)


@triton.jit(do_not_specialize=["outer", "inner", "columns"])
def share_kernel(
    tiles_ptr, outer, inner, columns,
    KIND: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, GROUP: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """how many tiles each program has"""
    inner = scaled(inner, "planes", KIND, ALIGN, WIDE)
    columns = scaled(columns, "rows", KIND, ALIGN, WIDE)
    _group, _groups, _split, _splits, tiles, _tiles_inner = program_share(
        tl.program_id(0), outer, inner, columns, GROUP, BLOCK_I
    )
    tl.store(tiles_ptr + tl.program_id(0), tiles)
