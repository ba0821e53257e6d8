"""The two numbers on the wire: they agree if and only if all ranks are in the same call, and nobody is alarmed else."""

import threading

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn import calls, fingerprint
from syncbn.backends.reference import stamped
from syncbn.fingerprint import MOST, Found, Other
from syncbn.names import BACKWARD, FORWARD, Label, numbered
from tests.support.ranks import RankPool

TAGS = st.integers(1, MOST - 1)


def differing(tags: list[int], own: float) -> Found | None:
    """What a rank with its own tag finds after the sum; a tag of 0 abstains."""
    wires = torch.stack([stamped(torch.zeros(2, dtype=torch.float64), tag) for tag in tags])
    return fingerprint.differing(wires.sum(0), own)


@given(TAGS, st.integers(1, 4096), st.integers(0, 5))
def test_ranks_in_the_same_call_agree(tag: int, ranks: int, abstaining: int) -> None:
    """Exactly, up to 4,096 ranks, whoever abstains."""
    assert differing([tag] * ranks + [0] * abstaining, tag) is None


@given(st.lists(TAGS, min_size=2, max_size=50).filter(lambda tags: len(set(tags)) > 1))
def test_ranks_in_different_calls_all_see_it(tags: list[int]) -> None:
    """No rank of a set with a spread finds both sums as if all were in its own call."""
    assert all(differing(tags, tag) is not None for tag in set(tags))


@given(TAGS, TAGS, st.integers(2, 4096), st.data())
def test_the_largest_groups(first: int, second: int, ranks: int, data: st.DataObject) -> None:
    """Some of up to 4,096 ranks are seen by all, and told: how many, and in which call."""
    few = data.draw(st.integers(1, ranks - 1))
    found = differing([first] * (ranks - few) + [second] * few, first)
    if first == second:
        assert found is None
    else:
        assert found is not None
        assert fingerprint.other_of(found) == Other(few, second)


@given(st.lists(TAGS, min_size=3, max_size=8, unique=True))
def test_more_than_two_calls_are_not_taken_for_two(tags: list[int]) -> None:
    """Whatever is told of the others is one call of so many ranks that gives these sums."""
    found = differing(tags, tags[0])
    assert found is not None
    other = fingerprint.other_of(found)
    if other is not None:
        assert differing([tags[0]] * (len(tags) - other.ranks) + [int(other.tag)] * other.ranks, tags[0]) == found


def test_a_rank_that_abstains_compares_nothing() -> None:
    """0 and 0 on the wire, and the others do not mind."""
    assert stamped(torch.ones(5, dtype=torch.float64), 0).tolist() == [1, 1, 1, 0, 0]
    assert differing([7, 0, 7], 7) is None


def test_tags_are_of_the_name_and_what_must_be_alike() -> None:
    """Each of these differs; the same again, and on a copy, does not. All are in range."""
    label = Label("layer1.bn", is_path=True)
    keys = [(FORWARD, 64, None, True), (FORWARD, 64, None, False), (FORWARD, 32, None, True)]
    keys += [(FORWARD, 64, "relu", True), (BACKWARD, 64, None, 1), (BACKWARD, 64, None, 2)]
    tags = [fingerprint.tag_of(label, *key) for key in keys]
    tags.append(fingerprint.tag_of(Label("layer2.bn", is_path=True), *keys[0]))
    assert len(set(tags)) == len(tags)
    assert all(1 <= tag < MOST and tag.is_integer() for tag in tags)
    assert fingerprint.tag_of(Label("layer1.bn", is_path=True), *keys[0]) == tags[0]


def test_a_call_is_told_from_its_tag() -> None:
    """A layer that was never called here says which of its calls it would be."""
    label = Label("layer3.bn", 64, "relu", is_path=True)
    tag = fingerprint.tag_of(Label("layer3.bn", is_path=True), BACKWARD, 64, "relu", 3)
    assert fingerprint.calls_with(tag, label) == [
        "layer 'layer3.bn' (backward of its call 3 since the last, 64 channels, relu)"
    ]
    assert fingerprint.calls_with(tag, Label("layer4.bn", 64, is_path=True)) == []


def test_tags_that_are_kept_are_few() -> None:
    """A layer that is called with ever other numbers of calls does not fill the memory."""
    label = numbered("SyncBatchNorm", 4, None)
    for nth in range(2 * fingerprint.MOST_TAGS):
        fingerprint.tag_of(label, BACKWARD, 4, None, nth)
    assert len(label.tags) <= fingerprint.MOST_TAGS


def _step(*layers: nn.Module) -> None:
    x = torch.randn(3, 4, 2, 2, requires_grad=True)
    for layer in layers:
        x = layer(x)
    x.square().sum().backward()


