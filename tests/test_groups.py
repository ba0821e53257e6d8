"""Process groups: made by scope, accepted everywhere, carried through copies and files."""

import copy
import os
import pickle
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import syncbn
from tests.support.ranks import RankPool


def _scopes() -> None:
    rank = dist.get_rank()
    pair = syncbn.new_group(2)
    assert dist.get_process_group_ranks(pair) == [rank // 2 * 2, rank // 2 * 2 + 1]
    assert syncbn.new_group(2) is pair
    assert syncbn.new_group("world") is syncbn.new_group(4) is dist.group.WORLD
    with pytest.raises(ValueError, match="groups of 3 for 4 ranks"):
        syncbn.new_group(3)
    for wrong in (0, -1, "rack", 1.5, True):
        with pytest.raises(ValueError, match="A scope is"):
            syncbn.new_group(wrong)
    with pytest.raises(RuntimeError, match="LOCAL_WORLD_SIZE"):
        syncbn.new_group("node")
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    try:
        assert syncbn.new_group("node") is pair
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]
    alone = syncbn.new_group(1)
    assert dist.get_world_size(alone) == 1


def test_groups_by_scope(ranks: RankPool) -> None:
    """Every k ranks, per node, world; made once; clear errors for what does not divide or is not set."""
    ranks.run(4, _scopes)


def test_without_a_process_group_there_is_no_group() -> None:
    """Alone, every scope is None, which a layer takes as all there is; a wrong one is still an error."""
    assert syncbn.new_group(2) is syncbn.new_group("node") is None
    with pytest.raises(ValueError, match="A scope is"):
        syncbn.new_group("rack")


def _means(kind: str) -> torch.Tensor:
    rank = dist.get_rank()
    group = (
        syncbn.new_group(2) if kind == "group" else init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
    )
    layer = syncbn.SyncBatchNorm(1, process_group=group, momentum=1.0)
    if kind == "convert":
        layer = syncbn.convert_sync_batchnorm(nn.BatchNorm1d(1, momentum=1.0), group)
    layer(torch.full((2, 1), float(rank)))
    functional = torch.zeros(1), torch.ones(1)
    syncbn.functional.sync_batch_norm(
        torch.full((2, 1), float(rank)), *functional, training=True, momentum=1.0, process_group=group
    )
    assert torch.equal(functional[0], layer.running_mean)
    return layer.running_mean


@pytest.mark.parametrize("kind", ["group", "mesh", "convert"])
def test_a_group_and_a_mesh_synchronise_their_ranks(ranks: RankPool, kind: str) -> None:
    """A group or a 1-d mesh given to the layer, the converter or the function shares statistics among its ranks."""
    assert [float(mean) for mean in ranks.run(4, _means, kind)] == [0.5, 0.5, 2.5, 2.5]


def _two_dimensions() -> None:
    layer = syncbn.SyncBatchNorm(1, process_group=init_device_mesh("cpu", (2, 2)))
    with pytest.raises(ValueError, match="must have one dimension; got 2"):
        layer(torch.ones(2, 1))


def test_a_mesh_of_two_dimensions_is_refused(ranks: RankPool) -> None:
    """A 2-d mesh is an error on every rank."""
    ranks.run(4, _two_dimensions)


def _copies() -> bytes:
    pair = syncbn.new_group(2)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(1), syncbn.SyncBatchNorm(1)), pair)
    net[1].process_group = pair
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert other[0].process_group is other[1].process_group is pair
    average = torch.optim.swa_utils.AveragedModel(net)
    assert average.module[0].process_group is pair
    return pickle.dumps(net)


def test_copies_keep_the_group(ranks: RankPool) -> None:
    """deepcopy, EMA copies and a pickle loaded where the group exists have the very same group."""
    saved = ranks.run(4, _copies)[3]
    with pytest.warns(UserWarning, match=r"ranks \[2, 3\], which this process does not have"):
        net = pickle.loads(saved)
    assert net[0].process_group is None
    assert net(torch.randn(4, 1)).isfinite().all()


def _world() -> bytes:
    layer = syncbn.SyncBatchNorm(1, process_group=dist.group.WORLD)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(layer)).process_group is dist.group.WORLD
    return pickle.dumps(syncbn.SyncBatchNorm(1))


def test_the_default_group_needs_no_words(ranks: RankPool) -> None:
    """A layer of the whole world finds it again; a layer without a group loads silently anywhere."""
    assert pickle.loads(ranks.run(2, _world)[0]).process_group is None


def _outside() -> tuple[list[str], bytes] | None:
    group, mesh = dist.new_group([0]), DeviceMesh("cpu", [0])
    if dist.get_rank() == 0:
        return None
    net = nn.Sequential(*(syncbn.SyncBatchNorm(1, process_group=each) for each in (group, mesh)))
    return [row.group for row in syncbn.conversion_report(net)], pickle.dumps(net)


def test_a_rank_outside_of_a_group_can_report_and_save(ranks: RankPool) -> None:
    """The report names the ranks of a mesh; what torch gives instead of a group names none. Both can be pickled."""
    groups, saved = ranks.run(2, _outside)[1]
    assert groups == ["ranks of others", "ranks 0"]
    with pytest.warns(UserWarning, match="now synchronises over the default group") as warned:
        net = pickle.loads(saved)
    assert ["of others than its rank" in str(each.message) for each in warned] == [True, False]
    assert [m.process_group for m in net] == [None, None]
