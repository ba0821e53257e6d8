"""What goes wrong in one rank's loader is an error on every rank, at the same step, and nobody hangs."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

import syncbn
from tests.support.ranks import RankPool
from tests.test_loader import Pair, batches, usable


class Failing:
    """Batches, then an error; at `iter` with none before it."""

    def __init__(self, before: int, error: Exception) -> None:
        self.before, self.error = before, error

    def __iter__(self) -> Iterator[Pair]:
        if self.before < 0:
            raise self.error
        return self._batches()

    def _batches(self) -> Iterator[Pair]:
        yield from batches(self.before)
        raise self.error


def _fails(before: int, failing: tuple[int, ...]) -> None:
    rank, got = dist.get_rank(), []
    own = ValueError(f"corrupt file on {rank}")
    loader = syncbn.EvenLoader(Failing(before, own) if rank in failing else batches(3 * rank + 1))
    text = rf"that of rank {max(failing)} raised ValueError: corrupt file on {max(failing)}\. See rank {max(failing)}'s"
    expected, match = (ValueError, f"on {rank}$") if rank in failing else (RuntimeError, text)
    iterator = iter(loader)
    with pytest.raises(expected, match=match) as caught:
        got.extend(iterator)
    assert len(got) == max(before, 0)
    assert (caught.value is own) == (rank in failing)
    assert list(iterator) == []
    assert usable()


@pytest.mark.parametrize("before", [-1, 0, 2])
@pytest.mark.parametrize("failing", [(1,), (0, 2)])
def test_a_loader_that_raises(ranks: RankPool, before: int, failing: tuple[int, ...]) -> None:
    """All ranks raise at the step whose batch is missing: that rank its own error, the others its name and text."""
    ranks.run(3, _fails, before, failing)


class Refused:
    """Cannot leave its process, or cannot enter another."""

    def __init__(self, at: str) -> None:
        self.at = at

    def __deepcopy__(self, memo: Any) -> "Refused":
        return self

    def __getstate__(self) -> dict[str, Any]:
        if self.at == "send":
            raise ValueError("stays here")
        return self.__dict__

    def __setstate__(self, state: Any) -> None:
        raise ValueError("does not come in")


def _structures(at: str) -> None:
    loader: Any = [{"x": torch.ones(2), "other": {3, 4}}] if at == "empty" else batches(1)
    empty = None if at == "empty" else lambda batch: Refused(at)
    error, names = (TypeError, 0) if at == "empty" else (ValueError, 1 if at == "receive" else 0)
    own = dist.get_rank() == names
    with pytest.raises(error if own else RuntimeError) as caught:
        next(iter(syncbn.EvenLoader([] if dist.get_rank() else loader, empty=empty)))
    text = {"empty": r"batch['other'] of type builtins.set", "send": "stays here", "receive": "does not come in"}[at]
    assert text in str(caught.value)
    assert (f"that of rank {names} raised" in str(caught.value)) != own
    assert usable()


@pytest.mark.parametrize("at", ["empty", "send", "receive"])
def test_a_structure_that_cannot_be_had(ranks: RankPool, at: str) -> None:
    """A batch that cannot be emptied, sent or received is an error on every rank, at the first step."""
    ranks.run(2, _structures, at)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"loader": 3}, "loader must be iterable, as a DataLoader is; got int. Pass what"),
        ({"process_group": "world"}, "process_group must be a ProcessGroup, .* got str. Pass the group"),
        ({"process_group": 2}, "process_group must be a ProcessGroup, .* got int. Pass the group"),
        ({"empty": "x"}, "empty must be a function .* got str. Pass e.g."),
        ({"device": "nowhere"}, "device must be a device or None; got 'nowhere'. Pass e.g."),
        ({"device": 1.5}, "device must be a device or None; got 1.5. Pass e.g."),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], text: str) -> None:
    """They are named when the loader is made, before any communication."""
    with pytest.raises(TypeError, match=text):
        syncbn.EvenLoader(**{"loader": [], **arguments})