def _different_histories() -> None:
    rank = dist.get_rank()
    for _ in range(rank):
        syncbn.SyncBatchNorm(4)
    layers = [syncbn.SyncBatchNorm(4) for _ in range(3)]
    if rank == 0:  # alone: without peers nothing is counted
        for layer in layers:
            layer.eval()(torch.randn(2, 4, 2, 2))
            layer.train()
    _step(*layers)
    other = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4)))
    _step(other, *layers)
    _step(*layers, *layers)


def test_what_ranks_built_for_themselves_alarms_nobody(ranks: RankPool) -> None:
    """Layers are numbered differently where one rank has built more; they are compared by the order of their calls."""
    ranks.run(3, _different_histories)


def _sub_groups() -> None:
    rank, pairs = dist.get_rank(), syncbn.new_group(2)
    whole, paired = syncbn.SyncBatchNorm(4), syncbn.SyncBatchNorm(4, process_group=pairs)
    for _ in range(2):
        _step(whole, paired, whole)
    wandering = syncbn.SyncBatchNorm(4)
    wandering.process_group = pairs
    _step(wandering)
    if rank < 2:
        _step(wandering, paired)
    wandering.process_group = None
    _step(whole, wandering)
    wandering.process_group = pairs
    _step(wandering)


def test_sub_groups_alarm_nobody(ranks: RankPool) -> None:
    """Pairs that make different numbers of calls, and a layer that goes from group to group."""
    ranks.run(4, _sub_groups)


def _threads() -> None:
    groups = [dist.new_group([0, 1]) for _ in range(3)]
    layers = [syncbn.SyncBatchNorm(4, process_group=group) for group in groups]
    for layer in layers:
        _step(layer)
    failures: list[BaseException] = []

    def work(layer: nn.Module) -> None:
        try:
            for _ in range(20):
                _step(layer)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(layer,)) for layer in layers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_threads_alarm_nobody(ranks: RankPool) -> None:
    """Three threads, each with a layer and a group of its own."""
    ranks.run(2, _threads)


def _abstains() -> None:
    calls._votes.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_FINGERPRINT", "0" if dist.get_rank() else "1")
        _step(syncbn.SyncBatchNorm(4))
    calls._votes.cache_clear()


def test_a_process_may_abstain(ranks: RankPool) -> None:
    """Where one has turned the comparison off, the others do not take it for astray."""
    ranks.run(2, _abstains)


def _partly_compiled() -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    torch._dynamo.reset()
    step = torch.compile(net, backend="aot_eager") if dist.get_rank() else net
    step(torch.randn(3, 4, 2, 2, requires_grad=True)).square().sum().backward()
    return tuple(net.buffers())


def test_compiled_ranks_abstain(ranks: RankPool) -> None:
    """One rank compiled and one not: the same sizes on the wire, the same statistics, no alarm."""
    first, second = ranks.run(2, _partly_compiled)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def _compilations() -> int:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    layers = syncbn.convert_sync_batchnorm(nn.Sequential(*(nn.BatchNorm2d(4) for _ in range(4))))
    for layer in layers:
        layer.compile(backend=counter, fullgraph=True)
    with torch.no_grad():
        for layer in layers:
            layer(torch.randn(3, 4, 2, 2))
    return counter.frame_count


def test_names_compile_nothing_again(ranks: RankPool) -> None:
    """Layers that are compiled one by one share their code, whatever they are called."""
    assert ranks.run(2, _compilations) == [1, 1]


def _a_new_group() -> None:
    layer = syncbn.SyncBatchNorm(4)
    layer(torch.randn(3, 4, 2, 2, requires_grad=True))  # a forward pass without a backward, then the group ends
    if dist.get_rank() == 1:
        layer = syncbn.SyncBatchNorm(4)  # as in a process that has just been started
    group = dist.new_group([0, 1])
    layer.process_group = group
    _step(layer, layer)


def test_a_new_group_counts_anew(ranks: RankPool) -> None:
    """A rank that has a history and one that has none are alike to a group that both have just joined."""
    ranks.run(2, _a_new_group)


def _ddp() -> None:
    net = nn.Sequential(syncbn.SyncBatchNorm(4), nn.ReLU(), syncbn.SyncBatchNorm(4))
    ddp = DistributedDataParallel(net)
    with torch.no_grad():
        net(torch.randn(2, 4))  # outside of it, before the layers have paths
    for _ in range(2):
        ddp(torch.randn(2, 4)).sum().backward()


def test_paths_that_come_with_ddp_alarm_nobody(ranks: RankPool) -> None:
    """The layers of a model that is called without its wrapper first."""
    ranks.run(2, _ddp)


def _a_call_made_again() -> None:
    layer = syncbn.SyncBatchNorm(4)
    _step(layer)
    if dist.get_rank():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("syncbn.calls.all_sum", lambda *_: (_ for _ in ()).throw(MemoryError()))
            with pytest.raises(MemoryError):
                _step(layer)
    _step(layer, layer)


def test_a_call_that_is_made_again_alarms_nobody(ranks: RankPool) -> None:
    """One rank ran out of memory before its sums were sent, and tried once more."""
    ranks.run(2, _a_call_made_again)
