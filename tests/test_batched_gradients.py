"""Backwards that are mapped over: many cotangents at once, Jacobians and Hessians, on one rank and on two."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._vmap_internals import _vmap
from torch.autograd.functional import hessian, jacobian
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import backends, composed
from tests.support.cpu_backends import ON_CPU
from tests.support.layer_runs import let_torch_warn_of_itself
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool

EXACT = UNIT[torch.float64]
N, C, COTANGENTS = 3, 2, 4
"""Of a rank's batch (N, C, 2)."""


class Net(nn.Module):
    """A layer between functions that are not linear."""

    def __init__(self, norm: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.norm, self.after = norm.double(), after
        with torch.no_grad():
            for p in self.norm.parameters():
                p.copy_(torch.linspace(0.5, 1.5, C))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x.sin())
        return (y if self.after is None else self.after(y)).exp()


class Added(nn.Module):
    """A residual, inside of the layer or outside."""

    def __init__(self, norm: nn.Module, fused: bool) -> None:
        super().__init__()
        self.norm, self.fused = norm, fused

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, residual=x.cos()) if self.fused else torch.relu(self.norm(x) + x.cos())


class Masked(nn.Module):
    """Every position of a sample but its last counts."""

    def __init__(self, norm: nn.Module, masks: bool) -> None:
        super().__init__()
        self.norm, self.masks = norm, masks

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.tensor([True, False])
        if self.masks:
            return self.norm(x, mask=mask.expand(len(x), 2))
        return torch.cat([self.norm(x[..., :1]), torch.zeros_like(x[..., 1:])], dim=2)


Pair = tuple[Callable[[], nn.Module], Callable[[], nn.Module]]
NETS: dict[str, Pair] = {
    "converted": (
        lambda: Net(syncbn.convert_sync_batchnorm(nn.BatchNorm1d(C))),
        lambda: Net(nn.BatchNorm1d(C)),
    ),
    "silu": (
        lambda: Net(syncbn.SyncBatchNorm(C, activation="silu")),
        lambda: Net(nn.BatchNorm1d(C), nn.SiLU()),
    ),
    "without parameters": (
        lambda: Net(syncbn.SyncBatchNorm1d(C, affine=False, track_running_stats=False)),
        lambda: Net(nn.BatchNorm1d(C, affine=False, track_running_stats=False)),
    ),
    "residual and relu": (
        lambda: Net(Added(syncbn.SyncBatchNorm(C, activation="relu"), True)),
        lambda: Net(Added(nn.BatchNorm1d(C), False)),
    ),
    "masked": (
        lambda: Net(Masked(syncbn.SyncBatchNorm(C), True)),
        lambda: Net(Masked(nn.BatchNorm1d(C), False)),
    ),
}
nets = pytest.mark.parametrize("name", NETS)


def whole_batch() -> tuple[Tensor, Tensor]:
    """x of all ranks, and cotangents of y."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    generator = torch.Generator().manual_seed(2)
    x, *dys = torch.randn(1 + COTANGENTS, size * N, C, 2, dtype=torch.float64, generator=generator)
    return x, torch.stack(dys)


def here() -> slice:
    """The samples of this rank."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return slice(N * rank, N * rank + N)


def summed(t: Tensor) -> Tensor:
    """Over the ranks, as DistributedDataParallel would."""
    t = t.clone()
    if dist.is_initialized():
        dist.all_reduce(t)
    return t


def by_flag(y: Tensor, leaves: list[Tensor], dys: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, leaves, dys, is_grads_batched=True, **kwargs)


def by_vmap(y: Tensor, leaves: list[Tensor], dys: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, **kwargs))(dys)


def by_two_vmaps(y: Tensor, leaves: list[Tensor], dys: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    twice = torch.vmap(torch.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, **kwargs)))
    return tuple(t.flatten(0, 1) for t in twice(dys.unflatten(0, (2, -1))))


