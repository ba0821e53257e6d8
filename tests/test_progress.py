"""How the host sees from afar how far a device has come; here the test writes what the kernels would."""

import time

import pytest
import torch
import torch.distributed as dist

from syncbn import calls, mixups, progress, watch
from syncbn.backends import gpu_report
from syncbn.names import FORWARD, Call, Label
from syncbn.progress import Progress
from tests.support.ranks import RankPool

CPU = torch.device("cpu")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Progress:
    """With a report of its own."""
    monkeypatch.setattr(gpu_report, "_reports", {})
    return Progress(CPU)


def came(turn: int) -> None:
    """As a kernel does after its sum."""
    gpu_report.report_of(CPU)[3] = turn


def call(name: str, tag: float = 1.0) -> Call:
    """One whose group nobody asks."""
    label = Label(name, 4, is_path=True)
    one = Call.__new__(Call)
    one.label, one.group, one.tag, one.direction = label, None, tag, FORWARD
    one.shape, one.activation, one.needs_grad, one.number, one.nth = torch.Size((2, 4)), None, True, 1, 1
    return one


def test_the_call_whose_turn_has_not_come_is_waiting(device: Progress) -> None:
    """The first that was enqueued and has not come, since it is the next."""
    assert device.waiting() is None
    turns = [device.enqueue(call(name)) for name in ("a", "b", "c")]
    assert turns == [1, 2, 3]
    assert device.waiting()[0].label.name == "a"
    came(2)
    before = time.monotonic()
    place = device.waiting()
    assert place[0].label.name == "c"
    assert place[2] >= before
    assert device.waiting() is place
    came(3)
    assert device.waiting() is None


def test_a_host_that_is_far_ahead_names_nobody(device: Progress) -> None:
    """What is no longer known by name is not guessed."""
    for _ in range(progress.RECENT + 1):
        device.enqueue(call("a"))
    assert device.waiting() is None
    came(2)
    assert device.waiting() is not None


def test_a_mix_up_is_raised_by_the_next_call_and_once(device: Progress) -> None:
    """Naming the call that was mixed up, what the others were in, and that results are wrong from there on."""
    mine, theirs = call("layer1.bn", 5.0), 9.0
    device.enqueue(mine)
    device.enqueue(call("layer2.bn", 6.0))
    gpu_report.report_of(CPU)[:3] = torch.tensor([5.0, 2 * 2.0**32 + 5 + theirs, 25 + theirs**2], dtype=torch.float64)
    place = device.place_of(5.0)
    text = mixups.on_device(0, place, device.mixed_up())
    assert "layer 'layer1.bn' (forward, call 1, 4 channels) and 1 of 2 ranks in another call" in text
    assert "running statistics too" in text
    device.forget()
    assert device.mixed_up() is None


def _raised() -> str:
    device = Progress(CPU)
    gpu_report.report_of(CPU)[:3] = torch.tensor([5.0, 2 * 2.0**32 + 14, 106], dtype=torch.float64)
    one = Call(Label("a", is_path=True), dist.group.WORLD, torch.zeros(2, 4), None, True)
    place = one, FORWARD, 0.0
    with pytest.raises(RuntimeError) as caught:
        calls._enter(1, one, place, device)
    assert 1 not in watch.now
    calls._enter(1, one, place, device)  # once
    del watch.now[1]
    return str(caught.value)


def test_the_next_call_raises(ranks: RankPool) -> None:
    """Before anything is sent; the call after it is not hindered."""
    for rank, text in enumerate(ranks.run(2, _raised)):
        assert text.startswith(f"All ranks of a group must be in the same synchronized call; the device of rank {rank}")


def test_a_cpu_has_no_progress() -> None:
    """Its sums are compared by the host at once."""
    assert progress.of(CPU) is None


def test_turns_are_counted_around(device: Progress, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within an int32, and never 0, which stands for no turn."""
    monkeypatch.setattr(progress, "TURNS", 8192)
    device._turns = 8190
    came(8190)
    assert [device.enqueue(call(name)) for name in ("a", "b", "c")] == [8191, 8192, 1]
    for turn, name in ((8190, "a"), (8191, "b"), (8192, "c")):
        came(turn)
        assert device.waiting()[0].label.name == name
    came(1)
    assert device.waiting() is None
