"""The numbers of the CPU library's C code: exact sums, the same bits everywhere, and every conversion."""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn.backends import cpu, cpu_library, reference
from syncbn.formulas import ACTIVATIONS, Epilogue, Running
from tests.support.cpu_backends import needs_library

pytestmark = needs_library
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
HALVES = (torch.bfloat16, torch.float16)


def verbs(x: Tensor, dy: Tensor, epilogue: Epilogue) -> list[Tensor]:
    """All that the four verbs give."""
    channels = x.shape[1]
    running = Running(torch.zeros(channels), torch.ones(channels), torch.tensor(0), 0.1)
    sums = cpu.batch_sums(x, epilogue.mask, 5.0)
    y, mean, invstd = cpu.normalize(x, sums, epilogue, 1e-5, running)
    dsums, dweight, dbias = cpu.grad_sums(dy, x, mean, invstd, epilogue, 7.0)
    dx, dresidual = cpu.grad_input(dy, x, mean, invstd, epilogue, dsums, sums[-3:-2], True)
    given = (sums, y, mean, invstd, dsums, dweight, dbias, dx, dresidual, *running[:3])
    return [t for t in given if isinstance(t, Tensor)]


SHAPES = ((7, 48, 61), (3, 5, 9, 5), (9, 3, 33, 40), (2, 700, 3, 3), (5000, 5), (900, 70), (40, 1030), (1, 2, 70000))


def inputs(shape: tuple[int, ...], dtype: torch.dtype, last: bool, activation: str | None) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    x, dy, residual = (torch.randn(shape, generator=generator).add(0.5).to(dtype) for _ in range(3))
    if last:
        x, dy, residual = (t.movedim(1, -1).contiguous().movedim(-1, 1) for t in (x, dy, residual))
    weight, bias = torch.randn(2, shape[1], generator=generator)
    mask = torch.rand(shape[0], *shape[2:], generator=generator) > 0.3 if activation == "silu" else None
    return x, dy, Epilogue(weight, bias, residual if activation else None, mask, activation)


def assert_same_bits(some: list[Tensor], others: list[Tensor]) -> None:
    for pair in zip(some, others, strict=True):
        ours, right = (t.contiguous().view(-1).view(torch.uint8) for t in pair)
        assert torch.equal(ours, right)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", [False, True], ids=["planes", "rows"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_bits_do_not_depend_on_threads_or_processors(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> None:
    """Every result of the four verbs has the same bits on one to four threads, run after run, and with the instructions
    of any processor as with this one's.
    """
    found, before = cpu_library.library(), torch.get_num_threads()
    for activation in ACTIVATIONS:
        given = inputs(shape, dtype, last, activation)
        right = verbs(*given)
        try:
            for threads in (1, 2, 3, 4, 1):
                torch.set_num_threads(threads)
                assert_same_bits(verbs(*given), right)
            found.use_level(0)
            assert_same_bits(verbs(*given), right)
        finally:
            torch.set_num_threads(before)
            found.use_level(cpu_library.ANY_LEVEL)


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
def test_sums_are_right_to_the_last_digits(shape: tuple[int, ...], ratio: float) -> None:
    """Σx and Σx² of float32 numbers are within 16·2⁻⁵³ of Σ|x| and Σx² of the exact ones, which math.fsum gives.

    A number goes through at most 128 additions in its block and one for each block, task and lane after that, of which
    each rounds by half of 2⁻⁵² at random: some √(200/3) of these units in all.
    """
    x = torch.randn(shape) + ratio
    sums = cpu.batch_sums(x, None)
    channels = shape[1]
    for c in (0, channels // 2, channels - 1):
        values = x[:, c].double().flatten().tolist()
        squares = [v * v for v in values]
        assert abs(sums[c] - math.fsum(values)) <= 16 * 2**-53 * math.fsum(map(abs, values))
        assert abs(sums[channels + c] - math.fsum(squares)) <= 16 * 2**-53 * math.fsum(squares)


@pytest.fixture(params=[0, cpu_library.ANY_LEVEL], ids=["any processor", "this processor"])
def level(request: pytest.FixtureRequest) -> Iterator[int]:
    """The instructions that are used."""
    found = cpu_library.library()
    assert found is not None
    yield found.use_level(request.param)
    found.use_level(cpu_library.ANY_LEVEL)


def scaled(x: Tensor, weight: Tensor, activation: str | None = None) -> Tensor:
    """activation(x·weight), by the library: mean 0, variance 1."""
    channels = x.shape[1]
    sums = torch.cat([torch.zeros(channels), torch.ones(channels), torch.ones(1), torch.zeros(2)]).double()
    return cpu.normalize(x, sums, Epilogue(weight=weight, activation=activation), 0.0, None)[0]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 1 << 16), (1, 8, 1 << 13), (1 << 13, 8), (1 << 16, 1)], ids=str)
