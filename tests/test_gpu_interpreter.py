"""The Triton kernels, interpreted on the CPU: layouts, dtypes, activations, masks and ranks against the oracle."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.gpu_interpreter import (
    Interpreter,
    check_copies,
    check_negated,
    check_ranks,
    check_reduction,
    check_share,
)
from tests.support.oracle import ACTIVATIONS, Case

pytest.importorskip("triton", reason="triton is made for Linux only")

FEW, MANY = 1, 132
"""SMs: few give a program many tiles, many give it one."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.mark.parametrize(("shape", "axis"), [((4, 8), 1), ((4, 8), 0), ((2, 1), 1), ((1, 16), 1)])
def test_reductions_are_those_of_triton(interpreter: Interpreter, shape: tuple[int, int], axis: int) -> None:
    """What makes the interpreter quicker here gives the bits of its own way."""
    interpreter.run(check_reduction, shape, axis)


LAYOUTS = [
    ((3, 5, 7, 9), "contiguous", "contiguous"),
    ((2, 9, 14, 14), "contiguous", "contiguous"),
    ((5, 6, 7, 7), "contiguous", "contiguous"),
    ((2, 3, 8, 64), "contiguous", "contiguous"),
    ((2, 3, 2, 3, 8), "contiguous", "contiguous"),
    ((3, 40, 4, 6), "channels_last", "channels_last"),
    ((2, 64, 8, 8), "channels_last", "channels_last"),
    ((2, 6, 3, 2, 5), "channels_last", "channels_last"),
    ((3, 16, 5, 9), "channels_last", "channels_last"),
    ((3, 3, 9, 31), "channels_last", "channels_last"),
    ((2, 7, 16, 25), "channels_last", "channels_last"),
    ((67, 24), "contiguous", "contiguous"),
    ((9, 5), "sliced", "contiguous"),
    ((3, 5, 33), "contiguous", "channels_last"),
    ((3, 12, 17), "channels_last", "contiguous"),
    ((4, 5, 3, 7), "sliced", "channels_last"),
    ((4, 5, 3, 7), "contiguous", "sliced"),
    ((4, 5, 3, 7), "channels_first", "channels_first"),
    ((3, 8, 4, 4), "contiguous", "expanded"),
    ((3, 8, 4, 4), "channels_last", "expanded"),
    ((5, 1, 6), "contiguous", "channels_last"),
]


@pytest.mark.parametrize("sms", [FEW, MANY])
@pytest.mark.parametrize(("shape", "layout", "dy_layout"), LAYOUTS)
def test_layouts(interpreter: Interpreter, shape: tuple[int, ...], layout: str, dy_layout: str, sms: int) -> None:
    """Any strides of x, residual and dy give the oracle's values, in x's memory format."""
    case = Case((shape,), layout=layout, dy_layout=dy_layout, activation="relu", residual=True)
    interpreter.run(check_ranks, case, sms)


@pytest.mark.parametrize(
    ("channels", "masked"), [(24, True), (40, False), (48, True), (64, False), (64, True), (144, False)]
)
def test_long_rows(interpreter: Interpreter, channels: int, masked: bool) -> None:
    """The wider tiles of long rows, also where channels do not fill them, on two ranks of which one has more."""
    shapes, last = ((2, channels, 13, 17), (3, channels, 11, 15)), "channels_last"
    case = Case(shapes, layout=last, dy_layout=last, activation="relu", residual=True, masked=masked)
    interpreter.run(check_ranks, case, FEW, 1, True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("parameter_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(interpreter: Interpreter, dtype: torch.dtype, parameter_dtype: torch.dtype | None, layout: str) -> None:
    """Every input dtype, with parameters and buffers of the same dtype or float32."""
    case = Case(((2, 16, 3, 8),), dtype, parameter_dtype, layout, dy_layout=layout, activation="silu", residual=True)
    interpreter.run(check_ranks, case, FEW)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(interpreter: Interpreter, activation: str | None, residual: bool) -> None:
    """Every activation, with and without a residual."""
    interpreter.run(check_ranks, Case(((3, 4, 5, 6),), activation=activation, residual=residual), FEW)


@pytest.mark.parametrize("sms", [FEW, MANY])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(4, 5, 6, 7), (4, 3, 40), (2, 24, 9, 16)])
def test_masks(interpreter: Interpreter, shape: tuple[int, ...], layout: str, sms: int) -> None:
    """A mask, a denser one and a sparser one on three ranks: NaN below it reaches nothing."""
    case = Case((shape,) * 3, layout=layout, activation="relu", residual=True, masked=True)
    interpreter.run(check_ranks, case, sms)


