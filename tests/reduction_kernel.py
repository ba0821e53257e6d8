# mypy: ignore-errors
# The line above: this is Triton's language; its types are the compiler's and mypy knows none of them.
"""A kernel that does no more than reduce a block as the library's kernels do."""

import triton
import triton.language as tl

from syncbn.backends.gpu_sums import add_two


@triton.jit
def two_sums_kernel(x_ptr, sums_ptr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr):
    """Σx and Σx² along an axis, one after the other"""
    x = tl.load(x_ptr + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    sum_x, sum_sq = tl.reduce((x, x * x), AXIS, add_two)
    LEFT: tl.constexpr = ROWS if AXIS else COLUMNS
    tl.store(sums_ptr + tl.arange(0, LEFT), sum_x)
    tl.store(sums_ptr + LEFT + tl.arange(0, LEFT), sum_sq)
