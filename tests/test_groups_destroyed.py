"""Layers whose process group has ended: saved, reported on, evaluated, refused in words, and given another."""

import copy
import io
import os
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import syncbn
from syncbn.groups import Group
from tests.support.faults import Run, strike

X = torch.randn(4, 3)


def _mesh(name: str) -> Group:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))[name]


def _pair_by_torch() -> Group:
    """A group of its own at each call, as meshes are."""
    pairs = [dist.new_group([start, start + 1]) for start in (0, 2)]
    return pairs[dist.get_rank() // 2]


KINDS: dict[str, tuple[Callable[[], Any], Callable[[int], list[int]]]] = {
    "a group": (lambda: syncbn.new_group(2), lambda rank: [rank // 2 * 2, rank // 2 * 2 + 1]),
    "a group by torch": (_pair_by_torch, lambda rank: [rank // 2 * 2, rank // 2 * 2 + 1]),
    "the default group": (lambda: dist.group.WORLD, lambda rank: [0, 1, 2, 3]),
    "a row of a mesh": (lambda: _mesh("tp"), lambda rank: [rank // 2 * 2, rank // 2 * 2 + 1]),
    "a column of a mesh": (lambda: _mesh("dp"), lambda rank: [rank % 2, rank % 2 + 2]),
}
WAYS: dict[str, Callable[[Group], nn.Module]] = {
    "built": lambda group: syncbn.SyncBatchNorm(3, process_group=group),
    "set": lambda group: _with_group(syncbn.SyncBatchNorm(3), group),
    "converted": lambda group: syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3), group),
    "converted from torch's": lambda group: syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3, process_group=group)),
    "copied": lambda group: copy.deepcopy(syncbn.SyncBatchNorm(3, process_group=group)),
}


def _with_group(layer: nn.Module, group: Group | None) -> nn.Module:
    layer.process_group = group
    return layer


def _join_anew(run: Run) -> None:
    """Under other ranks than before, with groups that have the old ones' names."""
    address = f"file://{os.environ['NEW_GROUP']}"
    dist.init_process_group("gloo", init_method=address, rank=(run.rank + 1) % run.world, world_size=run.world)
    for start in range(run.world):
        dist.new_group(sorted({start, (start + 1) % run.world, (start + 2) % run.world}))


def _can_be_kept(layer: nn.Module, ranks: list[int]) -> None:
    """Saved with its ranks, of which a new default group may be; reported on, copied, evaluated, reverted."""
    assert syncbn.conversion_report(layer)[0].group == f"ranks {' '.join(map(str, ranks))}, destroyed"
    stream = io.BytesIO()
    torch.save(layer, stream)
    of_all = dist.is_initialized() and ranks == list(range(dist.get_world_size()))
    for load in (lambda: pickle.loads(pickle.dumps(layer)), lambda: _loaded(stream)):
        with warnings.catch_warnings(record=True) as warned:
            loaded = load()
        assert loaded.process_group is (dist.group.WORLD if of_all else None)
        said = f"of ranks {ranks}, which this process does not have"
        assert [said in str(warning.message) for warning in warned] == ([] if of_all else [True])
        assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), layer.parameters(), strict=True))
    again = copy.deepcopy(layer).eval()
    assert again.process_group is layer.process_group
    assert again(X).isfinite().all()
    assert not isinstance(syncbn.revert_sync_batchnorm(again), syncbn.SyncBatchNorm)


def _loaded(stream: io.BytesIO) -> Any:
    stream.seek(0)
    return torch.load(stream, weights_only=False)


def _is_refused(call: Callable[[], Any], ranks: list[int]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"must exist; got one of ranks {ranks} that")) as caught:
        call()
    assert "layer.process_group = syncbn.new_group(...), or None for the default group" in str(caught.value)


def outlives_its_group(run: Run) -> None:
    make, ranks_of = KINDS[os.environ["KIND"]]
    ranks = ranks_of(run.rank)
    layers = [way(make()) for way in WAYS.values()]
    group = layers[0].process_group
    for layer in layers:
        layer(X)
    dist.barrier()
    dist.destroy_process_group()
    for layer in layers:
        _can_be_kept(layer, ranks)
        layer(X)  # without a process group every layer is alone
    _join_anew(run)
    for layer in layers:
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        _can_be_kept(layer, ranks)
        _is_refused(lambda layer=layer: layer(X), ranks)
        _is_refused(lambda layer=layer: syncbn.recompute_statistics(layer, [X], process_group=group), ranks)
        assert all(torch.equal(buffer, before[name]) for name, buffer in layer.named_buffers())
    function = syncbn.functional.sync_batch_norm
    _is_refused(lambda: function(X, None, None, training=True, process_group=group), ranks)
    _is_refused(lambda: list(syncbn.EvenLoader([X], group)), ranks)
    _is_refused(lambda: syncbn.synchronize_statistics(layers[0], process_group=group), ranks)
    _takes_another(layers[0])


