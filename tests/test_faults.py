"""Ranks that go astray: each ends, on every rank that lives, in an error or a report that names layer, call and ranks.

The README's table of faults is of these tests.
"""

import signal

import pytest

from tests.support import wrong_ranks
from tests.support.faults import WITHIN, Said, named, strike, unmoved

FIRST = "layer 'first' (forward, call 2, 4 channels)"
SECOND = "layer 'second' (forward, call 2, 4 channels)"


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_rank_skips_a_layer_of_the_same_size(world: int) -> None:
    """All ranks raise before a buffer moves, with their own layer and the others'; the sums are of two layers."""
    for rank, said in enumerate(faulty := strike(wrong_ranks.skips, world)):
        named(said, SECOND if rank == 1 else FIRST, f"rank {rank} in", f"1 of {world} ranks" if rank != 1 else "ranks")
        named(said, "layer 'first' (forward" if rank == 1 else "layer 'second' (forward", "in different layers")
    unmoved(faulty)


def living(faulty: list[Said]) -> list[Said]:
    """Those that gloo did not end; it ends one rank or, if both messages are under way, both."""
    alive = [said for said in faulty if said.exit != -signal.SIGABRT]
    assert len(alive) < len(faulty)
    return alive


def test_a_rank_skips_a_layer_of_another_size() -> None:
    """gloo ends the process that receives more than it expects; who lives names layer and rank."""
    for said in living(strike(wrong_ranks.skips_another_size, until=[0, 1], store="file", within=WITHIN)):
        named(said, "call 2", "does not answer")


def test_a_rank_calls_a_layer_twice() -> None:
    """Both raise, naming both calls."""
    first, second = strike(wrong_ranks.calls_twice)
    named(first, SECOND, "1 of 2 ranks in layer 'first' (forward, 4 channels)")
    named(second, "layer 'first' (forward, call 3, 4 channels)", "1 of 2 ranks in layer 'second' (forward, 4 channels)")


def test_a_rank_goes_back_where_the_other_does_not() -> None:
    """The messages differ in size, so a process is ended by gloo; who lives names its layer."""
    for said in living(strike(wrong_ranks.one_goes_back, store="file", within=WITHIN)):
        named(said, "call 2", "ranks 0-1 are:")


def test_a_rank_goes_back_in_another_order() -> None:
    """The backward passes of two calls of one layer are told apart, and no gradient of another call is taken."""
    for rank, said in enumerate(strike(wrong_ranks.goes_back_in_another_order)):
        named(
            said,
            f"layer 'first' (backward, call {(3, 2)[rank]}, 4 channels)",
            "1 of 2 ranks in layer 'first' (backward",
        )


def test_rank_0_validates_in_train_mode() -> None:
    """The rank that waits reports where the other is and what usually causes that."""
    first, _ = strike(wrong_ranks.validates_in_train_mode, until=[0], within=WITHIN)
    named(first, FIRST, "rank 1", "its last was layer 'first' backward, call 1", "in barrier", "model.eval()")
    assert len(first.log) == 1


def test_a_rank_does_not_recompute_statistics() -> None:
    """What the others wait in is called by its name, as a layer is."""
    first, _ = strike(wrong_ranks.does_not_recompute, until=[0], within=WITHIN)
    named(first, "syncbn.recompute_statistics (forward, call 1", "rank 1", "in barrier")


def test_a_rank_is_stuck_in_its_loader() -> None:
    """The report says so, with the user's line."""
    first, _ = strike(wrong_ranks.is_stuck_in_its_loader, until=[0], within=WITHIN)
    named(first, FIRST, "wrong_ranks.py", "in is_stuck_in_its_loader", "dataloader.py", "a slow or stuck loader")


def test_a_rank_sleeps_for_longer_than_the_patience() -> None:
    """One report; when the rank comes, the step goes on as if nothing had been."""
    first, second = strike(wrong_ranks.sleeps)
    named(first, FIRST, "rank 1", "in sleeps", "other work")
    assert len(first.log) == 1
    assert first.error is second.error is None
    assert first.buffers["first.num_batches_tracked"] == 2


