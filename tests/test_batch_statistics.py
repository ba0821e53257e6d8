"""The statistics themselves: how exact the variance is, where it is hard; what is sent, and what moves the buffers."""

import contextlib
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from syncbn import backends, composed
from syncbn.backends import reference
from syncbn.fingerprint import MOST, VOTE
from syncbn.formulas import Epilogue, Running, compute_dtype
from syncbn.functional import sync_batch_norm
from tests.support import cpu_backends

BACKENDS = (*cpu_backends.BACKENDS, "composed")
"""The last is no back-end, but what compilers and second derivatives see."""
SHAPES = {"planes": (16, 3, 24, 24), "rows": (4096, 3), "one plane": (1, 3, 600, 600)}


def normalize(x: Tensor, backend: str, mean: Tensor | None = None, var: Tensor | None = None) -> Tensor:
    """y; mean and var become the batch's."""
    if backend == "composed":
        running = None if mean is None or var is None else Running(mean, var, None, 1.0)
        return composed.normalize_batch(x, Epilogue(), 1e-5, None, running)
    with backends.force(backend):
        return sync_batch_norm(x, mean, var, training=True, momentum=1.0)


def statistics(x: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The biased mean and variance that a training call takes of x, read from its running statistics."""
    mean, var = x.new_zeros(x.shape[1], dtype=torch.float64), x.new_zeros(x.shape[1], dtype=torch.float64)
    normalize(x, backend, mean, var)
    count = x.numel() / x.shape[1]
    return mean, var * ((count - 1) / count)


def exact(x: Tensor) -> tuple[Tensor, Tensor]:
    dims = [dim for dim in range(x.ndim) if dim != 1]
    mean = x.double().mean(dims, keepdim=True)
    return mean.flatten(), (x.double() - mean).square().mean(dims)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("outlier", [None, "first element", "first row"])
@pytest.mark.parametrize("ratio", [0, 10, 1e2, 1e3, 1e4])
def test_variance_is_exact_far_from_zero(
    backend: str, shape: tuple[int, ...], outlier: str | None, ratio: float
) -> None:
    """Float32 input of mean/std up to 1e4 has its variance to 64·2⁻⁵³·(1 + (mean/std)²), 7e-7 at most, whatever its
    first values are: Σx² is off by what some 200 additions in float64 round, up as often as down, and the variance by
    (mean/std)² of that. What is composed for compilers adds up x − k in float32: 1e-6, at 1e4 1e-5.
    """
    limit = 64 * 2**-53 * (1 + ratio**2)
    if backend == "composed":
        limit = 1e-6 if ratio < 1e4 else 1e-5
    x = torch.randn(shape) + ratio
    if outlier == "first element":
        x[0, :, ...] = torch.where(torch.arange(x[0, 0].numel()).view(x[0, 0].shape) == 0, 0, x[0])
    elif outlier == "first row":
        x[0].view(shape[1], -1)[:, : shape[-1]] = 0
    _, var = statistics(x, backend)
    assert ((var - exact(x)[1]) / exact(x)[1]).abs().max() <= limit


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("std", [1e-6, 1e-4, 1e6])
def test_variance_of_tiny_and_huge_values(backend: str, std: float) -> None:
    """A std from 1e-6 to 1e6 keeps its six digits."""
    x = torch.randn(8, 3, 20, 20) * std
    _, var = statistics(x, backend)
    assert ((var - exact(x)[1]) / exact(x)[1]).abs().max() <= 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [0.0, 1.0, -1e4, 0.1, 3e7])
def test_a_constant_channel_has_no_variance(backend: str, value: float) -> None:
    """The variance of a constant is 0 to rounding of its square and never negative; the output stays finite."""
    x = torch.full((8, 3, 5, 7), value)
    mean, var = statistics(x, backend)
    assert torch.equal(mean, exact(x)[0])
    assert (var >= 0).all()
    assert var.max() <= 4 * 2**-53 * value**2
    assert (normalize(x, backend) == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6])
def test_variance_is_never_negative(backend: str, offset: float) -> None:
    """Channels that are almost constant, at any offset, never get a negative variance or a NaN."""
    x = offset + 1e-7 * torch.randn(64, 16)
    _, var = statistics(x, backend)
    assert (var >= 0).all()
    assert normalize(x, backend).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_buffers_keep_their_dtype_and_are_rounded_once(dtype: torch.dtype) -> None:
    """Half-precision running statistics are computed in more and rounded to the nearest when stored."""
    x = torch.randn(64, 3).to(dtype)
    mean, var = torch.full((3,), 0.3, dtype=dtype), torch.full((3,), 0.7, dtype=dtype)
    right_mean = 0.9 * mean.double() + 0.1 * exact(x)[0]
    right_var = 0.9 * var.double() + 0.1 * exact(x)[1] * 64 / 63
    sync_batch_norm(x, mean, var, training=True, momentum=0.1)
    assert torch.equal(mean, right_mean.to(dtype))
    assert torch.equal(var, right_var.to(dtype))


BAD = {"NaN": float("nan"), "+inf": float("inf"), "-inf": float("-inf")}


class Guarded(NamedTuple):
    """A batch of which one channel, the third, has something that its running statistics cannot hold."""

    value: float  # of the channel's first sample; its negative is the second's
    buffers: torch.dtype = torch.float32
    dtype: torch.dtype = torch.float32
    both: bool = True  # whether the second sample is the negative, or the whole channel is that value


GUARDED = {name: Guarded(value) for name, value in BAD.items()} | {
    "a variance beyond float32": Guarded(1e30, dtype=torch.float64),
    "a variance beyond float16": Guarded(3e4, torch.float16),
    "a mean beyond float16": Guarded(2e6, torch.float16, both=False),
    "a mean beyond float32": Guarded(1e40, dtype=torch.float64, both=False),
    "a variance beyond bfloat16": Guarded(1e30, torch.bfloat16, torch.float64),
}


def moved(name: str, x: Tensor, buffers: torch.dtype, momentum: float | None, skip: bool, sms: int) -> Running:
    """Running statistics that a call served by this back-end has moved, in this process and alone."""
    verbs = backends._load(name)
    start = torch.full((x.shape[1],), 0.3, dtype=buffers), torch.full((x.shape[1],), 0.7, dtype=buffers)
    running = Running(*start, torch.tensor(3), momentum, skip)
    with contextlib.ExitStack() as stack:
        if name == "gpu":
            from tests.support.gpu_interpreter import device_of

            stack.enter_context(device_of(sms))
            stack.enter_context(np.errstate(over="ignore", invalid="ignore"))  # infinities are what is asked about
        verbs.normalize(x, reference.batch_sums(x, None), Epilogue(), 1e-5, running)
    return running


def check_guard(name: str, guarded: Guarded, momentum: float | None, sms: int = 132) -> None:
    """The channel keeps its bits, the others get those of a batch in which it is an ordinary one."""
    x = torch.randn(6, 5, 7, dtype=guarded.dtype)
    bad = x.clone()
    if guarded.both:
        bad[0, 2], bad[1, 2] = guarded.value, -guarded.value
    else:
        bad[:, 2] = guarded.value
    right = moved(name, x, guarded.buffers, momentum, True, sms)
    ours = moved(name, bad, guarded.buffers, momentum, True, sms)
    others = torch.arange(5) != 2
    for mine, want, start in ((ours.mean, right.mean, 0.3), (ours.var, right.var, 0.7)):
        assert mine[2] == torch.tensor(start, dtype=guarded.buffers)
        assert torch.equal(mine[others], want[others])
        assert (want != torch.tensor(start, dtype=guarded.buffers)).all(), "an ordinary channel moves"
    assert ours.num_batches_tracked == right.num_batches_tracked == 4
    unguarded = moved(name, bad, guarded.buffers, momentum, False, sms)
    finite = torch.stack([unguarded.mean, unguarded.var]).isfinite()
    assert not finite[:, 2].all(), "the guard has nothing to do"
    assert finite[:, others].all()


def check_no_guard(name: str, bad: float, momentum: float | None) -> None:
    """Without the guard a value that is not finite reaches both buffers of its channel, and no other's."""
    x = torch.randn(6, 5, 7)
    right = moved(name, x, torch.float32, momentum, False, 132)
    x[0, 2, 1] = bad
    ours = moved(name, x, torch.float32, momentum, False, 132)
    others = torch.arange(5) != 2
    assert not ours.mean[2].isfinite()
    assert ours.var[2].isnan()
    assert torch.equal(ours.mean[others], right.mean[others])
    assert torch.equal(ours.var[others], right.var[others])


@pytest.mark.parametrize("backend", cpu_backends.BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("guarded", GUARDED.values(), ids=GUARDED)
def test_what_is_not_finite_moves_nothing(guarded: Guarded, momentum: float | None, backend: str) -> None:
    """A channel whose new mean or variance its buffer cannot hold keeps both; its neighbours move as without it."""
    check_guard(backend, guarded, momentum)


@pytest.mark.parametrize("backend", cpu_backends.BACKENDS)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_without_the_guard_it_moves(bad: float, momentum: float | None, backend: str) -> None:
    """skip_nonfinite=False leaves NaN or infinities in both buffers of the channel, and nothing of it in others."""
    check_no_guard(backend, bad, momentum)


@pytest.mark.parametrize("tag", [0, 1, 54321, MOST - 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_wire_ends_with_its_fingerprint(dtype: torch.dtype, masked: bool, tag: int) -> None:
    """2³² + tag and tag², 0 and 0 for tag 0, by all back-ends, behind the sums of a call without."""
    x = torch.randn(6, 5, 7).to(dtype)
    mask = torch.rand(6, 7) > 0.3 if masked else None
    mean, invstd = torch.zeros(2, 5, dtype=compute_dtype(dtype))
    for verbs in map(backends._load, cpu_backends.BACKENDS):
        plain = verbs.batch_sums(x, mask), verbs.grad_sums(x, x, mean, invstd, Epilogue(mask=mask))[0]
        sent = (
            verbs.batch_sums(x, mask, float(tag)),
            verbs.grad_sums(x, x, mean, invstd, Epilogue(mask=mask), float(tag))[0],
        )
        assert [len(wire) for wire in sent] == [13, 12]
        for wire, without in zip(sent, plain, strict=True):
            assert wire.dtype == torch.float64
            assert wire[-2:].tolist() == ([VOTE + tag, float(tag**2)] if tag else [0.0, 0.0])
            assert torch.equal(wire[:-2], without[:-2])
