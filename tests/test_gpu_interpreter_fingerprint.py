"""The Triton kernels, interpreted on the CPU: the fingerprint they put on the wire, what they tell the host of it."""

from collections.abc import Iterator

import pytest
import torch

from syncbn.fingerprint import MOST, VOTE
from tests.support.gpu_interpreter import Interpreter
from tests.support.gpu_reports import Mark, Setting, reports, wires
from tests.test_batch_statistics import BAD, GUARDED, Guarded, check_guard, check_no_guard

pytest.importorskip("triton", reason="triton is made for Linux only")

FORWARD, BACKWARD = "forward", "backward"
NOTHING = [0.0] * 4
SMALL = Setting()
both_ways = pytest.mark.parametrize("direction", [FORWARD, BACKWARD])


@pytest.fixture(scope="module")
def interpreter() -> Iterator[Interpreter]:
    process = Interpreter()
    yield process
    process.close()


@pytest.mark.parametrize("tag", [0, 1, 54321, MOST - 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("shape", "sms", "is_one"), [((1, 2, 8), 1, True), ((3, 70, 4, 4), 132, False)])
def test_a_wire_ends_with_its_fingerprint(
    interpreter: Interpreter, shape: tuple[int, ...], sms: int, is_one: bool, masked: bool, tag: int
) -> None:
    """2³² + tag and tag², 0 and 0 for tag 0, behind sums that do not depend on the tag, by one program or by many."""
    x = torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) > 0.3 if masked else None
    plain = interpreter.run(wires, x, mask, 0.0, sms)
    for wire, without in zip(interpreter.run(wires, x, mask, float(tag), sms), plain, strict=True):
        assert (wire.programs == 1) == is_one
        assert wire.sums[-2:].tolist() == ([VOTE + tag, float(tag**2)] if tag else [0.0, 0.0])
        assert torch.equal(wire.sums[:-2], without.sums[:-2])
    count = x[:, 0].numel() if mask is None else int(mask.sum())
    assert plain[0].sums[-3] == count
    assert [len(wire.sums) for wire in plain] == [2 * shape[1] + 3, 2 * shape[1] + 2]


@both_ways
@pytest.mark.parametrize("abstaining", [0, 3])
@pytest.mark.parametrize("voters", [1, 2, 4096])
@pytest.mark.parametrize("tag", [1, MOST - 1])
def test_ranks_that_agree_are_not_reported(
    interpreter: Interpreter, tag: int, voters: int, abstaining: int, direction: str
) -> None:
    """Any number of ranks in the same call, some of them abstaining, leave the report as it is."""
    mark = Mark([tag] * voters + [0] * abstaining, tag)
    assert interpreter.run(reports, [(direction, mark)], SMALL, NOTHING)[0] == [NOTHING]


MIXED = {
    "two ranks": [7, 9],
    "one of 4096, by 1": [MOST - 1] * 4095 + [MOST - 2],
    "one of 4096, the other way": [1] * 4095 + [2],
    "half": [3, 3, 4, 4],
    "the sum of the tags is that of three alike": [5, 4, 6],
    "the sum of the squares is that of three alike": [5, 7, 1],
    "with one that abstains": [7, 0, 9],
}


@both_ways
@pytest.mark.parametrize("tags", MIXED.values(), ids=MIXED)
def test_ranks_that_differ_are_reported(interpreter: Interpreter, tags: list[int], direction: str) -> None:
    """Each rank that votes reports its own tag and the two sums, and its results have the bits of ranks that agree."""
    for tag in sorted(set(tags) - {0}):
        mark = Mark(tags, tag)
        (found,), results = interpreter.run(reports, [(direction, mark)], SMALL, NOTHING)
        assert found == [float(tag), *mark.found(), 0.0]
        agreed = interpreter.run(reports, [(direction, Mark([tag], tag))], SMALL, NOTHING)
        assert torch.equal(results, agreed[1])


