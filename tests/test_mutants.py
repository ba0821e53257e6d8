"""The suite is tested: a layer with a known defect must be caught by the comparison with the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from syncbn import comm
from syncbn.backends import cpu
from tests import test_statistics
from tests.cases import check, run_case
from tests.oracle import Case, Outcome
from tests.ranks import RankPool

CASE = Case(((4, 5, 6, 7), (2, 5, 3, 9)), torch.float32)


def no_sync() -> None:
    comm.all_sum = lambda sums, group: sums


def zero_dx() -> None:
    original = cpu.grad_input

    def mutant(*args) -> tuple[Tensor | None, Tensor | None]:
        dx, dresidual = original(*args)
        return None if dx is None else torch.zeros_like(dx), dresidual

    cpu.grad_input = mutant


def biased_running_var() -> None:
    original = cpu.move_running
    cpu.move_running = lambda running, mean, var, count: original(running, mean, var * (count - 1) / count, count)


def count_by_samples() -> None:
    original = cpu.batch_sums

    def mutant(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
        sums = original(x, mask, tag)
        sums[-3] = x.shape[0]
        return sums

    cpu.batch_sums = mutant


def run_mutant(mutate: Callable[[], None], case: Case) -> Outcome:
    before = comm.all_sum, cpu.grad_input, cpu.move_running, cpu.batch_sums
    try:
        mutate()
        return run_case(case)
    finally:
        comm.all_sum, cpu.grad_input, cpu.move_running, cpu.batch_sums = before


class MutantPool:
    """A rank pool whose ranks run the case with a defect."""

    def __init__(self, pool: RankPool, mutate: Callable[[], None]) -> None:
        self.pool, self.mutate = pool, mutate

    def run(self, world_size: int, fn: Callable, case: Case, steps: int) -> list[Outcome]:
        return self.pool.run(world_size, run_mutant, self.mutate, case)


@pytest.mark.parametrize("mutate", [no_sync, zero_dx, biased_running_var, count_by_samples])
def test_a_defect_is_caught(ranks: RankPool, mutate: Callable[[], None]) -> None:
    """Each of the defects that simple tests miss fails the comparison; the layer without it passes."""
    check(ranks, CASE)
    with pytest.raises(AssertionError, match=r"is off by|differs between ranks"):
        check(MutantPool(ranks, mutate), CASE)


def test_float32_raw_sums_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums that pass through float32 fail the test of the variance far from zero, already at mean/std = 100."""
    arguments = ("cpu", (16, 3, 24, 24), None, 1e2, 1e-6)
    test_statistics.test_variance_is_exact_far_from_zero(*arguments)
    original = cpu.batch_sums
    monkeypatch.setattr(cpu, "batch_sums", lambda x, mask, tag: original(x, mask, tag).float().double())
    with pytest.raises(AssertionError):
        test_statistics.test_variance_is_exact_far_from_zero(*arguments)