@pytest.mark.parametrize(
    "fault", [wrong_ranks.is_killed_in_forward, wrong_ranks.is_killed_in_backward, wrong_ranks.is_killed_between_steps]
)
@pytest.mark.parametrize("world", [2, 4])
def test_a_rank_is_killed(fault: object, world: int) -> None:
    """Every other rank's error is of the transport's type, chained to it, and says which rank is silent."""
    faulty = strike(fault, world, within=WITHIN + 2)
    assert faulty[1].exit == -signal.SIGKILL
    way = "backward, call 2" if fault is wrong_ranks.is_killed_in_backward else "forward, call 2"
    for rank in set(range(world)) - {1}:
        named(faulty[rank], f"on rank {rank} in layer 'first' ({way}, 4 channels)", "rank 1: does not answer", "killed")
        assert "direct cause of the following exception" in (faulty[rank].error or "")


@pytest.mark.parametrize("store", ["tcp", "file"])
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_rank_is_frozen(stopped: int, store: str) -> None:
    """Its connections stand and nothing comes, as of a host that is cut off; rank 0 may host the store, too."""
    faulty = strike(wrong_ranks.stops, until=[1 - stopped], store=store, within=WITHIN + 2, STOPS=str(stopped))
    named(faulty[1 - stopped], FIRST, "ranks 0-1 are")
    is_host = store == "tcp" and stopped == 0
    named(faulty[1 - stopped], "could not be asked" if is_host else f"rank {stopped}: does not answer")


def test_a_rank_raises() -> None:
    """The other says that it has ended, and where it waits itself."""
    first, second = strike(wrong_ranks.raises)
    assert "a sample of another kind" in (second.error or "")
    named(first, "rank 0 in " + FIRST, "rank 1", "has ended", "syncbn.EvenLoader")


def test_a_rank_runs_out_of_data() -> None:
    """The rank that goes on says which layer it waits in, and that the other has left."""
    first, second = strike(wrong_ranks.runs_out_of_data, store="file")
    assert first.error is None
    named(second, "layer 'first' (forward, call 3, 4 channels)", "rank 0")


def test_ranks_disagree_on_channels() -> None:
    """gloo ends a process; who lives names its layer."""
    for said in living(strike(wrong_ranks.has_more_channels, until=[0, 1], store="file", within=WITHIN)):
        named(said, "channels)", "does not answer")


def test_ranks_disagree_on_the_activation() -> None:
    """Both raise, with both activations."""
    for said in strike(wrong_ranks.has_another_activation):
        named(said, "(forward, call 1, 4 channels", "(forward, 4 channels", "relu")


def test_ranks_disagree_on_the_gradient() -> None:
    """Both raise at once, where the backward pass would have hung."""
    for said in (faulty := strike(wrong_ranks.needs_no_gradient)):
        named(said, "no gradient", "'first'")
    unmoved(faulty)


def test_ranks_may_disagree_on_the_dtype() -> None:
    """The wire is float64 whatever the input: no error, and the same buffers."""
    first, second = strike(wrong_ranks.has_another_dtype)
    assert first.error is second.error is None
    assert first.buffers["first.running_var"].equal(second.buffers["first.running_var"])


def test_join_is_refused() -> None:
    """On all ranks, before anything is sent, with what to use instead."""
    for said in strike(wrong_ranks.joins):
        assert "RuntimeError: DistributedDataParallel.join()" in (said.error or "")
        assert "syncbn.EvenLoader" in (said.error or "")


def test_without_the_comparison_two_layers_are_summed() -> None:
    """SYNCBN_FINGERPRINT=0 turns it off: this is what it is for."""
    first, second = strike(wrong_ranks.skips, SYNCBN_FINGERPRINT="0")
    assert first.error is second.error is None
    assert first.buffers["first.running_mean"].equal(second.buffers["second.running_mean"])


def test_without_the_watch_the_error_still_names_the_layer() -> None:
    """SYNCBN_WATCH=0 starts no thread, and nobody is asked."""
    first, _ = strike(wrong_ranks.is_killed_in_forward, SYNCBN_WATCH="0")
    named(first, FIRST, "on rank 0")
    assert "does not answer" not in first.text()
