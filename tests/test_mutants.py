"""The suite is tested: a layer with a known defect must be caught by the comparison with the oracle."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from syncbn import backends, comm, direct
from syncbn.formulas import Epilogue, Running
from tests import test_batch_statistics
from tests.support.cpu_backends import ON_CPU
from tests.support.layer_runs import check, run_case
from tests.support.oracle import Case, Outcome
from tests.support.ranks import RankPool

CASE = Case(((4, 5, 6, 7), (2, 5, 3, 9)), torch.float32)
verbs = backends._load(ON_CPU)


def no_sync() -> None:
    comm.all_sum = lambda sums, group: sums


def zero_dx() -> None:
    original = verbs.grad_input

    def mutant(*args) -> tuple[Tensor | None, Tensor | None]:
        dx, dresidual = original(*args)
        return None if dx is None else torch.zeros_like(dx), dresidual

    verbs.grad_input = mutant


def biased_running_var() -> None:
    original = verbs.normalize

    def mutant(
        x: Tensor, sums: Tensor, epilogue: Epilogue, eps: float, running: Running | None, *mark
    ) -> tuple[Tensor, Tensor, Tensor]:
        before = None if running is None else running.var.clone()
        given = original(x, sums, epilogue, eps, running, *mark)
        if running is not None:  # (1 - f)·before + f·u was made, and u·(n - 1)/n is what shall be in u's place
            running.var.sub_((running.var - (1 - running.momentum) * before) / sums[-3])
        return given

    verbs.normalize = mutant


def count_by_samples() -> None:
    original = verbs.batch_sums

    def mutant(x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
        sums = original(x, mask, tag)
        sums[-3] = x.shape[0]
        return sums

    verbs.batch_sums = mutant


def run_mutant(mutate: Callable[[], None], case: Case) -> Outcome:
    before = comm.all_sum, verbs.grad_input, verbs.normalize, verbs.batch_sums, direct.normalize
    direct.normalize = lambda *_: None  # which does not go through these
    try:
        mutate()
        return run_case(case)
    finally:
        comm.all_sum, verbs.grad_input, verbs.normalize, verbs.batch_sums, direct.normalize = before


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
    arguments = (ON_CPU, (16, 3, 24, 24), None, 1e2)
    test_batch_statistics.test_variance_is_exact_far_from_zero(*arguments)
    original = verbs.batch_sums
    monkeypatch.setattr(direct, "normalize", lambda *_: None)
    monkeypatch.setattr(verbs, "batch_sums", lambda x, mask, tag: original(x, mask, tag).float().double())
    with pytest.raises(AssertionError):
        test_batch_statistics.test_variance_is_exact_far_from_zero(*arguments)
