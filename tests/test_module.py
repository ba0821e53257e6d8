"""The layer as a drop-in: constructor, state, modes, copies."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import backends
from tests.support.cpu_backends import BACKENDS

CONFIGURATIONS = [
    {},
    {"affine": False},
    {"track_running_stats": False},
    {"momentum": None},
    {"dtype": torch.float64, "eps": 1e-3},
]
configurations = pytest.mark.parametrize("arguments", CONFIGURATIONS, ids=str)


def test_constructor_order_is_torchs() -> None:
    """Positional arguments of nn.SyncBatchNorm mean the same here; ours are keyword-only and last."""
    ours = inspect.signature(syncbn.SyncBatchNorm).parameters
    torchs = inspect.signature(nn.SyncBatchNorm).parameters
    positional = [name for name, p in torchs.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {name: ours[name].default for name in positional} == {name: torchs[name].default for name in positional}
    assert [name for name, p in ours.items() if p.kind is p.KEYWORD_ONLY] == ["bias", "activation", "skip_nonfinite"]


def test_functional_order_is_torchs() -> None:
    """F.batch_norm's positional arguments mean the same in our function."""
    ours = list(inspect.signature(syncbn.functional.sync_batch_norm).parameters)
    torchs = list(inspect.signature(nn.functional.batch_norm).parameters)
    assert ours[: len(torchs)] == torchs


@configurations
def test_checkpoints_load_both_ways(arguments: dict) -> None:
    """Keys, order, version and values of the state are those of nn.BatchNorm2d."""
    ours, torchs = syncbn.SyncBatchNorm(3, **arguments), nn.BatchNorm2d(3, **arguments)
    assert list(ours.state_dict()) == list(torchs.state_dict())
    assert ours.state_dict()._metadata == torchs.state_dict()._metadata
    torchs.train()(torch.randn(4, 3, 5, 5, dtype=arguments.get("dtype")))
    ours.load_state_dict(torchs.state_dict())
    torchs.load_state_dict(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), torchs.state_dict().values(), strict=True))


def test_a_layer_without_beta() -> None:
    """bias=False registers no bias, here and in the state."""
    layer = syncbn.SyncBatchNorm(3, bias=False)
    assert layer.bias is None
    assert "bias" not in layer.state_dict()
    layer.reset_parameters()
    assert "bias=False" in repr(layer)


@configurations
def test_training_then_eval_is_batch_norm(arguments: dict) -> None:
    """Alone, three training steps and an eval are those of nn.BatchNorm2d."""
    arguments = {**arguments, "dtype": torch.float64}
    ours, torchs = syncbn.SyncBatchNorm(3, **arguments), nn.BatchNorm2d(3, **arguments)
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
        torch.testing.assert_close(ours(x), torchs(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(torchs.named_buffers()), rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x), rtol=0, atol=1e-12)


def test_momentum_may_change_between_calls() -> None:
    """The momentum in force at a call is the one that counts, None included."""
    ours, torchs = syncbn.SyncBatchNorm(3, dtype=torch.float64), nn.BatchNorm1d(3, dtype=torch.float64)
    for momentum in (0.1, 0.7, None, 0.0, 1.0, None):
        ours.momentum = torchs.momentum = momentum
        x = torch.randn(8, 3, dtype=torch.float64)
        ours(x)
        torchs(x)
        torch.testing.assert_close(ours.state_dict(), torchs.state_dict(), rtol=0, atol=1e-12)


def test_an_empty_batch_moves_only_the_counter() -> None:
    """A globally empty batch is counted, as by nn.BatchNorm, and moves no statistic; gradients are zeros, not None."""
    layer = syncbn.SyncBatchNorm(3)
    x = torch.zeros(0, 3, 4, 4, requires_grad=True)
    layer(x).sum().backward()
    assert layer.num_batches_tracked == 1
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(layer.running_var, torch.ones(3))
    assert x.grad.shape == x.shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


def test_buffers_are_moved_in_place() -> None:
    """Buffers stay the same tensors, so that whoever holds them sees them move."""
    layer = syncbn.SyncBatchNorm(3)
    before = {name: (buffer, buffer.clone()) for name, buffer in layer.named_buffers()}
    layer(torch.randn(4, 3))
    for name, buffer in layer.named_buffers():
        assert buffer is before[name][0]
        assert not torch.equal(buffer, before[name][1])


def test_two_calls_before_one_backward() -> None:
    """A layer called twice before one backward gets the gradients of both calls."""
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
    torchs = nn.BatchNorm1d(3, dtype=torch.float64)
    a, b = (torch.randn(6, 3, dtype=torch.float64) for _ in range(2))
    dy = torch.randn(6, 3, dtype=torch.float64)
    for each in (layer, torchs):
        ((each(a) * each(b)) * dy).sum().backward()
    torch.testing.assert_close(layer.weight.grad, torchs.weight.grad, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer.bias.grad, torchs.bias.grad, rtol=0, atol=1e-12)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_are_whole(copied) -> None:
    """A deep copy and a pickle have the settings and the state, and their own tensors."""
    layer = syncbn.SyncBatchNorm(3, activation="silu", momentum=None)
    layer(torch.randn(4, 3))
    other = copied(layer)
    assert repr(other) == repr(layer)
    assert all(torch.equal(a, b) for a, b in zip(layer.state_dict().values(), other.state_dict().values(), strict=True))
    x = torch.randn(4, 3)
    assert torch.equal(other(x), layer(x))
    assert other.running_mean is not layer.running_mean


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 1, 5, 5), (4, 3, 1, 1), (0, 3, 5, 5)], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_what_follows_may_work_in_place(backend: str, shape: tuple[int, ...], last: bool) -> None:
    """An in-place activation after the layer, as most models have one, gives the gradients of one that is not."""
    x = torch.randn(shape, dtype=torch.float64)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if last else x
    dy = torch.randn(shape, dtype=torch.float64)
    grads = []
    for inplace in (True, False):
        leaf = x.clone().requires_grad_()
        layer = syncbn.SyncBatchNorm(shape[1], dtype=torch.float64)
        with backends.force(backend):
            nn.ReLU(inplace)(layer(leaf)).backward(dy)
        grads.append((leaf.grad, layer.weight.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


def test_autocast() -> None:
    """Under bf16 autocast a conv's bf16 output is normalized in float32 by float32 parameters, and stays bf16."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), syncbn.SyncBatchNorm(4, activation="relu"))
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(2, 3, 5, 5))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert model[1].weight.grad.dtype == model[1].running_mean.dtype == torch.float32
    assert model[0].weight.grad.isfinite().all()


def test_repr_shows_what_differs_from_torch() -> None:
    """An activation is seen in the printed model."""
    assert repr(syncbn.SyncBatchNorm(3, activation="relu")) == (
        "SyncBatchNorm(3, eps=1e-05, momentum=0.1, affine=True, bias=True, track_running_stats=True, activation=relu)"
    )