def by_the_last_dimension(y: Tensor, leaves: list[Tensor], dys: Tensor, **kwargs: Any) -> tuple[Tensor, ...]:
    return torch.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, **kwargs), in_dims=-1)(dys.movedim(0, -1))


WAYS = [by_flag, by_vmap, by_two_vmaps, by_the_last_dimension]
ways = pytest.mark.parametrize("batched", WAYS, ids=lambda f: f.__name__)


def _cotangents(name: str, batched: Any, region: bool, backend: str) -> None:
    """dx of the whole batch, parameter gradients that add up to its, one collective; the statistics moved once."""
    net, right = (make() for make in NETS[name])
    x, dys = whole_batch()
    leaf, leaf_right = x[here()].clone().requires_grad_(), x.clone().requires_grad_()
    y_right = right(leaf_right)
    with backends.force(backend):
        y = checkpoint(net, leaf, use_reentrant=False) if region else net(leaf)
        with Collectives() as collectives:
            grads = batched(y, [leaf, *net.parameters()], dys[:, here()])
    assert collectives.count == (1 if dist.is_initialized() else 0)
    expected = [torch.autograd.grad(y_right, [leaf_right, *right.parameters()], dy, retain_graph=True) for dy in dys]
    dx, *parameters = (torch.stack(each) for each in zip(*expected, strict=True))
    assert error(grads[0], dx[:, here()]) <= EXACT
    for mine, theirs in zip(grads[1:], parameters, strict=True):
        assert error(summed(mine), theirs) <= EXACT
    for a, b in zip(net.buffers(), right.buffers(), strict=True):
        assert error(a, b.double()) <= EXACT


@nets
@ways
@pytest.mark.parametrize("region", [False, True], ids=["", "checkpointed"])
def test_many_cotangents_at_once(ranks: RankPool, name: str, batched: Any, region: bool) -> None:
    """Mapped over cotangents, a backward gives each its gradients, with one collective for all of them; in a
    checkpointed region too, which moves no statistic again when the map recomputes it.
    """
    _cotangents(name, batched, region, ON_CPU)
    ranks.run(2, _cotangents, name, batched, region, ON_CPU)


@ways
def test_by_the_specification_too(ranks: RankPool, batched: Any) -> None:
    """It is no matter of the back-end."""
    _cotangents("silu", batched, False, "reference")
    ranks.run(2, _cotangents, "silu", batched, False, "reference")


def _slopes_of_slopes(name: str, batched: Any) -> None:
    """A batch of gradients is differentiated in turn."""
    net, right = (make() for make in NETS[name])
    x, dys = whole_batch()
    results = []
    for model, part in ((net, here()), (right, slice(None))):
        leaf = x[part].clone().requires_grad_()
        (dx,) = batched(model(leaf), [leaf], dys[:, part], create_graph=True)
        results.append(torch.autograd.grad(dx.pow(3).sum(), [leaf, *model.parameters()], allow_unused=True))
    (second, *parameters), (second_right, *parameters_right) = results
    assert error(second, second_right[here()]) <= EXACT
    for mine, theirs in zip(parameters, parameters_right, strict=True):
        assert (mine is None) == (theirs is None)
        assert mine is None or error(summed(mine), theirs) <= EXACT


@nets
@pytest.mark.parametrize("batched", [by_flag, by_vmap], ids=lambda f: f.__name__)
def test_a_batch_of_gradients_can_be_differentiated(ranks: RankPool, name: str, batched: Any) -> None:
    """With create_graph, across ranks: the second derivatives of one process with the whole batch."""
    _slopes_of_slopes(name, batched)
    ranks.run(2, _slopes_of_slopes, name, batched)


def _blocks(matrix: Tensor) -> Tensor:
    """(rows' rank, rows, columns' rank, columns) of a derivative by the whole batch of something as large."""
    size = dist.get_world_size() if dist.is_initialized() else 1
    return matrix.reshape(size, -1, size, N * C * 2)


