"""Mix-ups, hangs and values that are not finite, on a device: what the kernels compare reaches the host.

NCCL takes one rank a device, so the two ranks that share one here speak gloo; graphs are replayed with a group of two
that is no group, whose sum the test makes.
"""

import signal
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from syncbn import comm, progress
from tests.support.faults import Run, Said, strike

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
STARTING = 90.0
"""Seconds in which processes may load CUDA and compile kernels."""


def warmed_up(run: Run) -> None:
    """The net on the device, and a step of it done: nothing that comes after it waits for a compiler."""
    run.net.cuda()
    for name in ("first", "second"):
        run.call(name, run.x().cuda()).square().sum().backward()
    dist.barrier()


def worded(said: Said, *words: str) -> None:
    for word in words:
        assert word in said.text(), said.text()


def skips_and_goes_on(run: Run) -> None:
    warmed_up(run)
    run.call("second" if run.rank == 1 else "first", run.x().cuda())
    torch.cuda.synchronize()
    run.call("first", run.x().cuda())


def test_a_rank_skips_a_layer_of_the_same_size() -> None:
    """The next call raises on both ranks, and names the call that was mixed up and the other rank's."""
    for rank, said in enumerate(strike(skips_and_goes_on, within=STARTING)):
        mine, other = ("second", "first") if rank else ("first", "second")
        worded(said, "RuntimeError: All ranks of a group", f"the device of rank {rank} found it in layer '{mine}'")
        worded(said, f"1 of 2 ranks in layer '{other}' (forward, 4 channels)", "running statistics too")


def skips_and_calls_nothing(run: Run) -> None:
    warmed_up(run)
    run.call("second" if run.rank == 1 else "first", run.x().cuda())
    time.sleep(4)


def test_a_mix_up_is_logged_where_no_call_follows() -> None:
    """By the watch, which looks at the device; nothing is raised."""
    for rank, said in enumerate(strike(skips_and_calls_nothing, within=STARTING)):
        assert said.error is None
        assert len(said.log) == 1, said.log
        worded(said, f"the device of rank {rank} found it in layer '{('first', 'second')[rank]}'")


def goes_back_in_another_order(run: Run) -> None:
    warmed_up(run)
    calls = [run.call("first", run.x().cuda()) for _ in range(2)]
    for y in calls if run.rank else reversed(calls):
        y.square().sum().backward()
    torch.cuda.synchronize()
    run.call("first", run.x().cuda())


def test_a_rank_goes_back_in_another_order() -> None:
    """The backward passes of two calls of one layer are told apart."""
    for rank, said in enumerate(strike(goes_back_in_another_order, within=STARTING)):
        worded(said, f"the device of rank {rank} found it in layer 'first' (backward, call {(4, 3)[rank]}, 4 channels)")


def is_killed(run: Run) -> None:
    warmed_up(run)
    if run.rank == 1:
        signal.raise_signal(signal.SIGKILL)
    run.call("first", run.x().cuda())


def test_a_rank_is_killed() -> None:
    """The other one's error names its layer and the silent rank."""
    first, second = strike(is_killed, within=STARTING)
    assert second.exit == -signal.SIGKILL
    worded(first, "on rank 0 in layer 'first' (forward, call 3, 4 channels)", "rank 1: does not answer")


def is_late(run: Run) -> None:
    warmed_up(run)
    if run.rank == 1:
        time.sleep(4)
    run.call("first", run.x().cuda())
    torch.cuda.synchronize()


def test_a_rank_is_late() -> None:
    """One report on the rank that waits; then the step goes on."""
    first, second = strike(is_late, within=STARTING)
    assert first.error is second.error is None
    assert len(first.log) == 1
    worded(first, "layer 'first' (forward, call 3, 4 channels)", "rank 1", "in is_late")


def is_fed_nan(run: Run) -> None:
    warmed_up(run)
    before = {name: buffer.clone() for name, buffer in run.net.first.named_buffers()}
    x = run.x().cuda().detach()
    if run.rank == 1:
        x[0, 2] = float("nan")
    y = run.call("first", x)
    assert y[:, 2].isnan().all()
    assert not y[:, [0, 1, 3]].isnan().any()
    kept = {name: buffer[2] == before[name][2] for name, buffer in run.net.first.named_buffers() if buffer.ndim}
    moved = {name: buffer[0] != before[name][0] for name, buffer in run.net.first.named_buffers() if buffer.ndim}
    assert all(kept.values()), kept
    assert all(moved.values()), moved


def test_running_statistics_take_no_nan() -> None:
    """A channel in which one rank has a NaN moves on neither rank; the others move."""
    for said in strike(is_fed_nan, within=STARTING):
        assert said.error is None, said.error


class TwoRanks:
    """A sum over two ranks that are both this one, but for what the other adds to the fingerprint."""

    def __init__(self) -> None:
        self.other = torch.zeros(2, dtype=torch.float64, device="cuda")
        self.tag = 0.0

    def all_sum(self, wire: Tensor, group: object) -> None:
        if not self.tag:  # the first call, which is no captured one, waits for it
            self.tag = float(wire[-2]) - 2.0**32
        wire.mul_(2)
        wire[-2:].add_(self.other)

    def differ(self) -> None:
        """The other rank's call has the next tag: h + 1 for h, and its square."""
        self.other.copy_(torch.tensor([1.0, 2 * self.tag + 1]))


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[TwoRanks]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    monkeypatch.setenv("SYNCBN_WATCH", "0")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        two = TwoRanks()
        monkeypatch.setattr(comm, "all_sum", two.all_sum)
        yield two
    finally:
        for device in progress.every():
            device.forget()
        dist.destroy_process_group()


def test_a_replayed_graph_reports_a_mix_up(two_ranks: TwoRanks) -> None:
    """Replays that agree report nothing; one that does not is raised by the next eager call, once."""
    layer = syncbn.SyncBatchNorm(8).cuda()
    x = torch.randn(4, 8, 5, 5, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        layer(x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), torch.no_grad():
        layer(x)
    for differs in (False, True):
        if differs:
            two_ranks.differ()
        for _ in range(3):
            graph.replay()
        torch.cuda.synchronize()
        two_ranks.other.zero_()
        (device,) = progress.every()
        assert (device.mixed_up() is not None) == differs
    with pytest.raises(RuntimeError, match=r"rank 0 found it in layer 'SyncBatchNorm #\d+ \(8 channels\)'"):
        layer(x)
    layer(x)


def test_the_device_tells_how_far_it_is(two_ranks: TwoRanks) -> None:
    """The call that the device has not come to is the one that waits; when it has, nobody does."""
    layer = syncbn.SyncBatchNorm(8).cuda()
    x = torch.randn(4, 8, 5, 5, device="cuda")
    layer(x)
    torch.cuda.synchronize()
    (device,) = progress.every()
    assert device.waiting() is None
    torch.cuda._sleep(2_000_000_000)  # about a second
    for _ in range(2):
        layer(x)
    waiting = device.waiting()
    assert waiting is not None
    assert waiting[0].number == 2
    torch.cuda.synchronize()
    assert device.waiting() is None