def test_a_sum_that_agrees_is_not_enough() -> None:
    """Of the cases above, in one the sum of the tags is that of ranks alike, in another that of their squares."""
    names = [name for name in MIXED if name.startswith("the sum")]
    alike = Mark([5] * 3, 5).found()
    which = [[a == b for a, b in zip(Mark(MIXED[name], 5).found(), alike, strict=True)] for name in names]
    assert which == [[True, False], [False, True]]


@both_ways
def test_a_rank_that_abstains_reports_no_mixup(interpreter: Interpreter, direction: str) -> None:
    """With tag 0 nothing is compared; the turn is stored all the same."""
    (found,), _ = interpreter.run(reports, [(direction, Mark([7, 9, 0], 0, 5))], SMALL, NOTHING)
    assert found == [0.0, 0.0, 0.0, 5.0]


@pytest.mark.parametrize("second", [FORWARD, BACKWARD])
@pytest.mark.parametrize("first", [FORWARD, BACKWARD])
def test_the_first_mixup_stays(interpreter: Interpreter, first: str, second: str) -> None:
    """A later mix-up, or a later agreement, moves the turn alone."""
    marks = [(first, Mark([7, 9], 7, 1)), (second, Mark([11, 13], 11, 2)), (first, Mark([7, 7], 7, 3))]
    seen, _ = interpreter.run(reports, marks, SMALL, NOTHING)
    mixed_up = [7.0, *marks[0][1].found()]
    assert seen == [[*mixed_up, 1.0], [*mixed_up, 2.0], [*mixed_up, 3.0]]


@both_ways
def test_the_turn_is_stored(interpreter: Interpreter, direction: str) -> None:
    """Turns are written as they come, up to the largest of 32 bits; turn 0 is not, whatever stands there."""
    marks = [(direction, Mark([7, 7], 7, turn)) for turn in (1, 2, 2**31 - 1, 0)]
    seen, _ = interpreter.run(reports, marks, SMALL, [0.0, 0.0, 0.0, 41.0])
    assert [found[3] for found in seen] == [1.0, 2.0, 2.0**31 - 1, 2.0**31 - 1]
    assert all(found[:3] == [0.0] * 3 for found in seen)


SETTINGS = {
    "one program": Setting((1, 2, 8), sms=1),
    "many groups and splits": Setting((3, 70, 4, 4)),
    "rows": Setting((3, 70, 4, 4), "channels_last"),
    "a crop, which is copied": Setting((4, 6, 5, 8), "sliced"),
    "cumulative": Setting(momentum=None),
    "buffers with gaps": Setting(gaps=True),
    "an empty batch": Setting((0, 5, 3, 3)),
}


@both_ways
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_every_call_reports(interpreter: Interpreter, setting: Setting, direction: str) -> None:
    """However a call is cut or copied, it reports once, and its outputs and buffers have the bits of one that does not.

    That holds with a tag and a turn, without, and mixed up.
    """
    mixed_up = Mark([7, 9], 7, 3)
    (found,), results = interpreter.run(reports, [(direction, mixed_up)], setting, NOTHING)
    assert found == [7.0, *mixed_up.found(), 3.0]
    for mark, report in ((Mark([7, 7], 7, 3), [0.0, 0.0, 0.0, 3.0]), (Mark([0, 0], 0), NOTHING)):
        (found,), others = interpreter.run(reports, [(direction, mark)], setting, NOTHING)
        assert found == report
        assert torch.equal(results.nan_to_num(7), others.nan_to_num(7))


@pytest.mark.parametrize("sms", [1, 132])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("guarded", GUARDED.values(), ids=GUARDED)
def test_what_is_not_finite_moves_nothing(
    interpreter: Interpreter, guarded: Guarded, momentum: float | None, sms: int
) -> None:
    """A channel whose new mean or variance its buffer cannot hold keeps both; its neighbours move as without it."""
    interpreter.run(check_guard, "gpu", guarded, momentum, sms)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
def test_without_the_guard_it_moves(interpreter: Interpreter, bad: float, momentum: float | None) -> None:
    """skip_nonfinite=False leaves NaN or infinities in both buffers of the channel, and nothing of it in others."""
    interpreter.run(check_no_guard, "gpu", bad, momentum)