def _jacobians(name: str) -> None:
    """In reverse mode a row is the derivative of that output of every rank by this rank's x; in forward mode a column
    is the derivative of this rank's y by that input of every rank.
    """
    let_torch_warn_of_itself()
    net, right = (make() for make in NETS[name])
    x, _ = whole_batch()
    rank = dist.get_rank() if dist.is_initialized() else 0
    blocks = _blocks(jacobian(right, x))
    for strategy, expected in (("reverse-mode", blocks.sum(0)[:, rank]), ("forward-mode", blocks.sum(2)[rank])):
        actual = jacobian(net, x[here()], vectorize=True, strategy=strategy)
        assert error(actual.reshape(expected.shape), expected) <= EXACT


def _hessians(name: str) -> None:
    """As Jacobians of the gradient of the sum of the ranks' losses."""
    let_torch_warn_of_itself()
    net, right = (make() for make in NETS[name])
    x, _ = whole_batch()
    rank = dist.get_rank() if dist.is_initialized() else 0
    blocks = _blocks(hessian(lambda x: right(x).pow(3).sum(), x))
    for strategy, expected in (("reverse-mode", blocks.sum(0)[:, rank]), ("forward-mode", blocks.sum(2)[rank])):
        actual = hessian(lambda x: net(x).pow(3).sum(), x[here()], vectorize=True, outer_jacobian_strategy=strategy)
        assert error(actual.reshape(expected.shape), expected) <= EXACT


@nets
def test_vectorized_jacobians(ranks: RankPool, name: str) -> None:
    """torch.autograd.functional.jacobian(vectorize=True), both strategies, against the whole batch's."""
    _jacobians(name)
    ranks.run(2, _jacobians, name)


@nets
def test_vectorized_hessians(ranks: RankPool, name: str) -> None:
    """torch.autograd.functional.hessian(vectorize=True), both strategies, against the whole batch's."""
    _hessians(name)
    ranks.run(2, _hessians, name)


@pytest.mark.parametrize("batched", [by_flag, by_vmap], ids=lambda f: f.__name__)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_in_float32(batched: Any, memory_format: torch.memory_format) -> None:
    """A float32 layer's batch of gradients is its gradients one by one, to rounding, in both formats."""
    layer = syncbn.SyncBatchNorm(C, activation="leaky_relu")
    x = torch.randn(N, C, 4, 4).to(memory_format=memory_format).requires_grad_()
    y, dys = layer(x), torch.randn(COTANGENTS, N, C, 4, 4)
    leaves = [x, layer.weight, layer.bias]
    one_by_one = [torch.autograd.grad(y, leaves, dy, retain_graph=True) for dy in dys]
    for mine, theirs in zip(batched(y, leaves, dys), map(torch.stack, zip(*one_by_one, strict=True)), strict=True):
        assert error(mine, theirs.double()) <= 2 * UNIT[torch.float32]


def _maps_in_maps() -> None:
    group = dist.group.WORLD.group_name
    a, b = torch.arange(15.0).view(3, 5) + dist.get_rank(), torch.arange(20.0).view(4, 5)

    def summed(t: Tensor) -> Tensor:
        return composed._all_sum(t, group, 1)

    def check(kind: Callable[[Tensor, Tensor], Tensor]) -> None:
        right = torch.stack([torch.stack([summed(kind(u, v)) for v in b]) for u in a])
        with Collectives() as collectives:
            mapped = _vmap(lambda u: _vmap(lambda v: summed(kind(u, v)))(b))(a)
        assert torch.equal(mapped, right)
        assert collectives.count == 1

    for kind in (torch.mul, lambda a, b: a, lambda a, b: b):
        check(kind)


def test_one_collective_for_maps_in_maps(ranks: RankPool) -> None:
    """Under two of the maps that is_grads_batched uses, either of which may not concern it, a sum is one collective."""
    ranks.run(2, _maps_in_maps)
