"""torch.compile with what training puts around it: checkpointing, DistributedDataParallel, groups, autocast."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tests.support.layer_runs import compiled, generates
from tests.support.nets import Net, assert_same_state, assert_step, batch
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool

SELECTIVE = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])
NOTHING = functools.partial(create_selective_checkpoint_contexts, lambda *_, **__: CheckpointPolicy.MUST_RECOMPUTE)
INSIDE = {"all": "all", "selective": SELECTIVE, "nothing saved": NOTHING}


def _inside(kind: str) -> None:
    net = Net(checkpointed=INSIDE[kind])
    right = copy.deepcopy(net)
    right.checkpointed = None
    called = compiled(net, "aot_eager")
    for seed in range(2):
        assert_step(called, *batch(3 + dist.get_rank(), seed), right)
    assert_same_state(net, right)


@pytest.mark.parametrize("kind", INSIDE)
def test_checkpoint_inside(ranks: RankPool, kind: str) -> None:
    """A region within what is compiled is recomputed by the graph, but for the sums, whatever its policy says."""
    ranks.run(2, _inside, kind)


def _around(reentrant: bool, compiler: str) -> None:
    net = Net()
    right = copy.deepcopy(net)
    graph = compiled(net, compiler)
    called: Callable[[Tensor], Tensor] = functools.partial(checkpoint, graph, use_reentrant=reentrant)
    for seed in range(2):
        assert_step(called, *batch(3 + dist.get_rank(), seed), right)
    net.zero_grad()
    right.zero_grad()
    assert_step(graph, *batch(2, 5), right)  # the same graph where no region is
    assert_same_state(net, right)


@pytest.mark.parametrize(
    ("reentrant", "compiler"),
    [(True, "aot_eager"), (False, "aot_eager"), pytest.param(False, "inductor", marks=generates)],
)
def test_checkpoint_around(ranks: RankPool, reentrant: bool, compiler: str) -> None:
    """A compiled net that is a region, run again as a whole, takes the sums of its first pass and moves nothing."""
    ranks.run(2, _around, reentrant, compiler)


def _alone_around() -> None:
    net = Net()
    right = copy.deepcopy(net)
    called = functools.partial(checkpoint, compiled(net, "aot_eager"), use_reentrant=False)
    assert_step(called, *batch(4), right, collectives=0)
    assert_same_state(net, right)


def test_checkpoint_around_alone(ranks: RankPool) -> None:
    """So it is without other ranks: the running statistics move once."""
    ranks.run(1, _alone_around)


def _ddp(outside: str) -> None:
    net = Net()
    right = DistributedDataParallel(copy.deepcopy(net))
    if outside == "ddp":
        called = DistributedDataParallel(compiled(net, "aot_eager"))
    else:
        torch.compiler.reset()
        called = torch.compile(DistributedDataParallel(net), backend="aot_eager")  # DDP's own code breaks the graph
    for seed in range(2):
        assert_step(called, *batch(3 + dist.get_rank(), seed), right, collectives=None)
    assert_same_state(net, right.module)


@pytest.mark.parametrize("outside", ["ddp", "compile"])
def test_distributed_data_parallel(ranks: RankPool, outside: str) -> None:
    """DDP around the compiled net, and compiled, trains as DDP around the eager one."""
    ranks.run(2, _ddp, outside)


def _groups(kind: str) -> None:
    rank = dist.get_rank()
    if kind == "mesh":
        group = init_device_mesh("cpu", (2, 2), mesh_dim_names=("node", "local"))["local"]
    else:
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
    net = Net(group)
    right = copy.deepcopy(net)
    called = compiled(net, "aot_eager")
    assert_step(called, *batch(2 + rank), right, collectives=None)
    assert_same_state(net, right)


@pytest.mark.parametrize("kind", ["group", "mesh"])
def test_groups(ranks: RankPool, kind: str) -> None:
    """A ProcessGroup of some ranks, or one dimension of a mesh, is the one that the compiled net reduces over."""
    ranks.run(4, _groups, kind)


def _autocast() -> None:
    net = Net()
    right = copy.deepcopy(net)

    def forward(module: torch.nn.Module, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)

    called = compiled(functools.partial(forward, net), "aot_eager")
    for seed in range(2):
        x, dy = batch(3 + dist.get_rank(), seed)
        x_right = x.detach().clone().requires_grad_()
        y, y_right = called(x), forward(right, x_right)
        assert y.dtype == y_right.dtype == torch.bfloat16
        for each in (y, y_right):
            each.backward(dy.bfloat16())
        # Both round to bfloat16 at the same places; a rounding may fall the other way once a layer.
        assert error(y, y_right.double()) <= 2 * UNIT[torch.bfloat16]
        assert error(x.grad, x_right.grad.double()) <= 4 * UNIT[torch.bfloat16]
    assert net.norm1.running_mean.dtype == torch.float32
    assert error(net.norm2.running_var, right.norm2.running_var.double()) <= UNIT[torch.bfloat16]


def test_autocast(ranks: RankPool) -> None:
    """Under bfloat16 autocast inside the graph, statistics stay float32 and the output is eager's."""
    ranks.run(2, _autocast)
