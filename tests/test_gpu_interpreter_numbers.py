"""The Triton kernels, interpreted on the CPU: what their numbers promise whatever the data, and their bookkeeping."""

from collections.abc import Iterator

import pytest
import torch

from tests.support import gpu_jobs
from tests.support.gpu_interpreter import Interpreter
from tests.support.layer_runs import run_case
from tests.support.oracle import Case, compare

pytest.importorskip("triton", reason="triton is made for Linux only")

LIMIT = 1e-6
"""Of the standard deviation (mean), relative (variance): 16 roundings of 2⁻²⁴, for a lane's few and a tree of lanes."""

WORST = 64 * LIMIT
"""Where a lane's first value is an outlier: by Cauchy–Schwarz its squares are at most 64 times as large."""


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("layout", ["planes", "rows"])
@pytest.mark.parametrize("offset", [0.0, 1e2, 1e4])
def test_a_large_mean_costs_no_precision(interpreter: Interpreter, offset: float, layout: str, sms: int) -> None:
    """mean/std up to 1e4 leaves the variance right; fp32 raw sums would lose it."""
    x = torch.randn(4, 4, 16, 29) + offset
    if layout == "rows":
        x = x.to(memory_format=torch.channels_last)
    mean, var = interpreter.run(gpu_jobs.sums_error, x, None, sms)
    assert mean <= LIMIT
    assert var <= LIMIT


@pytest.mark.parametrize("masked", [False, True])
def test_padding_zeros_are_no_pivot(interpreter: Interpreter, masked: bool) -> None:
    """Zeros or NaN at the start of every sample, far from the mean, spoil no program's pivot."""
    x = torch.randn(4, 3, 40, 64) + 1e3
    mask = None
    if masked:
        mask = torch.ones(4, 40, 64, dtype=torch.bool)
        mask[:, :17] = False
        x[:, :, :17] = float("nan")
    else:
        x[0, :, :8] = 0
    mean, var = interpreter.run(gpu_jobs.sums_error, x, mask, 1)
    assert mean <= WORST
    assert var <= WORST


@pytest.mark.parametrize("layout", ["planes", "rows"])
def test_bits_repeat(interpreter: Interpreter, layout: str) -> None:
    """The same inputs give the same bits, run after run."""
    x, dy = torch.randn(2, 3, 4, 12, 20)
    if layout == "rows":
        x = x.to(memory_format=torch.channels_last)
    interpreter.run(gpu_jobs.bits_repeat, x, dy)


FAR = [
    ((2, 3, 40), (2**31 + 8, 64, 1)),  # samples
    ((2, 3, 40), (64, 2**31 + 8, 1)),  # channels, inside one tile
    ((3, 24), (2**31 + 8, 1)),  # rows, inside one tile
    ((2, 3, 4), (1, 2, 2**30 + 8)),  # positions of no unit stride
]


@pytest.mark.parametrize(("shape", "strides"), FAR)
def test_far_addresses(interpreter: Interpreter, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Offsets of 2³¹ elements and more, by each of the three strides."""
    interpreter.run(gpu_jobs.far_apart, shape, strides)


def test_relu_cuts_alike(interpreter: Interpreter) -> None:
    """A unit a rounding away from 0 is cut forward and backward, or in neither."""
    x = torch.randn(3, 5, 6, 7)
    assert interpreter.run(gpu_jobs.cut_alike, x, x) == 0


@pytest.mark.parametrize("job", [gpu_jobs.odd_buffers, gpu_jobs.plans_are_bounded, gpu_jobs.workspace_grows])
def test_bookkeeping(interpreter: Interpreter, job: object) -> None:
    """Odd buffers, many shapes and a growing workspace, each as its job says."""
    interpreter.run(job)


@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_layer(interpreter: Interpreter, masked: bool) -> None:
    """The module itself, through autograd, served by these kernels."""
    case = Case(((4, 3, 5, 6),), activation="silu", residual=True, masked=masked, backend="gpu")
    compare(case, [interpreter.run(run_case, case)])
