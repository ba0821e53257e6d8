"""What is right: float64, one process, the concatenated batch, gradients by autograd of the plain formula."""

import dataclasses
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from tests.support.cpu_backends import ON_CPU

UNIT = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-8 + 3e-6, torch.float16: 2**-11 + 3e-6}
"""Allowed error, relative to the largest value of the tensor.

float32: 3e-6 is 50 roundings of 2⁻²⁴, for the few operations on an element and the sums over a batch.
float16 and bfloat16: everything is computed in float32 and rounded once, by half a unit in the last place, 2⁻¹¹ and
2⁻⁸ of the value. float64: the wire's raw sums cost (mean/std)²·2⁻⁵³ of the variance, 1e-13 at mean/std = 30.
"""

ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
}


@dataclass(frozen=True)
class Case:
    """One layer call on every rank: shapes[r] is rank r's input."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    parameter_dtype: torch.dtype | None = None  # None: dtype
    layout: str = "contiguous"
    dy_layout: str = "contiguous"
    activation: str | None = None
    residual: bool = False
    masked: bool = False
    affine: bool = True
    bias: bool = True
    track: bool = True
    momentum: float | None = 0.1
    backend: str = ON_CPU
    compiler: str | None = None  # of torch.compile
    seed: int = 0

    def __str__(self) -> str:
        shown = []
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name == "shapes":
                shown.append("+".join("x".join(map(str, shape)) for shape in value))
            elif value != f.default:
                shown.append(f"{f.name}={str(value).removeprefix('torch.')}")
        return "-".join(shown)

    @property
    def channels(self) -> int:
        return self.shapes[0][1]


@dataclass
class Call:
    """The tensors of one rank's call, as the user would pass them."""

    x: Tensor
    dy: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None = None
    mask: Tensor | None = None


@dataclass
class Outcome:
    """What a call leaves behind; None where there is nothing."""

    y: Tensor
    dx: Tensor
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    dresidual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    strides: dict[str, tuple[int, ...]] = field(default_factory=dict)
    collectives: tuple[int, int] = (0, 0)  # forward and backward


def in_layout(t: Tensor, layout: str) -> Tensor:
    """t's values (of expanded, its first slices') with other strides."""
    if layout == "contiguous":
        return t.contiguous()
    if layout == "channels_last":  # (N, L, C) for 3-d, NHWC, NDHWC
        return t.new_empty(t.movedim(1, -1).shape).movedim(-1, 1).copy_(t)  # contiguous() leaves an empty one as it is
    if layout == "sliced":
        padded = t.new_full((*t.shape[:-1], 2 * t.shape[-1] + 1), float("nan"))
        padded[..., 1::2] = t
        return padded[..., 1::2]
    if layout == "channels_first":  # (C, N, *S)
        return t.new_empty(t.transpose(0, 1).shape).transpose(0, 1).copy_(t)
    assert layout == "expanded", layout
    return t[:1, :, ..., :1].expand(t.shape) if t.ndim > 2 else t[:, :1].expand(t.shape)


