"""profiling() and labels: what the sums took, whose they were, and who came last, on real ranks."""

import csv
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import syncbn
from benchmarks.shapes import resnet50_norms
from syncbn import groups, latency
from syncbn.names import Pooling
from syncbn.profile import Row
from tests.support.ranks import RankPool

pytestmark = pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, of its own
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
SLEEP, STEPS = 0.02, 6


class Net(nn.Module):
    """Three layers, before the last of which one rank sleeps."""

    def __init__(self, sleeper: int = -1) -> None:
        super().__init__()
        self.first, self.second, self.third = (syncbn.SyncBatchNorm1d(c) for c in (4, 4, 4))
        self.sleeper = sleeper
        syncbn.name_layers(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.second(self.first(x))
        if dist.is_initialized() and dist.get_rank() == self.sleeper:
            time.sleep(SLEEP)
        return self.third(x)


def step(net: nn.Module) -> None:
    x = torch.randn(6, 4, 3, requires_grad=True)
    net(x).backward(torch.randn(6, 4, 3))


def profiled(sleeper: int) -> tuple[list[Row], str, int | None, dict[int, float]]:
    net = Net(sleeper)
    step(net)
    with syncbn.profiling() as found:
        for _ in range(STEPS):
            step(net)
    return found.rows, str(found), found.straggler(), found.waited_for


@pytest.mark.parametrize(("world", "sleeper"), [(2, 0), (2, 1), (3, 1)])
def test_the_straggler_is_named(ranks: RankPool, world: int, sleeper: int) -> None:
    """A rank that sleeps 20 ms before its third layer came last there, the others waited as long, and all ranks say so.

    A busy machine may stop any rank for longer than that: of three profiles one must be as it would be without.
    """
    for attempt in range(3):
        answers = ranks.run(world, profiled, sleeper)
        assert all(answer == answers[0] for answer in answers)
        rows, text, straggler, waited_for = answers[0]
        third = next(row for row in rows if (row.layer, row.direction) == ("third", "forward"))
        assert third.waited < third.seconds * world
        assert waited_for.keys() == set(range(world))
        found = straggler, third.last, third.last_calls > STEPS / 2, third.waited > SLEEP * STEPS / 2, rows[0] == third
        if found == (sleeper, sleeper, True, True, True):
            break
        assert attempt < 2, found
    assert waited_for[sleeper] >= third.waited
    assert f"waited longest for rank {sleeper}" in text
    assert "most in 'third' forward" in text


def test_every_sum_is_counted(ranks: RankPool) -> None:
    """Each layer has a row for each direction: as many calls as steps, 8 bytes for each of 2C + 3 or 2C + 2 numbers."""
    rows, *_ = ranks.run(2, profiled, -1)[0]
    assert {(row.layer, row.direction) for row in rows} == {
        (layer, direction) for layer in ("first", "second", "third") for direction in ("forward", "backward")
    }
    for row in rows:
        assert row.calls == STEPS
        assert row.bytes == STEPS * 8 * (2 * 4 + (3 if row.direction == "forward" else 2))
        assert 0 < row.share < 1


def bytes_of_resnet50() -> dict[str, int]:
    layers = [(syncbn.SyncBatchNorm(shape[1]), shape[1]) for shape in resnet50_norms(1, 32)]
    with syncbn.profiling() as found:
        for layer, channels in layers:
            layer(torch.randn(2, channels, requires_grad=True)).sum().backward()
    return {way: sum(row.bytes for row in found.rows if row.direction == way) for way in ("forward", "backward")}


def test_bytes_are_those_of_the_wire(ranks: RankPool) -> None:
    """Over ResNet-50's 53 layers they are the payload that benchmarks/wire.py has counted."""
    counted = {}
    with (RESULTS / "wire.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            if (row["scheme"], row["world_size"]) == ("syncbn", "2") and row["pass"] in ("forward", "backward"):
                counted[row["pass"]] = int(float(row["payload"]))
    assert ranks.run(2, bytes_of_resnet50)[0] == counted


def numbered_apart() -> list[Row]:
    if dist.get_rank() == 1:
        syncbn.SyncBatchNorm(4)  # so that the next has another number in its name
    layer = syncbn.SyncBatchNorm1d(4)
    with syncbn.profiling() as found:
        layer(torch.randn(5, 4, requires_grad=True)).sum().backward()
    return found.rows


def test_layers_without_names(ranks: RankPool) -> None:
    """What the ranks number differently is one layer still, by the order of its first call."""
    rows = ranks.run(2, numbered_apart)
    assert rows[0] == rows[1]
    assert sorted((row.direction, row.calls) for row in rows[0]) == [("backward", 1), ("forward", 1)]


def other_ways() -> tuple[dict[str, int], dict[str, int]]:
    layer = syncbn.SyncBatchNorm1d(4)
    syncbn.name_layers(nn.ModuleDict({"layer": layer}))
    x = torch.randn(5, 4, requires_grad=True)
    with syncbn.profiling() as found:
        (dx,) = torch.autograd.grad(layer(x), x, torch.randn(5, 4), create_graph=True)
        dx.square().sum().backward()
        for batch in syncbn.EvenLoader([x.detach()] * (1 + dist.get_rank())):
            assert batch.ndim == 2
    calls = {f"{row.layer} {row.direction}": row.calls for row in found.rows}
    return calls, {row.layer: row.bytes for row in found.rows}


def test_other_ways(ranks: RankPool) -> None:
    """A second derivative's sums are in it, and the waiting for a loader, which has no bytes of a layer."""
    for calls, sizes in ranks.run(2, other_ways):
        assert calls["layer forward"] == 1
        assert calls["layer backward"] >= 2
        assert calls["EvenLoader forward"] >= 3
        assert sizes["EvenLoader"] == 0


class Event:
    """Of a stream that takes 2 ms from one to the next; it tells only once somebody has waited for the device."""

    recorded, waits = 0, 0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.recorded += 1
        self.at = Event.recorded

    def elapsed_time(self, end: "Event") -> float:
        assert Event.waits
        return 2.0 * (end.at - self.at)


def test_a_device_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the stream's own events count, read after one wait at the end; in a capture nothing is recorded."""
    on_device, capturing = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0)), []
    monkeypatch.setattr(Event, "recorded", 0)
    monkeypatch.setattr(Event, "waits", 0)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: bool(capturing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: setattr(Event, "waits", Event.waits + 1))
    monkeypatch.setattr(groups, "ranks_of", lambda group: (0,))
    with syncbn.profiling() as found:
        for _ in range(3):
            begun = found.mark(on_device)
            found.add(Pooling(None, "sums"), "forward", 16, begun, found.mark(on_device))
        capturing.append(True)
        found.add(Pooling(None, "sums"), "forward", 16, found.mark(on_device), None)
        assert Event.waits == 0
    (row,) = found.rows
    assert (row.calls, row.bytes) == (3, 48)
    assert (row.last, found.straggler()) == (-1, None)  # of one rank's view
    assert "not known" in str(found)
    assert row.seconds == pytest.approx(3 * 2e-3)
    assert Event.waits == 1