def _takes_another(layer: nn.Module) -> None:
    """What the error says, a new group and the default one; and meshes that are equal to the old ones."""
    layer.momentum, rank = 1.0, dist.get_rank()
    pair, row, column = syncbn.new_group(2), _mesh("tp"), _mesh("dp")
    for group, mean in ((pair, rank // 2 * 2 + 0.5), (None, 1.5), (row, rank // 2 * 2 + 0.5), (column, rank % 2 + 1)):
        layer.process_group = group
        layer(torch.full((2, 3), float(rank)))
        assert layer.running_mean.tolist() == [mean] * 3
        assert "destroyed" not in syncbn.conversion_report(layer)[0].group


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_outlives_its_group(kind: str, tmp_path: Path) -> None:
    """After destroy_process_group a layer is saved, shown, copied, evaluated and reverted as before, also once there is
    a new default group; then what needs the old one is refused on every rank, which names the old ranks, and moves
    nothing. A group of the same name that has other ranks is not taken for it. Given another group, it synchronizes.
    """
    for said in strike(outlives_its_group, 4, KIND=kind, NEW_GROUP=str(tmp_path / "store")):
        assert said.error is None, said.error
        assert said.is_done


def has_a_group_that_ends_alone(run: Run) -> None:
    group = syncbn.new_group(2) if os.environ["MADE_BY"] == "syncbn" else _pair_by_torch()
    ranks = [run.rank // 2 * 2, run.rank // 2 * 2 + 1]
    layer, other = syncbn.SyncBatchNorm(3, process_group=group), syncbn.SyncBatchNorm(3)
    layer(X)
    dist.barrier()
    dist.destroy_process_group(group)
    _can_be_kept(layer, ranks)
    _is_refused(lambda: layer(X), ranks)
    other(X)
    again = syncbn.new_group(2)
    layer.process_group = again
    layer(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pickle.loads(pickle.dumps(layer)).process_group is again


@pytest.mark.parametrize("made_by", ["syncbn", "torch"])
def test_one_group_may_end_alone(made_by: str) -> None:
    """destroy_process_group(group) is told in the same words; layers of the default group go on, and so does
    `new_group`, which makes another group of these ranks.
    """
    for said in strike(has_a_group_that_ends_alone, 4, MADE_BY=made_by):
        assert said.error is None, said.error
        assert said.is_done


def has_loaded_a_layer(run: Run) -> None:
    ranks = (run.rank // 2 * 2, run.rank // 2 * 2 + 1)
    group, layer = syncbn.new_group(2), syncbn.SyncBatchNorm.__new__(syncbn.SyncBatchNorm)
    layer.__setstate__(
        {**syncbn.SyncBatchNorm(3).__getstate__(), "process_group": ranks}
    )  # as another process saved it
    assert layer.process_group is group
    dist.barrier()
    dist.destroy_process_group()
    _can_be_kept(layer, list(ranks))


def test_a_loaded_layer_outlives_its_group() -> None:
    """A layer whose group was found by its ranks knows them afterwards, as one that was given the group does."""
    for said in strike(has_loaded_a_layer, 4):
        assert said.error is None, said.error
        assert said.is_done


def is_outside_after_an_end(run: Run) -> None:
    group = dist.new_group([1])
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['NEW_GROUP']}", rank=run.rank, world_size=run.world
    )
    if run.rank == 0:
        pickle.loads(pickle.dumps(layer.eval()))
        with pytest.raises(ValueError, match=r"got rank 0 outside of it\. Give each rank"):
            layer.train()(X)


@pytest.mark.filterwarnings("ignore:A SyncBatchNorm was saved")
def test_a_rank_outside_of_a_group_that_ended(tmp_path: Path) -> None:
    """What torch gives a rank outside of a group says nothing of its ranks then; the rule and the advice stay."""
    first, _ = strike(is_outside_after_an_end, 2, NEW_GROUP=str(tmp_path / "store"))
    assert first.error is None, first.error


def compiles_with_a_group_that_ended(run: Run) -> None:
    layer = syncbn.SyncBatchNorm(3, process_group=dist.new_group([0, 1]))
    dist.barrier()
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{os.environ['NEW_GROUP']}", rank=run.rank, world_size=run.world
    )
    with pytest.raises(Exception, match=r"A process_group to synchronise over must exist; got one of unknown ranks"):
        torch.compile(layer, backend="eager", fullgraph=True)(X)
    assert layer.num_batches_tracked == 0


def test_a_compiled_call_says_it_too(tmp_path: Path) -> None:
    """In the compiler's own error, which cannot say the ranks."""
    for said in strike(compiles_with_a_group_that_ended, 2, within=60.0, NEW_GROUP=str(tmp_path / "store")):
        assert said.error is None, said.error
        assert said.is_done
