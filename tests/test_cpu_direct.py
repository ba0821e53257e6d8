"""Calls on the CPU that are alike go the direct way, with the readable way's bits; what is unusual does not."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn import direct
from tests.support.cpu_backends import needs_library

pytestmark = needs_library
SHAPES: dict[str, tuple[tuple[int, ...], bool]] = {
    "planes": ((4, 6, 5, 7), False),
    "rows": ((4, 6, 5, 7), True),
    "matrix": ((9, 6), False),
    "sequence": ((3, 6, 11), False),
}


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Which steps of direct.py are taken."""
    taken: list[str] = []
    applied, gradients = direct._apply, direct.gradients
    direct._calls.clear()
    monkeypatch.setattr(direct, "_apply", lambda *given: (taken.append("direct"), applied(*given))[1])
    monkeypatch.setattr(direct, "gradients", lambda *given: (taken.append("readable backward"), gradients(*given))[1])
    yield taken
    direct._calls.clear()


def step(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> list[Tensor | None]:
    """y, all gradients, and the buffers after it."""
    leaves = [t.clone().requires_grad_() for t in (x, residual) if t is not None]
    y = layer(*leaves)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    grads = torch.autograd.grad(y, [*leaves, *parameters], dy)
    return [y.detach(), *grads, *(b.clone() for b in layer.buffers())]


@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("shape", "last"), SHAPES.values(), ids=SHAPES)
def test_both_ways_give_the_same_bits(
    ways: list[str], shape: tuple[int, ...], last: bool, dtype: torch.dtype, residual: bool, activation: str | None
) -> None:
    """The second call of a kind is direct, forward and backward, and gives what the first would have given."""
    layers = [syncbn.SyncBatchNorm(6, activation=activation, momentum=0.3) for _ in range(2)]
    given = [torch.randn(shape).to(dtype) for _ in range(6)]
    if last:
        given = [t.contiguous(memory_format=torch.channels_last) for t in given]
    for number, (x, added, dy) in enumerate((given[:3], given[3:])):
        results = []
        for layer, clears in ((layers[0], True), (layers[1], False)):
            if clears:
                direct._calls.clear()
            results.append(step(layer, x, added if residual else None, dy))
        for ours, right in zip(*results, strict=True):
            assert torch.equal(ours, right), number
    assert ways == ["direct"] * 2


def cast(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().double())


def with_gaps(layer: nn.Module) -> None:
    layer.running_mean = torch.zeros(6, 2)[:, 0]


def cumulative(layer: nn.Module) -> None:
    layer.momentum = None


def small_counter(layer: nn.Module) -> None:
    layer.num_batches_tracked = layer.num_batches_tracked.to(torch.int32)


CHANGES = [cast, with_gaps, cumulative, small_counter]


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_looked_at_anew(ways: list[str], change: Callable[[nn.Module], None]) -> None:
    """A parameter or buffer of another dtype or with gaps, or another rule: not launched as the call before was, and
    right; all but the cast weight never directly.
    """
    x, dy = torch.randn(2, 4, 6, 5, 5)
    layer, other = (nn.ModuleList([syncbn.SyncBatchNorm(6)])[0] for _ in range(2))
    step(layer, x, None, dy)
    change(layer)
    other.load_state_dict(layer.state_dict())
    other = other.double()
    if change is cumulative:
        other.momentum = None
    for _ in range(2):
        ours, right = step(layer, x, None, dy), step(other, x.double(), None, dy.double())
        for a, b in zip(ours, right, strict=True):
            assert torch.allclose(a.double(), b.double(), rtol=0, atol=3e-6 * float(b.double().abs().max()))
    of_other = 0 if change is cumulative else 1  # its second call
    assert ways.count("direct") - of_other == (1 if change is cast else 0)


def transposed(x: Tensor) -> Tensor:
    return x.transpose(2, 3)


def cropped(x: Tensor) -> Tensor:
    return x[:, :, 1:, :-1]


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def negated(x: Tensor) -> Tensor:
    return torch._neg_view(x)


def misplaced(x: Tensor) -> Tensor:
    moved = torch.frombuffer(bytearray(4 * x.numel() + 2), dtype=torch.float32, offset=2).view(x.shape)
    return moved.copy_(x)


@pytest.mark.parametrize("unusual", [transposed, cropped, expanded, negated, misplaced])
@pytest.mark.parametrize("what", ["x", "residual", "dy"])
def test_unusual_activations_are_read_as_they_are(
    ways: list[str], unusual: Callable[[Tensor], Tensor], what: str
) -> None:
    """Strides of any kind, lazy negation and odd addresses, of x, residual or dy, after calls that were ordinary."""
    layer, right = syncbn.SyncBatchNorm(6, activation="relu"), syncbn.SyncBatchNorm(6, activation="relu").double()
    given: dict[str, Any] = dict(zip(("x", "residual", "dy"), torch.randn(3, 4, 6, 5, 5), strict=True))
    for _ in range(2):
        layer(given["x"].requires_grad_(), given["residual"]).backward(given["dy"])
    given[what] = unusual(given[what].detach())
    if what != "dy" and unusual is cropped:
        given |= {other: cropped(t.detach()).contiguous() for other, t in given.items() if other != what}
    elif unusual is cropped:
        given["dy"] = torch.zeros(4, 6, 6, 6)[:, :, 1:, :-1].copy_(torch.randn(4, 6, 5, 5))
    x, residual = (given[name].detach().requires_grad_() for name in ("x", "residual"))
    ours = torch.autograd.grad(layer(x, residual), [x, residual, layer.weight, layer.bias], given["dy"])
    wide = [t.detach().double().requires_grad_() for t in (x, residual)]
    theirs = torch.autograd.grad(right(*wide), [*wide, right.weight, right.bias], given["dy"].double())
    for a, b in zip(ours, theirs, strict=True):
        assert float((a.double() - b).abs().max()) <= 3e-6 * float(b.abs().max())


def test_autograd_knows_that_the_buffers_move(ways: list[str]) -> None:
    """A graph of eval that saved the running statistics is not run with those of a later training call, be that direct
    or not: it is torch's error for a tensor that was changed.
    """
    layer, x = syncbn.SyncBatchNorm(6), torch.randn(4, 6, 5, requires_grad=True)
    for expected in ([], ["direct"]):
        y = layer.eval()(x)
        layer.train()(x)
        assert ways == expected
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        y = layer.eval()(x)
        y.sum().backward()