def in_groups() -> list[Row]:
    group = syncbn.new_group(2)
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(4)), group)
    with syncbn.profiling() as found:
        step(net)
        if dist.get_rank() < 2:
            step(net)
    return found.rows


def test_groups(ranks: RankPool) -> None:
    """Each group has rows of its own, with ranks by their numbers in the world, on all ranks; calls may differ."""
    answers = ranks.run(4, in_groups)
    assert all(rows == answers[0] for rows in answers)
    for way in ("forward", "backward"):
        found = sorted((row.calls, row.last) for row in answers[0] if row.direction == way)
        assert [calls for calls, _ in found] == [1, 2]
        assert found[0][1] in (2, 3)
        assert found[1][1] in (0, 1)


def test_an_error_passes_through() -> None:
    """What is raised within comes out as it is, with what was measured so far, and the next profile can begin."""
    with pytest.raises(KeyError, match="of the user"), syncbn.profiling() as first:
        raise KeyError("of the user")
    assert first.rows == []
    assert first.seconds > 0
    with syncbn.profiling() as again:
        step(Net())
    assert "this process is alone" in str(again)
    assert again.straggler() is None


def test_one_at_a_time() -> None:
    """A profile within another is refused, and the outer one goes on."""
    with syncbn.profiling(), pytest.raises(RuntimeError, match="one at a time"), syncbn.profiling():
        pass
    with syncbn.profiling():
        pass


def plotted(path: Path) -> None:
    net = Net()
    with syncbn.profiling() as found:
        step(net)
    if dist.get_rank() == 0:
        found.plot(path)


def test_plot(ranks: RankPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture is written; without matplotlib an error says what to install."""
    ranks.run(2, plotted, tmp_path / "profile.png")
    assert (tmp_path / "profile.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with syncbn.profiling() as found, pytest.raises(ImportError, match="pip install matplotlib"):
        found.plot(tmp_path / "none.png")


def labels(create_graph: bool = False) -> set[str]:
    net = Net()
    step(net)  # the second call is a known one
    with profile(activities=[ProfilerActivity.CPU]) as found:
        x = torch.randn(6, 4, 3, requires_grad=True)
        torch.autograd.grad(net(x), x, torch.randn(6, 4, 3), create_graph=create_graph)
    return {event.key for event in found.key_averages() if event.key.startswith("syncbn.")}


@pytest.mark.parametrize("create_graph", [False, True])
def test_profilers_show_the_layers(create_graph: bool) -> None:
    """torch.profiler has a record of each layer in each direction, by name."""
    expected = {f"syncbn.{way} {name}" for way in ("forward", "backward") for name in ("first", "second", "third")}
    assert labels(create_graph) == expected


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_a_trace_has_no_labels() -> None:
    """What torch.jit writes down while somebody profiles is the layer without them."""
    layer = Net().first
    with profile(activities=[ProfilerActivity.CPU]):
        traced = torch.jit.trace(layer, (torch.randn(6, 4),), check_trace=False)
    assert "record_function" not in str(traced.inlined_graph)


def test_nobody_is_told_without_a_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one no label is made."""
    monkeypatch.setattr(torch.profiler, "record_function", None)
    step(Net())


def test_the_53_layers() -> None:
    """What --bench adds up are the layers of a ResNet-50."""
    channels = [shape[1] for shape in resnet50_norms(1, 32)]
    assert sorted(latency.channels_of_resnet50().elements()) == sorted(channels)
