"""All ranks make as many steps as the longest loader has batches, by one all-reduce a step and one more."""

import copy
import multiprocessing
import pickle
import time
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import syncbn
from syncbn import comm, groups
from tests.support.ranks import Collectives, RankPool


class Pair(NamedTuple):
    x: Tensor
    names: list[str]


def batches(count: int, size: int = 2) -> list[Pair]:
    """Batch i of rank r holds 100 r + i."""
    value = 100.0 * dist.get_rank() if dist.is_initialized() else 0.0
    return [Pair(torch.full((size, 3), value + i), ["name"] * size) for i in range(count)]


def usable() -> bool:
    """The ranks are still in step: their next sum is right."""
    return comm.all_sum(torch.ones(1), groups.peers(None)).item() == dist.get_world_size()


def alike(actual: list[Pair], right: list[Pair]) -> bool:
    return len(actual) == len(right) and all(
        type(a) is Pair and torch.equal(a.x, b.x) and a.names == b.names for a, b in zip(actual, right, strict=True)
    )


def test_alone_the_loader_is_unchanged() -> None:
    """Without a process group, iter() is the loader's own."""
    batch, inner = object(), iter([])
    assert list(syncbn.EvenLoader([batch])) == [batch]
    assert iter(syncbn.EvenLoader(inner)) is inner


def _one() -> None:
    inner = iter([])
    with Collectives() as collectives:
        assert iter(syncbn.EvenLoader(inner)) is inner
    assert collectives.count == 0


def test_a_group_of_one_is_alone(ranks: RankPool) -> None:
    """So it is in a group of one rank, without a collective."""
    ranks.run(1, _one)


def _counts(counts: tuple[int, ...]) -> None:
    mine, steps = batches(counts[dist.get_rank()], size=1 + dist.get_rank()), max(counts)
    loader = syncbn.EvenLoader(mine)
    for _ in range(2):
        with Collectives() as collectives:
            got = list(loader)
        assert collectives.count == steps + 1 + 3 * (min(counts) == 0 < steps)
        assert alike(got, mine + [Pair(torch.zeros(0, 3), [])] * (steps - len(mine)))
        assert usable()


@pytest.mark.parametrize("counts", [(2, 2), (1, 3), (3, 0, 1), (0, 0, 2), (4, 1, 0, 2), (0, 0), (0, 0, 0, 0)])
def test_every_rank_makes_the_longest_ones_steps(ranks: RankPool, counts: tuple[int, ...]) -> None:
    """Own batches, then empty ones; N + 1 collectives; three more to send a structure; again in the next pass."""
    ranks.run(len(counts), _counts, counts)


def _ahead() -> None:
    seen, waits, asked = [], [], time.monotonic()
    with Collectives() as total:
        for step, _ in enumerate(syncbn.EvenLoader(batches(3 if dist.get_rank() else 1))):
            waits.append(time.monotonic() - asked)
            total.__exit__()
            seen.append(total.count)
            if step == 0:
                dist.barrier()
                time.sleep(1.5 * dist.get_rank())
            asked = time.monotonic()
    assert [count - (step > 0) for step, count in enumerate(seen)] == [2, 3, 4]  # less the barrier
    if dist.get_rank() == 0:
        assert waits[1] < 1 < waits[2]


def test_the_flag_is_one_step_ahead(ranks: RankPool) -> None:
    """A batch is handed out with the next step's flag on its way, so that a step's time is not waited for."""
    ranks.run(2, _ahead)


def _own() -> None:
    calls = []

    def empty(batch: Tensor) -> dict[str, list[Tensor]]:
        calls.append(batch)
        return {"xs": [batch[:0]]}

    got = list(syncbn.EvenLoader([torch.ones(2)] * (3 - 2 * dist.get_rank()), empty=empty))
    assert len(calls) == 1
    if dist.get_rank() == 1:
        first, second = got[1:]
        first["xs"].append(torch.ones(1))
        assert [x.shape for x in second["xs"]] == [(0,)]


def test_empty_of_ones_own(ranks: RankPool) -> None:
    """`empty` is called once a pass; every step gets an empty batch of its own, which may be changed."""
    ranks.run(2, _own)


def _requires_grad() -> None:
    x = torch.ones(2, 3, dtype=torch.float16).to(memory_format=torch.contiguous_format).requires_grad_()
    (got,) = syncbn.EvenLoader([x] if dist.get_rank() else [])
    assert got.requires_grad
    assert got.dtype == torch.float16
    assert len(got) == 2 * dist.get_rank()


def test_a_structure_from_another_rank_needs_a_gradient_too(ranks: RankPool) -> None:
    """What came from another rank needs a gradient if there it did: ranks must agree on the backward's collective."""
    ranks.run(2, _requires_grad)


