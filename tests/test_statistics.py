"""The statistics themselves: how exact the variance is, where it is hard."""

import pytest
import torch
from torch import Tensor

from syncbn import backends, composed
from syncbn.backends import Epilogue, Running
from syncbn.functional import sync_batch_norm

BACKENDS = ("reference", "cpu", "composed")
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
@pytest.mark.parametrize(("ratio", "limit"), [(0, 1e-6), (10, 1e-6), (1e2, 1e-6), (1e3, 1e-6), (1e4, 1e-5)])
def test_variance_is_exact_far_from_zero(
    backend: str, shape: tuple[int, ...], outlier: str | None, ratio: float, limit: float
) -> None:
    """Float32 input of mean/std up to 1e4 has its variance to 1e-6 (1e-5), whatever its first values are."""
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
