"""FSDP2: a net whose parameters are sharded by fully_shard trains as in one process with the whole batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

import syncbn
from syncbn import classes
from tests.support.nets import Net, batch, sums_taken
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool
from tests.test_ddp import Net as ExactNet
from tests.test_ddp import assert_equal, batches, build, loss_of, train_alone


def sharded(net: torch.nn.Module, policy: MixedPrecisionPolicy | None = None) -> FSDPModule:
    """Each layer a unit of its own, and the rest one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    arguments = {"mesh": mesh} if policy is None else {"mesh": mesh, "mp_policy": policy}
    for child in net.children():
        fully_shard(child, **arguments)
    return fully_shard(net, **arguments)


def full(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def _train(checkpointed: bool) -> dict[str, Tensor]:
    net: ExactNet = syncbn.convert_sync_batchnorm(build())
    net.checkpointed = checkpointed
    model = sharded(net)
    assert isinstance(net.norm1.weight, DTensor)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in batches(dist.get_world_size()):
        optimizer.zero_grad()
        x = step[dist.get_rank()]
        with sums_taken() as taken:
            loss_of(model(x), x).backward()
        assert taken == [2 * 6 + 3] * 2 + [2 * 6 + 2] * 2  # two layers of six channels, forward and backward
        optimizer.step()
    return {name: full(t) for name, t in net.state_dict().items()}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_ten_steps_equal_one_process(ranks: RankPool, checkpointed: bool) -> None:
    """Ten SGD steps with sharded parameters give the parameters and buffers of one process with all samples."""
    first, second = ranks.run(2, _train, checkpointed)
    assert_equal(first, train_alone(2, "plain"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def _mixed(reduce_dtype: torch.dtype) -> None:
    net = Net()
    right = copy.deepcopy(net)
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype)
    model = sharded(net, policy)
    x, dy = batch(3 + dist.get_rank())
    y = model(x)
    y.backward(dy.bfloat16())
    leaves = {name: p.detach().bfloat16().requires_grad_() for name, p in right.named_parameters()}
    y_right = functional_call(right, leaves, (x.detach().bfloat16(),))
    y_right.backward(dy.bfloat16())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, y_right)
    for name, p in net.named_parameters():
        gradient = leaves[name].grad.double()
        dist.all_reduce(gradient)
        assert error(full(p.grad), gradient / 2) <= 2 * UNIT[reduce_dtype] + UNIT[torch.bfloat16]
    for buffer, expected in zip(net.buffers(), right.buffers(), strict=True):
        assert buffer.dtype == expected.dtype
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("reduce_dtype", [torch.float32, torch.bfloat16])
def test_mixed_precision(ranks: RankPool, reduce_dtype: torch.dtype) -> None:
    """Under a policy with bfloat16 parameters the output has the bits of a net cast so; buffers stay float32."""
    ranks.run(2, _mixed, reduce_dtype)


Change = Callable[[nn.Module], Any]
CHAINS: dict[str, tuple[Change, ...]] = {
    "sharded, converted": (syncbn.convert_sync_batchnorm,),
    "sharded, frozen, thawed": (syncbn.freeze, syncbn.unfreeze),
    "sharded, converted, frozen, thawed": (syncbn.convert_sync_batchnorm, syncbn.freeze, syncbn.unfreeze),
    "sharded, converted, reverted": (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm),
}


def _swapped(name: str, before: Change | None) -> None:
    norm = nn.BatchNorm2d(3)
    if before is not None:
        before(norm)
    net = sharded(nn.Sequential(nn.Conv2d(3, 3, 1), norm))
    for change in CHAINS[name] if before is None else (syncbn.unfreeze,):
        change(net)
        assert isinstance(net[1], FSDPModule)
        assert isinstance(net[1], nn.BatchNorm2d)
    assert isinstance(net[1], syncbn.SyncBatchNorm) == (before is None and name in list(CHAINS)[::2])
    assert not isinstance(net[1], classes.Frozen)
    net.train()(torch.randn(4, 3, 5, 5)).square().sum().backward()
    assert net[1].num_batches_tracked == 1
    assert net[1].weight.grad is not None


@pytest.mark.parametrize("name", CHAINS)
def test_a_layer_that_is_a_unit_of_its_own_can_be_swapped(ranks: RankPool, name: str) -> None:
    """A sharded layer is converted, frozen, thawed and reverted beneath what FSDP put on top of it, which stays."""
    ranks.run(2, _swapped, name, None)


def test_a_layer_that_was_frozen_before_can_be_thawed(ranks: RankPool) -> None:
    """A layer that was frozen and then sharded thaws."""
    ranks.run(2, _swapped, "", syncbn.freeze)