HUGE = [
    ((2**31, 1), torch.float16, False),
    ((2**31 - 8, 1), torch.bfloat16, False),
    ((2**32, 1), torch.float32, False),
    ((2**31 - 1, 2), torch.float16, False),
    ((8, 1, 1024, 512, 512), torch.bfloat16, False),
    ((2, 2, 2**15, 2**16 + 1), torch.float32, False),
    ((2, 16, 2**15, 2**15), torch.bfloat16, True),
    ((4096, 256), torch.bfloat16, False),
]


@pytest.mark.parametrize(("shape", "dtype", "rows"), HUGE)
def test_huge_tensors(interpreter: Interpreter, shape: tuple[int, ...], dtype: torch.dtype, rows: bool) -> None:
    """No tile is lost where a length, or the end of the last tile, needs more than 32 bits."""
    interpreter.run(check_share, shape, dtype, rows)


def test_only_what_no_kernel_reads_or_writes_is_copied(interpreter: Interpreter) -> None:
    """A residual that is a crop costs a copy of itself and none of the result, and x likewise."""
    interpreter.run(check_copies)


def test_lazily_negated_tensors(interpreter: Interpreter) -> None:
    """The imaginary part of a conjugate, which torch negates when it is read, is read so."""
    interpreter.run(check_negated)


EMPTY = [
    ((1, 3, 4, 0), "contiguous"),
    ((2, 3, 5, 0, 4), "contiguous"),
    ((0, 3, 5, 7), "sliced"),
    ((0, 3, 5, 7), "channels_last"),
    ((2, 3, 5, 0), "sliced"),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "layout"), EMPTY)
def test_empty_inputs(interpreter: Interpreter, shape: tuple[int, ...], layout: str, masked: bool) -> None:
    """A rank without a value, whatever its strides are, takes part in a step like any other."""
    shapes = (shape, (2, 3, *(3 for _ in shape[2:])))
    interpreter.run(check_ranks, Case(shapes, layout=layout, activation="relu", residual=True, masked=masked), FEW)


RANKS = [
    ((3, 4, 5), (1, 4, 5)),
    ((2, 3, 4, 4), (0, 3, 4, 4)),
    ((0, 3, 4, 4), (0, 3, 4, 4)),
    ((1, 3), (0, 3)),
    ((1, 3, 1), (1, 3, 1), (2, 3, 1)),
    ((2, 3, 4, 4), (2, 3, 2, 8), (1, 3, 0, 4)),
]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("shapes", RANKS, ids=str)
def test_ranks(interpreter: Interpreter, shapes: tuple[tuple[int, ...], ...], momentum: float | None) -> None:
    """Uneven, empty and all-empty ranks, and a global count of 1, over three steps."""
    case = Case(shapes, activation="leaky_relu", residual=True, momentum=momentum)
    interpreter.run(check_ranks, case, MANY, 3)


@pytest.mark.parametrize("channels", [3, 70])
def test_cumulative_average(interpreter: Interpreter, channels: int) -> None:
    """momentum None with one group of channels and with several: one increment a step, read before it by all."""
    interpreter.run(check_ranks, Case(((3, channels, 4, 4),), momentum=None), MANY, 4)


@pytest.mark.parametrize("given", [{"affine": False}, {"bias": False}, {"track": False}], ids=str)
def test_what_may_be_missing(interpreter: Interpreter, given: dict[str, bool]) -> None:
    """No weight and bias, no bias, no running statistics."""
    interpreter.run(check_ranks, Case(((3, 4, 5, 6),), activation="relu", **given), FEW)