def _left() -> None:
    loader, longest = syncbn.EvenLoader(batches(1 + 3 * dist.get_rank())), 4
    for leave in (0, 2, longest - 1):
        with Collectives() as collectives:
            for step, _ in enumerate(loader):
                if step == leave:
                    break
        assert collectives.count == leave + 2
        assert usable()
    first = iter(loader)
    next(first)
    second = iter(loader)  # while the first is not at its end
    assert len(next(second).x) == 2
    next(second)
    assert len(list(first)) == longest - 1
    del second
    assert len(list(loader)) == longest
    generator = syncbn.EvenLoader(batch for batch in batches(2 - dist.get_rank()))
    assert [len(list(generator)) for _ in range(2)] == [2, 0]
    assert usable()


def test_leaving_and_starting_again(ranks: RankPool) -> None:
    """A pass that all ranks leave at the same step leaves nothing behind; passes may overlap, if alike on all ranks."""
    ranks.run(2, _left)


def _groups() -> None:
    rank, pair = dist.get_rank(), syncbn.new_group(2)
    steps = [len(list(syncbn.EvenLoader(batches(count), pair))) for count in (rank, 3 - rank)]
    assert steps == ([1, 3] if rank < 2 else [3, 1])
    outside = dist.new_group([0, 1])
    if rank > 1:
        with pytest.raises(ValueError, match="must belong to the process_group"):
            iter(syncbn.EvenLoader([], outside))


def test_groups_go_their_own_ways(ranks: RankPool) -> None:
    """Only the group's ranks make steps together; a rank outside is told."""
    ranks.run(4, _groups)


def _slow() -> Iterator[Tensor]:
    yield torch.ones(1)
    time.sleep(1.0 * dist.get_rank())
    yield torch.ones(1)


def _forked() -> None:
    _allow_children()
    iterator = iter(syncbn.EvenLoader(_slow()))
    next(iterator)
    if dist.get_rank() == 0:  # the other rank's flag is on its way
        child = multiprocessing.get_context("fork").Process(target=iterator.close, daemon=True)
        child.start()
        child.join(10)
        assert child.exitcode == 0
    assert len(list(iterator)) == 1
    assert usable()


def test_a_forked_process_waits_for_nothing(ranks: RankPool) -> None:
    """A child process that drops the iterator it inherited has no part in the collective, and does not hang."""
    ranks.run(2, _forked)


def _allow_children() -> None:
    """A rank of the pool is a daemon, which may have none."""
    multiprocessing.current_process()._config["daemon"] = False


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Tensor]:
        yield from torch.arange(5.0 + 4 * dist.get_rank())[:, None]


def _data_loaders(workers: int) -> None:
    rank = dist.get_rank()
    _allow_children()
    more = {"num_workers": workers, "persistent_workers": True} if workers else {}
    data = TensorDataset(torch.arange(6.0 + 4 * rank)[:, None])
    sampler = DistributedSampler(data, num_replicas=1, rank=0)
    loader = syncbn.EvenLoader(DataLoader(data, batch_size=4, sampler=sampler, **more))
    assert (len(loader), loader.batch_size, loader.dataset) == (2 + rank, 4, data)
    orders = []
    for epoch in range(3):
        loader.sampler.set_epoch(epoch)
        got = [x for (x,) in loader]
        assert [len(x) for x in got] == ([4, 2, 0] if rank == 0 else [4, 4, 2])
        orders.append(torch.cat(got).flatten().tolist())
        for _ in loader:
            break
    assert sorted(orders[0]) == list(range(6 + 4 * rank))
    assert orders[0] != orders[1] != orders[2]
    stream = syncbn.EvenLoader(DataLoader(Stream(), batch_size=4))
    assert [len(x) for x in stream] == ([4, 1, 0] if rank == 0 else [4, 4, 1])
    assert usable()


@pytest.mark.parametrize("workers", [0, 2])
def test_data_loaders(ranks: RankPool, workers: int) -> None:
    """A DataLoader with a sampler, epochs, workers that are kept, an IterableDataset; left and started again."""
    ranks.run(2, _data_loaders, workers)


def test_len_and_attributes_are_the_loaders() -> None:
    """len, where there is one, and all other attributes; copies and pickles are made as of any object."""
    loader = syncbn.EvenLoader(DataLoader(TensorDataset(torch.ones(5)), batch_size=2))
    assert len(loader) == 3
    assert loader.batch_size == 2
    assert len(copy.deepcopy(loader).dataset) == len(pickle.loads(pickle.dumps(loader)).dataset) == 5
    with pytest.raises(AttributeError, match="no_such"):
        loader.no_such  # noqa: B018  # it is what raises
    with pytest.raises(TypeError, match="has no len"):
        len(syncbn.EvenLoader(iter([])))
