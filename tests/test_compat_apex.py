"""apex's names, with apex's meaning."""

import pytest
import torch
from torch import nn

import syncbn
from syncbn.compat import apex
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool


@pytest.mark.parametrize("channel_last", [False, True])
@pytest.mark.parametrize("fuse_relu", [False, True])
@pytest.mark.parametrize("with_z", [False, True])
def test_channel_last_fuse_relu_and_z(channel_last: bool, fuse_relu: bool, with_z: bool) -> None:
    """(N, *S, C) inputs, a fused relu and a residual z give the numbers and gradients of the composed layers."""
    layer = apex.SyncBatchNorm(3, channel_last=channel_last, fuse_relu=fuse_relu, dtype=torch.float64)
    right = nn.BatchNorm2d(3, dtype=torch.float64)
    x, z, dy = (torch.randn(4, 3, 5, 6, dtype=torch.float64) for _ in range(3))
    x1, x2 = x.clone().requires_grad_(), (x.movedim(1, -1).contiguous() if channel_last else x.clone()).requires_grad_()
    composed = right(x1) + z if with_z else right(x1)
    composed = composed.relu() if fuse_relu else composed
    composed.backward(dy)

    def out(t: torch.Tensor) -> torch.Tensor:
        return t.movedim(1, -1) if channel_last else t

    y = layer(x2, out(z) if with_z else None)
    y.backward(out(dy))
    assert y.is_contiguous()
    assert error(y, out(composed)) <= UNIT[torch.float64]
    assert error(x2.grad, out(x1.grad)) <= UNIT[torch.float64]
    assert error(layer.weight.grad, right.weight.grad) <= UNIT[torch.float64]


def test_convert_by_apexs_name() -> None:
    """convert_syncbn_model converts; channel_last is refused, with what to do instead."""
    net = apex.convert_syncbn_model(nn.Sequential(nn.BatchNorm2d(3)))
    assert isinstance(net[0], syncbn.SyncBatchNorm)
    with pytest.raises(ValueError, match="channels_last"):
        apex.convert_syncbn_model(net, channel_last=True)


def _groups() -> None:
    assert apex.create_syncbn_process_group(2) is syncbn.new_group(2)
    assert apex.create_syncbn_process_group(0) is syncbn.new_group("world")
    with pytest.raises(ValueError, match="groups of 3"):
        apex.create_syncbn_process_group(3)


def test_groups_by_apexs_name(ranks: RankPool) -> None:
    """create_syncbn_process_group makes the groups of new_group; 0 is the world."""
    ranks.run(4, _groups)


def test_reverting_apexs_layer() -> None:
    """An apex layer that takes (N, C, *S) reverts with its relu; one with channels last is refused."""
    layer = apex.SyncBatchNorm(3, fuse_relu=True).eval()
    x = torch.randn(2, 3, 4, 4)
    right = layer(x)
    assert torch.equal(syncbn.revert_sync_batchnorm(layer)(x), right)
    with pytest.raises(TypeError, match="channel_last=False"):
        syncbn.revert_sync_batchnorm(apex.SyncBatchNorm(3, channel_last=True))
