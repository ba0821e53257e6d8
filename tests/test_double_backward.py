"""Differentiating twice, across ranks: a gradient penalty and forces train as in one process with the whole batch."""

import itertools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

import syncbn
from syncbn import composed
from syncbn.functional import sync_batch_norm
from tests.support.global_batch import part, shared, whole
from tests.support.oracle import ACTIVATIONS, UNIT, error
from tests.support.ranks import Collectives, RankPool

EPILOGUES = [(activation, fused, fused) for activation, fused in itertools.product(ACTIVATIONS, (False, True))]
EPILOGUES += [(None, True, False), ("relu", False, True)]


def _grad_check(activation: str | None, residual: bool, masked: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    shape = (4, 2, 2)
    x, r = (2 * torch.randn(shape, dtype=torch.float64) + 1 for _ in range(2))
    w, b = (torch.randn(2, dtype=torch.float64) for _ in range(2))
    mask = part(torch.rand(4, 2) > 0.3) if masked else None

    def function(x: Tensor, *others: Tensor) -> Tensor:
        weight, bias = (w, b) if frozen else map(shared, others[:2])
        added = part(others[-1]) if residual else None
        arguments = {"residual": added, "activation": activation, "mask": mask}
        return whole(sync_batch_norm(part(x), None, None, weight, bias, True, **arguments))

    inputs = [x] if frozen else [x, w, b]
    inputs = [t.requires_grad_() for t in (*inputs, *([r] if residual else []))]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


@pytest.mark.parametrize(("activation", "residual", "masked"), EPILOGUES)
def test_first_and_second_derivatives(ranks: RankPool, activation: str | None, residual: bool, masked: bool) -> None:
    """gradcheck and gradgradcheck of x, weight, bias and residual, as one function of both ranks' batches."""
    ranks.run(2, _grad_check, activation, residual, masked, False)


def test_of_the_input_alone(ranks: RankPool) -> None:
    """The same with a weight and a bias that need no gradient."""
    ranks.run(2, _grad_check, "silu", False, False, True)


def _third_derivative() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    v, u = torch.randn_like(x), torch.randn_like(x)

    def slope(x: Tensor) -> Tensor:
        y = whole(sync_batch_norm(part(x), None, None, training=True, activation="silu"))
        (dx,) = torch.autograd.grad(y, x, v, create_graph=True)
        (ddx,) = torch.autograd.grad(dx, x, u, create_graph=True)
        return ddx

    assert gradcheck(slope, [x])


def test_third_derivative(ranks: RankPool) -> None:
    """What comes out of a double backward can be differentiated again."""
    ranks.run(2, _third_derivative)


class Energy(nn.Module):
    """A scalar for each sample of (N, 3, L); float64."""

    def __init__(self, norm: Callable[[int, str | None], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv1, self.norm1 = nn.Conv1d(3, 4, 1), norm(4, "silu")
        self.conv2, self.norm2 = nn.Conv1d(4, 4, 3, padding=1), norm(4, None)
        self.head = nn.Linear(4, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = y + torch.tanh(self.norm2(self.conv2(y)))
        return self.head(y.mean(2)).squeeze(1)


class Plain(nn.BatchNorm1d):
    """The oracle's layer: torch's, whose double backward is a formula of its own, then the activation."""

    def __init__(self, channels: int, activation: str | None) -> None:
        super().__init__(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return F.silu(y) if self.activation else y


def ours(channels: int, activation: str | None) -> nn.Module:
    return syncbn.SyncBatchNorm(channels, activation=activation)


def force_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Summed over samples: energies and forces, −dE/dx, against made-up targets."""
    energy = model(x)
    (slope,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return (energy - x.detach().mean((1, 2))).square().sum() + (-slope - x.detach().sin()).square().sum()


def penalty_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Summed over samples: a critic's score, and how far its slope is from 1 (Gulrajani et al., 2017)."""
    score = model(x)
    (slope,) = torch.autograd.grad(score.sum(), x, create_graph=True)
    return score.sum() + 10 * (slope.flatten(1).norm(dim=1) - 1).square().sum()


LOSSES = {"forces": force_loss, "penalty": penalty_loss}
SPLITS = {"even": (3, 3), "uneven": (5, 1), "empty": (6, 0)}
SAMPLES, STEPS = 6, 3


def samples() -> Tensor:
    return torch.randn(SAMPLES, 3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def train(model: nn.Module, loss: str, split: tuple[int, ...]) -> tuple[list[Tensor], list[tuple[int, ...]]]:
    """The parameters and buffers after a few steps, and each step's collectives: forward and slope, backward."""
    rank = dist.get_rank() if dist.is_initialized() and len(split) > 1 else 0
    counts = []
    for _ in range(STEPS):
        model.zero_grad()
        x = samples().split(split)[rank].requires_grad_()
        with Collectives() as forward:
            value = LOSSES[loss](model, x) / SAMPLES
        with Collectives() as backward:
            value.backward()
        for p in model.parameters():
            if len(split) > 1:
                dist.all_reduce(p.grad)
            with torch.no_grad():
                p -= 0.05 * p.grad
        counts.append((forward.count, backward.count))
    return [*(p.detach() for p in model.parameters()), *model.buffers()], counts


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss", LOSSES)
def test_training_on_slopes_equals_one_process(ranks: RankPool, loss: str, split: str) -> None:
    """Steps on forces, and on a gradient penalty, end where one process with all samples ends.

    A layer sums over the ranks once forward, once for the slope, and at most three times in the backward through it:
    the cotangents of the slope's sums and of the batch's, and its ordinary backward.
    """
    right, _ = train(Energy(Plain), loss, (SAMPLES,))
    for parameters, counts in ranks.run(2, train, Energy(ours), loss, SPLITS[split]):
        assert counts == [(2 + 2, 2 * 3)] * STEPS
        for actual, expected in zip(parameters, right, strict=True):
            assert error(actual, expected) <= 1e-11


def _float32() -> None:
    torch.manual_seed(dist.get_rank())
    x = torch.randn(5, 6, 9)
    found = []
    for dtype in (torch.float32, torch.float64):
        layer = ours(6, "silu").to(dtype)
        leaf = x.to(dtype, copy=True).requires_grad_()
        (dx,) = torch.autograd.grad(layer(leaf).square().sum(), leaf, create_graph=True)
        dx.pow(3).sum().backward()
        found.append((dx.detach(), leaf.grad, layer.weight.grad))
    for actual, right in zip(*found, strict=True):
        assert actual.dtype == torch.float32
        assert error(actual, right) <= 3 * UNIT[torch.float32]  # a chain of three passes, each of that error


def test_float32(ranks: RankPool) -> None:
    """In float32 the second derivative is that in float64, to the rounding of its passes."""
    ranks.run(2, _float32)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_one_tensor_as_input_and_residual(activation: str | None) -> None:
    """x + bn(x): each of the two roles has its own gradient, in a differentiable backward as in an ordinary one."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    dy = torch.randn_like(x)
    y = sync_batch_norm(x, None, None, training=True, residual=x, activation=activation)
    (ordinary,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (differentiable,) = torch.autograd.grad(y, x, dy, create_graph=True)
    assert error(differentiable, ordinary) <= UNIT[torch.float64]


def test_an_ordinary_backward_composes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without create_graph the back-end's kernels do the work, and the differentiable arithmetic is not touched."""
    monkeypatch.setattr(composed, "normalize_batch", lambda *_: pytest.fail("composed"))
    layer = syncbn.SyncBatchNorm(3, activation="relu")
    layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward()
    with pytest.raises(pytest.fail.Exception, match="composed"):
        layer(torch.randn(4, 3, 5, requires_grad=True)).sum().backward(create_graph=True)
