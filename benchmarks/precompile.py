"""Fill Triton's disk cache on all cores, so that nothing that is timed or tested waits for its compiler.

    python -m benchmarks.precompile --budget 20   # for the GPU of this machine, without one for an H100
    python -m benchmarks.precompile --smoke       # a few kernels

What the benchmarks and the GPU tests will launch is recorded by calling the verbs with tensors that have no storage;
what Triton's dispatch would compile for it is compiled by one process a core, the most important first.
"""

import argparse
import importlib
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.harness import Budget, cores
from benchmarks.resilience import MOST_SHOWN
from benchmarks.shapes import DTYPES, gpu_plans, layer_plans, resnet50_norms
from syncbn.backends import gpu, gpu_launch
from syncbn.formulas import Epilogue, Running
from tests.support.gpu_compile import compile_for
from tests.support.oracle import ACTIVATIONS, in_layout

WITHOUT_DEVICE = 90
TEST_SHAPES = ((8, 64, 56, 56), (8, 512, 7, 7), (8, 3, 33, 31), (512, 1001))
MORE_TEST_SHAPES = ((8, 256, 14, 14), (8, 16, 32, 32), (2, 24, 5, 6, 7), (4096, 256), (16, 48, 129))
FIRST_KERNELS, FIRST_LAYERS = 24, 24
SMOKE_JOBS = 4
LONGEST = 60
"""Seconds after which a compiler is not waited for."""


class Call(NamedTuple):
    """A forward and backward of a layer, as far as it decides what is compiled."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    activation: str | None = None
    residual: bool = False
    masked: bool = False
    running: bool = True
    momentum: float | None = 0.1
    dy_layout: str | None = None


class Job(NamedTuple):
    """A kernel to compile: where it is, with what, for pointers of these dtypes and numbers of these kinds."""

    module: str
    name: str
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    pointers: tuple[torch.dtype | None, ...]
    numbers: tuple[float, ...]


def calls() -> Iterator[Call]:
    """What the benchmarks and then the tests will call, the beginnings of each first."""
    kernels, layers = list(_kernels()), list(_layers())
    yield from kernels[: 2 * FIRST_KERNELS]
    yield from layers[:FIRST_LAYERS]
    yield Call((2, 64, 8, 8), torch.bfloat16, "channels_last")  # host.py
    yield from _steps(32, torch.bfloat16, "channels_last")
    yield from _tests(TEST_SHAPES, (torch.bfloat16,))
    yield from (Call((32, 64, 56, 56), torch.float32, activation="relu"), Call((32, 256, 28, 28), torch.float32))
    yield from (Call((n, 40, 9, 9), torch.float32, momentum=m) for n in (8, 0) for m in (0.1, None))
    yield from _steps(8, torch.float32, "contiguous", 64)  # step.py's check
    yield from kernels
    yield from layers
    yield from _tests(TEST_SHAPES + MORE_TEST_SHAPES, (*DTYPES.values(), torch.float64))
    for activation, residual, masked in itertools.product(ACTIVATIONS, (False, True), (False, True)):
        yield Call((6, 20, 9, 16), torch.float32, "contiguous", activation, residual, masked)
    for layout, dy_layout in itertools.product(("sliced", "channels_last"), ("contiguous", "channels_last", "sliced")):
        yield Call((6, 20, 9, 10), torch.float32, layout, "relu", dy_layout=dy_layout)
    for batch, layout in ((8, "channels_last"), (2, "channels_last"), (32, "contiguous")):
        yield from _steps(batch, torch.bfloat16, layout)


def _kernels() -> Iterator[Call]:
    for plan in gpu_plans():
        for fused in (False, True):
            yield Call(plan.shape, DTYPES[plan.dtype], plan.layout, "relu" if fused else None, fused, running=False)


def _layers() -> Iterator[Call]:
    for plan, op in layer_plans():
        fused = op == "bn_add_relu"
        yield Call(plan.shape, DTYPES[plan.dtype], plan.layout, "relu" if fused else None, fused)


def _steps(batch: int, dtype: torch.dtype, layout: str, image: int = 224) -> Iterator[Call]:
    """A training step's, as a drop-in and fused."""
    for shape in dict.fromkeys(resnet50_norms(batch, image)):
        for activation, residual in ((None, False), ("relu", False), ("relu", True)):
            yield Call(shape, dtype, layout, activation, residual)


def _tests(shapes: Iterable[tuple[int, ...]], dtypes: Iterable[torch.dtype]) -> Iterator[Call]:
    for dtype, shape, layout in itertools.product(dtypes, shapes, ("contiguous", "channels_last")):
        yield Call(shape, dtype, layout, residual=True, dy_layout=layout)


