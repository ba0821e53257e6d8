"""An empty batch keeps its memory format: torch's own operations lose it, as x + x and relu do."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import syncbn
from syncbn import backends
from tests.support.cpu_backends import BACKENDS
from tests.support.oracle import in_layout

SHAPES = ((0, 3, 4, 4), (0, 3, 2, 4, 4), (0, 3, 5), (0, 3), (2, 3, 0, 4))
LAID_OUT = list(itertools.product(SHAPES, ("contiguous", "channels_last")))
Way = Callable[[nn.Module, Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]
"""y and dx of a layer, given x, residual and mask."""


def _by(backend: str) -> Way:
    def step(layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        with backends.force(backend):
            y = layer(x.requires_grad_(), residual, mask)
            return y, torch.autograd.grad(y, x, torch.randn_like(y))[0]

    return step


def _create_graph(layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    y = layer(x.requires_grad_(), residual, mask)
    return y, torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)[0]


def _vjp(layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    y, pullback = torch.func.vjp(lambda x: layer(x, residual, mask), x)
    return y, pullback(torch.randn_like(y))[0]


def _forward_ad(layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    y, _ = torch.func.jvp(lambda x: layer(x, residual, mask), (x,), (torch.randn_like(x),))
    return y, x


def _meta(layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    there = [None if t is None else t.to("meta") for t in (x, residual, mask)]
    y = layer.to("meta")(there[0].requires_grad_(), *there[1:])
    return y, torch.autograd.grad(y, there[0], torch.randn_like(y))[0]


def _without_gradient(
    layer: nn.Module, x: Tensor, residual: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return layer(x, residual, mask), x


WAYS: dict[str, Way] = {
    **{backend: _by(backend) for backend in BACKENDS},
    "create_graph": _create_graph,
    "vjp": _vjp,
    "jvp": _forward_ad,
    "meta": _meta,
    "no_grad": _without_gradient,
}


def _given(
    shape: tuple[int, ...], layout: str, has_residual: bool, is_masked: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = in_layout(torch.randn(shape), layout)
    residual = torch.randn_like(x) if has_residual else None
    return x, residual, torch.ones(shape[0], *shape[2:], dtype=torch.bool) if is_masked else None


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own forward-mode AD uses it
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("shape", "layout"), LAID_OUT, ids=str)
def test_a_training_step_keeps_it(shape: tuple[int, ...], layout: str, way: str) -> None:
    """y and dx have the strides of x, with and without a residual, a mask and an activation."""
    for has_residual, is_masked, activation in itertools.product((False, True), (False, True), (None, "relu", "silu")):
        x, residual, mask = _given(shape, layout, has_residual, is_masked)
        y, dx = WAYS[way](syncbn.SyncBatchNorm(3, activation=activation), x, residual, mask)
        told = has_residual, is_masked, activation
        assert (y.shape, y.stride()) == (x.shape, x.stride()), told
        assert (dx.shape, dx.stride()) == (x.shape, x.stride()), told


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_evaluation_keeps_torchs(layout: str) -> None:
    """y has the strides that nn.BatchNorm2d's has, with whatever follows it in the layer; so it has after reverting."""
    for has_residual, is_masked, activation in itertools.product((False, True), (False, True), (None, "relu", "silu")):
        x, residual, mask = _given((0, 3, 4, 4), layout, has_residual, is_masked)
        right = nn.BatchNorm2d(3).eval()(x).stride()
        layer = syncbn.SyncBatchNorm(3, activation=activation).eval()
        assert layer(x, residual, mask).stride() == right
        assert syncbn.revert_sync_batchnorm(layer)(x, residual, mask).stride() == right


def test_the_layout_of_an_empty_batch_can_be_lost() -> None:
    """What these tests guard against is there: adding an empty channels_last tensor to itself loses the format."""
    x = in_layout(torch.randn(0, 3, 4, 4), "channels_last")
    assert x.stride() == (48, 1, 12, 3) != (x + x).stride()
