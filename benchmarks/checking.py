"""Nothing is timed before its output is right: a float64 oracle on the tensors' own device, every rank's batch known.

    y = relu?((x − mean)/√(var + eps)·weight + bias + residual?)

with mean and the biased var per channel over the batches of all the ranks that are synchronised. Gradients are
autograd's, of that formula, for the cotangent dy on every rank.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.shapes import DTYPES, Plan, in_layout
from tests.support.oracle import UNIT, error

EPS = 1e-5
CLEAR_OF_ZERO = 0.5
"""|z| before a ReLU: no rounding moves a unit to the other side, where it would rightly have another gradient."""
NAMES = ("y", "dx", "dweight", "dbias", "dresidual")


class Case(NamedTuple):
    """One rank's tensors; the leaves require gradients. Parameters are float32, as in mixed precision."""

    x: Tensor
    dy: Tensor
    weight: nn.Parameter
    bias: nn.Parameter
    residual: Tensor | None

    def leaves(self) -> tuple[Tensor, ...]:
        """x, weight, bias and, if there is one, residual."""
        return self.x, self.weight, self.bias, *(() if self.residual is None else (self.residual,))


def make_case(plan: Plan, device: torch.device, rank: int = 0, fused: bool = False) -> Case:
    """Rank `rank`'s tensors, the same on whichever process: parameters alike on all ranks, batches not.

    Per channel, mean ~ N(0, 3²) and std in 0.5 … 3 or so: a batch norm's input, and a test of its numerics.
    """
    channels, dtype = plan.shape[1], DTYPES[plan.dtype]
    along = (1, -1, *(1,) * (len(plan.shape) - 2))
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    weight, bias = nn.Parameter(0.5 + randn(channels).abs()), nn.Parameter(randn(channels))
    mean, std = 3 * randn(channels), 0.5 + randn(channels).abs()
    generator.manual_seed(1 + rank)
    x = randn(*plan.shape).mul_(std.view(along)).add_(mean.view(along))
    x, dy = (in_layout(t.to(dtype), plan.layout) for t in (x, randn(*plan.shape)))
    residual = None
    if fused:
        z = F.batch_norm(x.float(), None, None, weight.detach(), bias.detach(), training=True)
        residual = randn(*plan.shape)
        residual += torch.copysign(torch.full_like(z, CLEAR_OF_ZERO), z.add_(residual))
        residual = in_layout(residual.to(dtype), plan.layout).requires_grad_()
    return Case(x.requires_grad_(), dy, weight, bias, residual)


def oracle(cases: list[Case], rank: int, fused: bool) -> list[Tensor]:
    """[y, dx, dweight, dbias, dresidual?] of `rank` when all of `cases` are one batch."""
    leaves = [[t.detach().double().requires_grad_() for t in case.leaves()] for case in cases]
    batch = torch.cat([leaf[0] for leaf in leaves])
    dims = [dim for dim in range(batch.ndim) if dim != 1]
    var, mean = torch.var_mean(batch, dims, correction=0, keepdim=True)
    ys = []
    for x, weight, bias, *residual in leaves:
        z = (x - mean) / (var + EPS).sqrt() * weight.view_as(mean) + bias.view_as(mean)
        ys.append(torch.relu(z + residual[0]) if fused else z)
    grads = torch.autograd.grad(ys, leaves[rank], [case.dy.double() for case in cases])
    return [ys[rank].detach(), *grads]


def check(
    name: str,
    forward: Callable[[], Tensor],
    backward: Callable[[Tensor], tuple[Tensor, ...]],
    right: list[Tensor],
    ours: bool = True,
) -> float:
    """The largest relative error of forward's y and backward's gradients; raises as `hold` does."""
    y = forward()
    got = [y.detach(), *backward(y)]
    pairs = zip(NAMES[: len(right)], got, right, strict=True)
    return max(hold(f"{name}: {label}", mine, want, None if ours else y.dtype) for label, mine, want in pairs)


def hold(label: str, mine: Tensor, want: Tensor, baseline: torch.dtype | None = None) -> float:
    """mine's error relative to want's largest value; raises if it is beyond the tolerance.

    That is the test suite's for our layer. Another's, a baseline with activations of this dtype, may sum in float32, a
    hundred times as far off, and round to half precision on the way, four times, whatever it then returns: of
    contiguous bfloat16, torch's float32 gradients of weight and bias were off by up to 7e-3 on an H100. What is wrong
    is further off still.
    """
    limit = max(UNIT[mine.dtype], UNIT[torch.float32])
    if baseline is not None:
        limit = max(4 * limit, 4 * UNIT[baseline], 100 * UNIT[torch.float32])
    off = error(mine, want)
    if not off <= limit:
        raise AssertionError(f"{label} is off by {off:.2e}, allowed {limit:.2e}; it is not timed.")
    return off


def bn_backend(case: Case) -> str:
    """What torch picks for its own batch norm of this input in training: Native, Cudnn or Miopen."""
    parameters = (case.weight, case.bias, torch.zeros_like(case.weight), torch.ones_like(case.weight))
    return str(torch._C._select_batch_norm_backend(case.x, *parameters, True, 1e-5)).rpartition(".")[-1]
