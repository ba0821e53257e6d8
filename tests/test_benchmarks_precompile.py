"""What is compiled ahead is what will be launched."""

import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("triton", reason="triton is made for Linux only")

from benchmarks import expected_calls, precompile, shapes, verbs
from benchmarks.checking import Case as Tensors
from benchmarks.resilience import Budget
from benchmarks.shapes import DTYPES, Plan
from syncbn import backends
from syncbn.autograd import NormalizeBatch, Options
from syncbn.backends import gpu
from syncbn.backends.recent import Recent
from syncbn.formulas import Running
from tests import test_gpu_device
from tests.support.oracle import in_layout

ROOT = Path(__file__).parent.parent
PLANS = [Plan((2, 256, 200, 336), "bfloat16", "channels_last"), Plan((32, 512, 28, 28), "float16", "contiguous")]


def launched(work: Callable[[], Any]) -> set[precompile.Job]:
    """The kernels that a piece of work on tensors without storage would launch."""
    jobs: set[precompile.Job] = set()
    with backends.force("gpu"), mock.patch.object(gpu, "launch", lambda *given: jobs.add(precompile._job(*given))):
        work()
    return jobs


def step(
    x: torch.Tensor,
    dy: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    residual: torch.Tensor | None,
    activation: str | None = None,
) -> None:
    """A forward and backward of the layer, alone, but for its module, which composes what has no storage."""
    running = Running(*(torch.empty_like(weight).detach() for _ in range(2)), torch.empty((), dtype=torch.int64), 0.1)
    options = Options(1e-5, activation, None, running)
    y = NormalizeBatch.apply(x, weight, bias, residual, None, options)
    leaves = [t for t in (x, weight, bias, residual) if t is not None]
    assert len(torch.autograd.grad(y, leaves, dy)) == len(leaves)


def without_storage(plan: Plan, fused: bool) -> Tensors:
    def like_x() -> torch.Tensor:
        return in_layout(torch.empty(plan.shape, dtype=DTYPES[plan.dtype], device="meta"), plan.layout)

    weight, bias = (torch.nn.Parameter(torch.empty(plan.shape[1], device="meta")) for _ in range(2))
    return Tensors(like_x().requires_grad_(), like_x(), weight, bias, like_x().requires_grad_() if fused else None)


def ahead(calls: list[expected_calls.Call], plan: Plan, fused: bool) -> set[precompile.Job]:
    """What is compiled for one comparison of a script."""
    wanted = (plan.shape, DTYPES[plan.dtype], plan.layout, fused)
    chosen = [call for call in calls if (*call[:3], call.residual) == wanted]
    return {job for call in chosen for job in precompile.jobs_of(call)}


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_verbs_find_their_kernels(plan: Plan, fused: bool) -> None:
    """What benchmarks/kernels.py launches for a plan is compiled for it, and nothing else."""
    case = without_storage(plan, fused)
    case = Tensors(*(None if t is None else t.detach() for t in case))
    wide = torch.empty(2 * plan.shape[1] + 1, dtype=torch.float64, device="meta")
    mean = torch.empty(plan.shape[1], device="meta")
    fixed = verbs.Fixed(wide, mean, mean, wide[:-1], wide[-1:], {})

    def every_verb() -> None:
        for verb in verbs.VERBS:
            verbs.ours(verb, case, fixed).call(case)

    assert launched(every_verb) == ahead(list(expected_calls._kernels()), plan, fused)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_the_layer_finds_its_kernels(plan: Plan, fused: bool) -> None:
    """What a forward and backward of benchmarks/layer_gpu.py launches for a plan is compiled for it."""
    case = without_storage(plan, fused)
    assert launched(lambda: step(*case, "relu" if fused else None)) == ahead(
        list(expected_calls._layers()), plan, fused
    )


@pytest.fixture(scope="module")
def everything() -> set[precompile.Job]:
    """What is compiled for a device of 132 multiprocessors."""
    return set(precompile.jobs(132))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(8, 512, 7, 7), (2, 24, 5, 6, 7), (4096, 256)], ids=str)
def test_the_tests_find_their_kernels(
    shape: tuple[int, ...], layout: str, dtype: torch.dtype, everything: set[precompile.Job]
) -> None:
    """What tests/test_gpu_device.py launches in its dtypes and layouts is among what is compiled."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, dy, residual = (in_layout(torch.empty(shape, dtype=dtype, device="meta"), layout) for _ in range(3))
    weight, bias = torch.empty(2, shape[1], dtype=wide, device="meta").requires_grad_()
    jobs = launched(lambda: step(x.requires_grad_(), dy, weight, bias, residual.requires_grad_()))
    assert len(jobs) == 4
    assert jobs <= everything


def test_the_tests_shapes_are_known() -> None:
    """The shapes that are compiled for the tests are theirs."""
    assert {*expected_calls.TEST_SHAPES, *expected_calls.MORE_TEST_SHAPES} == set(test_gpu_device.SHAPES)


def test_kernels_come_in_order_and_once() -> None:
    """The first benchmarks' first plans come first, no kernel comes twice, and every dtype and verb comes."""
    jobs = list(precompile.jobs(132))
    assert len(jobs) == len(set(jobs))
    assert {job.name.removesuffix("_kernel") for job in jobs[:4]} == set(verbs.VERBS)
    first = shapes.gpu_plans()[0]
    assert set(jobs[:4]) == ahead(list(expected_calls._kernels()), first, False)
    assert {dtype for job in jobs for dtype in job.pointers} >= {*DTYPES.values(), torch.float64, torch.bool, None}


def test_the_multiprocessors_are_the_device_s() -> None:
    """Plans are those of the device asked about."""
    few = list(itertools.islice(expected_calls.calls(), 60))
    jobs = {}
    for multiprocessors in (132, 8):
        with mock.patch.object(precompile, "calls", return_value=few), mock.patch.object(gpu, "_plans", Recent(64)):
            jobs[multiprocessors] = set(precompile.jobs(multiprocessors))
    assert jobs[8] != jobs[132]


def test_compilers_that_fail_or_crash_are_said() -> None:
    """A kernel that does not compile is named; a compiler that never answers is not waited for."""
    assert precompile.build((precompile.Job("syncbn", "no_kernel", (), (), (), ()), 90)).startswith("no_kernel ()")

    class Silent:
        def next(self, timeout: float) -> str:
            raise multiprocessing.TimeoutError

    done, failures = precompile.wait_for(Silent(), Budget(0))
    assert (done, failures) == (0, ["no kernel in 60 s: a compiler has crashed"])
    assert precompile.wait_for(iter_of("", "bad", ""), Budget(0)) == (2, ["bad"])
    assert precompile.wait_for(iter_of("", ""), Budget(1e-9)) == (0, [])


def iter_of(*outcomes: str) -> Any:
    left = iter(outcomes)
    return mock.Mock(next=lambda timeout: next(left))


def test_it_fills_the_cache(tmp_path: Path) -> None:
    """A smoke run leaves four compiled kernels in Triton's cache."""
    given = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "benchmarks.precompile", "--smoke", "--budget", "100"]
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "4 kernels by" in done.stdout
    assert len(list(tmp_path.glob("*/*.cubin"))) == 4
