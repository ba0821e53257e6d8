"""The arithmetic of the layer, in plain torch operations that autograd can differentiate and a tracer can write down.

    mean = Σx/n,   var = Σx²/n − mean²,   x̂ = (x − mean)/√(var + eps)
    z = x̂·weight + bias + residual,   y = activation(z),   dz = dy·activation′(z)

n counts the positions of all ranks that are not masked out. All that computes in Python computes by these:
the specification (backends/reference.py), the composed layer (composed.py), eval (functional.py).
Raw sums in float64 cannot give the variance better than (mean/std)²·2⁻⁵³, 1e-8 at mean/std = 10,000, whoever adds them
up: they are what ranks can add without having talked before.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = (None, "relu", "leaky_relu", "silu")
LEAKY_SLOPE = 0.01
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Of inputs, parameters and statistics, in any mix."""
PLAIN = (Tensor, torch.nn.Parameter)
"""The types of tensors that are what they look like; a subclass may be something else."""
MOST = {dtype: torch.finfo(dtype).max for dtype in DTYPES}
"""The largest number of each dtype that a buffer may have."""
VOTE = 2.0**32
"""What a rank that takes part in the comparison of calls adds to its tag on the wire: see fingerprint.py."""


Statistics = tuple[Tensor | None, Tensor | None, Tensor | None, float | None, bool]
"""running_mean, running_var, num_batches_tracked, momentum, skip_nonfinite, as they are given."""


class Epilogue(NamedTuple):
    """What follows x̂, each entry optional: weight, bias (C); residual (N, C, *S); mask bool (N, *S)."""

    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    mask: Tensor | None = None
    activation: str | None = None


class Running(NamedTuple):
    """The buffers that `normalize` moves; momentum None means the cumulative average, 1/num_batches_tracked.

    skip_nonfinite: a channel whose mean or variance is not finite moves neither.
    """

    mean: Tensor
    var: Tensor
    num_batches_tracked: Tensor | None
    momentum: float | None
    skip_nonfinite: bool = True


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else: statistics are never held in half precision."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def moments(sums: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """mean, biased variance and count from [Σx, Σx², count, …]: var = Σx²/n − mean², at least 0; n = 0 gives 0, 0."""
    total, total_sq, count = sums[:channels], sums[channels : 2 * channels], sums[2 * channels : 2 * channels + 1]
    mean = total / count.clamp_min(1)
    var = (total_sq / count.clamp_min(1) - mean.square()).clamp_min(0)
    return mean, var, count


def move_running(running: Running, mean: Tensor, var: Tensor, count: Tensor) -> None:
    """running ← (1 − f)·running + f·statistic with the unbiased variance; held where n is 0 (variance: n ≤ 1).

    With skip_nonfinite, a channel that would not be finite is held too.
    f is the momentum, or 1/num_batches_tracked. The counter counts calls, empty ones too, as nn.BatchNorm does.
    """
    factor: Tensor | float | None = running.momentum
    if running.num_batches_tracked is not None:
        running.num_batches_tracked.add_(1)
        if factor is None:
            factor = running.num_batches_tracked.double().reciprocal()
    assert factor is not None, "checks.py requires a momentum or a counter"
    unbiased = var * (count / (count - 1).clamp_min(1))
    old_mean, old_var = running.mean.double(), running.var.double()
    new_mean, new_var = torch.lerp(old_mean, mean, factor), torch.lerp(old_var, unbiased, factor)
    mean_moves, var_moves = count > 0, count > 1
    if running.skip_nonfinite:
        finite = is_finite(running, new_mean, new_var)
        mean_moves, var_moves = mean_moves & finite, var_moves & finite
    running.mean.copy_(torch.where(mean_moves, new_mean, old_mean))
    running.var.copy_(torch.where(var_moves, new_var, old_var))


def is_finite(running: Running, mean: Tensor, var: Tensor) -> Tensor:
    """Of each channel, whether both are numbers that the buffers can hold."""
    most = min(MOST[running.mean.dtype], MOST[running.var.dtype])
    return torch.maximum(mean.abs(), var.abs()) <= most  # false of NaN


def masked(t: Tensor, mask: Tensor | None) -> Tensor:
    """t (N, C, *S), 0 where masked out."""
    return t if mask is None else torch.where(mask.unsqueeze(1), t, 0)


def along(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C) as (1, C, 1, …), to broadcast over x."""
    return per_channel.view(1, -1, *(1,) * (x.ndim - 2))


def in_strides(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """t, or a copy if its strides are others, as torch's own operations give an empty tensor."""
    return t if t.stride() == strides else t.new_empty_strided(t.shape, strides).copy_(t)


def reduced(x: Tensor) -> list[int]:
    """The dimensions that statistics are taken over: all but the channels'."""
    return [dim for dim in range(x.ndim) if dim != 1]


def parameter_grads(dbias: Tensor, dweight: Tensor, epilogue: Epilogue) -> tuple[Tensor | None, Tensor | None]:
    """dweight = Σdz·x̂ and dbias = Σdz of this rank, in the parameters' dtypes."""
    weight, bias, *_ = epilogue
    return (
        None if weight is None else dweight.to(weight.dtype, copy=True),
        None if bias is None else dbias.to(bias.dtype, copy=True),
    )


def scale_of(invstd: Tensor, weight: Tensor | None) -> Tensor:
    """invstd·weight (C), in invstd's dtype."""
    return invstd if weight is None else invstd * weight.to(invstd.dtype)


def pre_activation(x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue) -> Tensor:
    """z; forward and backward round alike, so that a unit is cut in both or in neither."""
    weight, bias, residual, *_ = epilogue
    z = (x.to(mean.dtype) - along(mean, x)) * along(scale_of(invstd, weight), x)
    if bias is not None:
        z = z + along(bias.to(z.dtype), x)
    return z if residual is None else z + residual.to(z.dtype)


def activate_(z: Tensor, activation: str | None) -> Tensor:
    """activation(z), in place"""
    if activation == "relu":
        return F.relu(z, inplace=True)
    if activation == "leaky_relu":
        return F.leaky_relu(z, LEAKY_SLOPE, inplace=True)
    return z if activation is None else F.silu(z, inplace=True)


def activation_grad(dy: Tensor, z: Tensor, activation: str) -> Tensor:
    """dz = dy·activation′(z); at z = 0 relu has derivative 0 and leaky_relu its slope, as in torch."""
    if activation == "relu":
        return torch.where(z > 0, dy, 0)
    if activation == "leaky_relu":
        return torch.where(z > 0, dy, dy * LEAKY_SLOPE)
    sigmoid = torch.sigmoid(z)
    return dy * sigmoid * (1 + z * (1 - sigmoid))


def finish(z: Tensor, residual: Tensor | None, activation: str | None, mask: Tensor | None) -> Tensor:
    """activation(z + residual), 0 where masked out, in z's dtype and strides."""
    if residual is None and activation is None and mask is None:
        return z
    y = z if residual is None else (z + residual).to(z.dtype)
    return in_strides(masked(activate_(y, activation), mask), z.stride())
