"""The function: its eval paths and the gradient's reach."""

import pytest
import torch
from torch.nn import functional as F

import syncbn
from syncbn.functional import sync_batch_norm
from tests.support.oracle import UNIT, error


@pytest.fixture
def batch() -> tuple[torch.Tensor, ...]:
    x = torch.randn(4, 5, 6, 7)
    return x, torch.randn(5), torch.rand(5) + 0.5, torch.randn(5), torch.randn(5)


def test_eval_is_torchs_batch_norm_to_the_bit(batch: tuple[torch.Tensor, ...]) -> None:
    """With running statistics, eval gives F.batch_norm's bits and moves nothing."""
    x, mean, var, weight, bias = batch
    before = mean.clone(), var.clone()
    y = sync_batch_norm(x, mean, var, weight, bias)
    assert torch.equal(y, F.batch_norm(x, mean, var, weight, bias))
    assert torch.equal(mean, before[0])
    assert torch.equal(var, before[1])


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
def test_eval_adds_residual_activates_and_masks(batch: tuple[torch.Tensor, ...], activation: str | None) -> None:
    """Eval with everything equals the composed formula, gradients included, and NaN behind the mask reaches nothing."""
    x, mean, var, weight, bias = (t.double() for t in batch)
    residual, mask = torch.randn_like(x), torch.rand(4, 6, 7) > 0.3
    act = {None: lambda z: z, "relu": F.relu, "leaky_relu": F.leaky_relu, "silu": F.silu}[activation]
    dy = torch.randn_like(x)
    keep = mask.unsqueeze(1)
    x1, r1 = x.clone().requires_grad_(), residual.clone().requires_grad_()
    right = torch.where(keep, act(F.batch_norm(x1, mean, var, weight, bias) + r1), 0)
    right.backward(dy)
    nan = float("nan")
    x2, r2 = (torch.where(keep, t, nan).requires_grad_() for t in (x, residual))
    y = sync_batch_norm(x2, mean, var, weight, bias, residual=r2, activation=activation, mask=mask)
    y.backward(torch.where(keep, dy, nan))
    assert torch.equal(y, right)
    assert error(x2.grad, x1.grad) <= UNIT[torch.float64]
    assert error(r2.grad, r1.grad) <= UNIT[torch.float64]


@pytest.mark.parametrize("x_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_eval_takes_any_mix_of_dtypes(x_dtype: torch.dtype, dtype: torch.dtype) -> None:
    """Every pair of input and parameter dtypes works in eval and gives the input's dtype."""
    layer = syncbn.SyncBatchNorm(5, dtype=dtype).eval()
    x = torch.randn(4, 5, 6).to(x_dtype)
    y = layer(x, residual=torch.ones_like(x, dtype=torch.float32))
    assert y.dtype == x_dtype
    assert error(y, x.double() / (1 + 1e-5) ** 0.5 + 1) <= 2 * max(UNIT[x_dtype], UNIT[torch.float32])


def test_eval_without_statistics_uses_the_local_batch(batch: tuple[torch.Tensor, ...]) -> None:
    """Without running statistics eval normalizes by the batch at hand."""
    x = batch[0].double()
    assert error(sync_batch_norm(x, None, None), F.batch_norm(x, None, None, training=True)) <= UNIT[torch.float64]


def test_eval_of_an_empty_batch(batch: tuple[torch.Tensor, ...]) -> None:
    """An empty batch passes eval, with the right shape."""
    x, mean, var, *_ = batch
    assert sync_batch_norm(x[:0], mean, var, residual=x[:0], activation="relu").shape == (0, 5, 6, 7)


def test_training_without_statistics(batch: tuple[torch.Tensor, ...]) -> None:
    """Training without running statistics is training; there is just nothing to move."""
    x, *_, weight, bias = (t.double() for t in batch)
    right = F.batch_norm(x, None, None, weight, bias, training=True)
    assert error(sync_batch_norm(x, None, None, weight, bias, training=True), right) <= UNIT[torch.float64]


def test_cumulative_average_by_function(batch: tuple[torch.Tensor, ...]) -> None:
    """momentum None with a counter makes the running mean the mean of all batches' means."""
    mean, var, counter = torch.zeros(5).double(), torch.ones(5).double(), torch.tensor(0)
    batches = [torch.randn(7, 5, dtype=torch.float64) for _ in range(4)]
    for x in batches:
        sync_batch_norm(x, mean, var, training=True, momentum=None, num_batches_tracked=counter)
    assert counter == 4
    assert error(mean, torch.cat(batches).mean(0)) <= UNIT[torch.float64]


@pytest.mark.parametrize("needs", ["x", "weight", "bias", "residual", "weight bias", "x residual", "weight residual"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_of_any_subset(batch: tuple[torch.Tensor, ...], needs: str, activation: str | None) -> None:
    """Asking for some of the gradients gives the same ones as asking for all."""
    x, _, _, weight, bias = (t.double() for t in batch)
    tensors = {"x": x, "weight": weight, "bias": bias, "residual": torch.randn_like(x)}
    dy = torch.randn_like(x)

    def grads(names: list[str]) -> dict[str, torch.Tensor]:
        leaves = {k: t.clone().requires_grad_(k in names) for k, t in tensors.items()}
        y = sync_batch_norm(
            leaves["x"],
            None,
            None,
            leaves["weight"],
            leaves["bias"],
            True,
            residual=leaves["residual"],
            activation=activation,
        )
        y.backward(dy)
        return {k: t.grad for k, t in leaves.items() if t.grad is not None}

    every, some = grads(list(tensors)), grads(needs.split())
    assert sorted(some) == sorted(needs.split())
    assert all(torch.equal(some[k], every[k]) for k in some)