def test_every_half_is_read_and_written(level: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """All 65,536 numbers of 16 bits come back as they are; those that are no number stay none."""
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).view(shape)
    y = scaled(x, torch.ones(shape[1]))
    number = ~x.isnan()
    assert torch.equal(y[number], x[number])
    assert y[~number].isnan().all()
    total = cpu.batch_sums(x, None)[: shape[1]]
    right = x.double().sum([dim for dim in range(x.ndim) if dim != 1])
    assert torch.equal(total[right.isfinite()], right[right.isfinite()])
    assert torch.equal(total.isnan(), right.isnan())


@pytest.mark.parametrize("dtype", HALVES)
def test_every_float_is_rounded_to_the_nearest_half(level: int, dtype: torch.dtype) -> None:
    """float32 numbers of random bits become what torch rounds them to, ties and subnormal ones too."""
    bits = torch.randint(-(1 << 31), 1 << 31, (1 << 18,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    ties = (bits >> 13 << 13) + 4096
    small = torch.rand(1 << 16) * 2**-13
    weight = torch.cat([bits.view(torch.float32), ties.view(torch.float32), small, small * 2**-110])
    y, right = scaled(torch.ones(1, len(weight), dtype=dtype), weight)[0], weight.to(dtype)
    number = ~right.isnan()
    assert torch.equal(y[number], right[number])
    assert y[~number].isnan().all()


SPECIAL = (
    0.0,
    -0.0,
    math.inf,
    -math.inf,
    math.nan,
    1e-30,
    -1e-30,
    87.0,
    -87.0,
    -88.5,
    -103.0,
    -104.5,
    -1e4,
    1e4,
    -1e30,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_silu_is_as_exact_as_its_type(level: int, dtype: torch.dtype) -> None:
    """Within four units in the last place of float64's, from where it underflows to where it is the identity; torch's
    infinities, zeros and NaN.
    """
    z = torch.cat([torch.linspace(-120, 120, 40001), torch.tensor(SPECIAL)]).to(dtype)
    y, right = scaled(z[None], torch.ones(len(z), dtype=dtype), "silu")[0], F.silu(z.double())
    finite = right.isfinite()
    unit = torch.finfo(dtype).eps
    allowed = 4 * unit * right[finite].abs() + 120 * torch.finfo(dtype).smallest_normal
    assert ((y.double() - right)[finite].abs() <= allowed).all()
    assert torch.equal(y[~finite].double().nan_to_num(7.0), right[~finite].nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("skip", "momentum"), list(itertools.product([True, False], [0.1, 1.0, None])))
def test_buffers_move_by_the_specifications_bits(dtype: torch.dtype, momentum: float | None, skip: bool) -> None:
    """Moved by the library and by the specification: any count, momentum and counter, what a buffer cannot hold, and
    buffers with gaps or at odd addresses.
    """
    generator = torch.Generator().manual_seed(0)
    wild = torch.tensor([0.0, 1e5, 1e39, math.inf, -math.inf, math.nan], dtype=torch.float64)
    counters = (torch.int64, torch.int32, torch.uint8)
    for number in range(100):
        count = (0.0, 1.0, 2.0, 3.0, 5e4)[number % 5]
        sums = torch.randn(2, 9, generator=generator, dtype=torch.float64) * count
        sums[1] = sums[1].abs() + sums[0].square()
        if number % 3:  # one channel of nine, in its mean or in its variance
            sums[number % 2, number % 9] = wild[number % len(wild)]
        wire = torch.cat([sums.flatten(), torch.tensor([count, 0.0, 0.0], dtype=torch.float64)])
        start = torch.rand(2, 9, generator=generator).to(dtype)
        runs = []
        for verb in (cpu.normalize, reference.normalize):
            mean, var = (torch.stack([t, t], 1)[:, 1] if number % 4 == 3 else t.clone() for t in start)
            tracked = (
                None if momentum is not None and number % 7 == 0 else torch.tensor(number, dtype=counters[number % 3])
            )
            running = Running(mean, var, tracked, momentum, skip)
            verb(torch.zeros(2, 9), wire, Epilogue(), 1e-5, running)
            runs.append(running)
        for mine, right in zip(runs[0][:2], runs[1][:2], strict=True):
            number_like = ~right.isnan()
            assert torch.equal(mine[number_like], right[number_like]), number
            assert mine[~number_like].isnan().all()
        assert runs[0].num_batches_tracked == runs[1].num_batches_tracked