def make_calls(case: Case) -> list[Call]:
    """Every rank's tensors; the same on whichever process it is called."""
    generator = torch.Generator().manual_seed(case.seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    parameter_dtype = case.parameter_dtype or case.dtype
    weight = randn(case.channels).to(parameter_dtype) if case.affine else None
    bias = randn(case.channels).to(parameter_dtype) if case.affine and case.bias else None
    mean, std = 3 * randn(case.channels), 0.5 + randn(case.channels).abs()
    calls = []
    for rank, shape in enumerate(case.shapes):
        along = (1, -1, *(1,) * (len(shape) - 2))
        x = in_layout((randn(*shape) * std.view(along) + mean.view(along)).to(case.dtype), case.layout)
        call = Call(x, in_layout(randn(*shape).to(case.dtype), case.dy_layout), weight, bias)
        if case.residual:
            call.residual = in_layout(randn(*shape).to(case.dtype), case.layout)
        if case.masked:
            call.mask = randn(shape[0], *shape[2:]) > (-1.0, 0.0, 0.5, 9.0)[rank]
            dropped = ~call.mask.unsqueeze(1).expand(shape)
            for t in (call.x, call.dy, call.residual):
                if t is not None:
                    t[dropped] = float("nan")
        calls.append(call)
    return calls


def expected(case: Case, steps: int = 1, eps: float = 1e-5) -> list[Outcome]:
    """The outcome on every rank of `steps` calls with the same tensors."""
    calls = make_calls(case)
    leaves = [_leaves(call) for call in calls]
    columns = [_columns(leaf["x"], call.mask) for leaf, call in zip(leaves, calls, strict=True)]
    batch = torch.cat(columns, dim=1)
    count = batch.shape[1]
    mean = batch.sum(1) / max(count, 1)
    var = (batch - mean[:, None]).square().sum(1) / max(count, 1)
    ys = [_apply(case, leaf, call.mask, mean, (var + eps).sqrt()) for leaf, call in zip(leaves, calls, strict=True)]
    loss = sum((y * _clean(call.dy, call.mask)).sum() for y, call in zip(ys, calls, strict=True))
    loss.backward()  # type: ignore[union-attr]
    buffers = _running(case, mean.detach(), var.detach(), count, steps)
    return [
        Outcome(y.detach(), leaf["x"].grad, *(_grad(leaf, k) for k in ("weight", "bias", "residual")), *buffers)
        for y, leaf in zip(ys, leaves, strict=True)
    ]


def _leaves(call: Call) -> dict[str, Tensor]:
    """Per-rank copies in float64, so that every rank's own parameter gradients come out."""
    given = {
        "x": _clean(call.x, call.mask),
        "weight": call.weight,
        "bias": call.bias,
        "residual": None if call.residual is None else _clean(call.residual, call.mask),
    }
    return {k: t.detach().double().clone().requires_grad_() for k, t in given.items() if t is not None}


def _clean(t: Tensor, mask: Tensor | None) -> Tensor:
    return t.double() if mask is None else torch.where(mask.unsqueeze(1), t.double(), 0)


def _columns(x: Tensor, mask: Tensor | None) -> Tensor:
    """(C, positions that count)"""
    flat = x.movedim(1, 0).reshape(x.shape[1], -1)
    return flat if mask is None else flat[:, mask.reshape(-1)]


def _apply(case: Case, leaf: dict[str, Tensor], mask: Tensor | None, mean: Tensor, std: Tensor) -> Tensor:
    x = leaf["x"]

    def along(t: Tensor) -> Tensor:
        return t.view(1, -1, *(1,) * (x.ndim - 2))

    z = (x - along(mean)) / along(std)
    if "weight" in leaf:
        z = z * along(leaf["weight"])
    if "bias" in leaf:
        z = z + along(leaf["bias"])
    if "residual" in leaf:
        z = z + leaf["residual"]
    y = ACTIVATIONS[case.activation](z)
    return y if mask is None else torch.where(mask.unsqueeze(1), y, 0)


def _grad(leaf: dict[str, Tensor], name: str) -> Tensor | None:
    if name not in leaf:
        return None
    grad = leaf[name].grad
    return torch.zeros_like(leaf[name]) if grad is None else grad


def _running(case: Case, mean: Tensor, var: Tensor, count: int, steps: int) -> tuple[Tensor | None, ...]:
    if not case.track:
        return None, None, None
    running_mean, running_var = torch.zeros_like(mean), torch.ones_like(var)
    for step in range(1, steps + 1):
        factor = 1 / step if case.momentum is None else case.momentum
        if count > 0:
            running_mean = (1 - factor) * running_mean + factor * mean
        if count > 1:
            running_var = (1 - factor) * running_var + factor * var * count / (count - 1)
    return running_mean, running_var, torch.tensor(steps)


def error(actual: Tensor, right: Tensor) -> float:
    """The largest difference, relative to the largest right value (or to 1e-30, where all are 0)."""
    if actual.shape != right.shape:
        return float("inf")
    if right.numel() == 0:
        return 0.0
    actual, right = actual.detach().double(), right.detach()
    difference = (actual - right).abs().max() / right.abs().max().clamp_min(1e-30)
    return float(difference.nan_to_num(float("inf")))


def compare(case: Case, actual: list[Outcome], steps: int = 1) -> None:
    """Raise if anything on any rank is further from the oracle than its dtype allows."""
    for rank, (ours, right) in enumerate(zip(actual, expected(case, steps), strict=True)):
        for f in dataclasses.fields(Outcome):
            a, b = getattr(ours, f.name), getattr(right, f.name)
            if f.name in ("strides", "collectives"):
                continue
            assert (a is None) == (b is None), f"rank {rank}: {f.name} is {a}, expected {b}"
            if a is not None:
                computed_in = UNIT[torch.float64 if case.dtype == torch.float64 else torch.float32]
                limit = max(UNIT[a.dtype], computed_in) if a.is_floating_point() else 0.0
                assert error(a, b) <= limit, f"rank {rank}: {f.name} is off by {error(a, b):.2e}, allowed {limit:.2e}"