def recorded(call: Call) -> list[Job]:
    """The launches of a forward and backward."""

    def meta(*size: int, of: torch.dtype = call.dtype, layout: str = "contiguous") -> Tensor:
        return in_layout(torch.empty(size, dtype=of, device="meta"), layout)

    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    x, dy = meta(*call.shape, layout=call.layout), meta(*call.shape, layout=call.dy_layout or call.layout)
    weight, bias, *buffers = (meta(call.shape[1], of=wide) for _ in range(4))
    mask = meta(call.shape[0], *call.shape[2:], of=torch.bool) if call.masked else None
    residual = meta(*call.shape, layout=call.layout) if call.residual else None
    running = Running(*buffers, meta(of=torch.int64), call.momentum) if call.running else None
    given = Epilogue(weight, bias, residual, mask, call.activation)
    kept = given._replace(residual=residual if call.activation else None) if call.running else given
    needs_dresidual = residual is not None and (call.activation is not None or call.masked)
    jobs: list[Job] = []
    with mock.patch.object(gpu, "launch", lambda *launched: jobs.append(_job(*launched))):
        sums = gpu.batch_sums(x, mask)
        _, mean, invstd = gpu.normalize(x, sums, given, 1e-5, running)
        dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, kept)
        gpu.grad_input(dy, x, mean, invstd, kept, dsums, sums[-3:-2], needs_dresidual)
    return jobs


def _job(kernel: Any, grid: int, pointers: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> Job:
    function = kernel.function
    alike = tuple(0.0 if isinstance(n, float) else 0 if -(2**31) <= n < 2**31 else 2**31 for n in numbers)
    constants, options = tuple(kernel.constants.items()), tuple(kernel.options.items())
    dtypes = tuple(None if t is None else t.dtype for t in pointers)
    return Job(function.__module__, function.__name__, constants, options, dtypes, alike)


def jobs(multiprocessors: int) -> Iterator[Job]:
    """The distinct kernels of `calls` on a device with so many multiprocessors, as they come up."""
    seen: set[Job] = set()
    with mock.patch.object(gpu_launch, "sms_of", return_value=multiprocessors):
        for call in calls():
            for job in recorded(call):
                if job not in seen:
                    seen.add(job)
                    yield job


def build(given: tuple[Job, int]) -> str:
    """Compile a kernel into the cache; what went wrong, or nothing."""
    job, capability = given
    try:
        function = getattr(importlib.import_module(job.module), job.name)
        kernel = SimpleNamespace(function=function, constants=dict(job.constants), options=dict(job.options))
        pointers = [None if dtype is None else SimpleNamespace(dtype=dtype) for dtype in job.pointers]
        compile_for(GPUTarget("cuda", capability, 32), kernel, pointers, job.numbers)
        return ""
    except Exception as problem:  # it will be met again, where it is used
        return f"{job.name} {job.constants}: {type(problem).__name__}: {problem}"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=0, help="seconds, from the start of the process")
    parser.add_argument("--processes", type=int, default=cores(), help="default: one a core")
    parser.add_argument("--smoke", action="store_true", help="a few kernels: does the script work?")
    args = parser.parse_args(argv)
    budget = Budget(max(1.0, args.budget - _age()) if args.budget > 0 else 0)
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:  # forked before CUDA is touched
        capability, multiprocessors = device()
        todo = itertools.islice(jobs(multiprocessors), SMOKE_JOBS if args.smoke else None)
        done, failures = wait_for(pool.imap_unordered(build, ((job, capability) for job in todo)), budget)
    for failure in failures[:MOST_SHOWN]:
        print(failure, file=sys.stderr)
    print(f"sm_{capability}: {done} kernels by {args.processes} processes, {_age():.1f} s after the start", flush=True)
    if failures:
        raise SystemExit(1)


def wait_for(outcomes: Any, budget: Budget) -> tuple[int, list[str]]:
    """How many were compiled within the budget, and what went wrong; a compiler that crashed is not waited for."""
    done, failures = 0, []
    while not budget.spent():
        try:
            problem = outcomes.next(timeout=min(budget.left(), LONGEST))
        except StopIteration:
            break
        except multiprocessing.TimeoutError:
            failures += [] if budget.spent() else [f"no kernel in {LONGEST} s: a compiler has crashed"]
            break
        failures += [problem] if problem else []
        done += not problem
    return done, failures


def device() -> tuple[int, int]:
    """Compute capability, as in sm_90, and multiprocessors of the GPU; without one an H100's."""
    if not torch.cuda.is_available():
        return WITHOUT_DEVICE, gpu_launch.SMS_WITHOUT_DEVICE
    properties = torch.cuda.get_device_properties(0)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def _age() -> float:
    """Seconds since this process started; on Linux, the only system that Triton is made for."""
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


if __name__ == "__main__":
    main()
