"""Fill Triton's disk cache on all cores, so that nothing that is timed or tested waits for its compiler.

    python -m benchmarks.precompile --budget 20   # for the GPU of this machine, without one for an H100
    python -m benchmarks.precompile --smoke       # a few kernels

What the benchmarks and the GPU tests will launch is recorded by calling the verbs with tensors that have no storage;
what Triton's dispatch would compile for it is compiled by one process a core, the most important first.
--budget is seconds from the start of the process.
"""

import importlib
import itertools
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget

from benchmarks.expected_calls import Call, calls
from benchmarks.machine import cores
from benchmarks.options import parser
from benchmarks.resilience import MOST_SHOWN, Budget
from syncbn.backends import gpu_launch
from tests.support.gpu_compile import compile_for, recorded

WITHOUT_DEVICE = 90
SMOKE_JOBS = 4
LONGEST = 60
"""Seconds after which a compiler is not waited for."""


class Job(NamedTuple):
    """A kernel to compile: where it is, with what, for pointers of these dtypes and numbers of these kinds."""

    module: str
    name: str
    constants: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    pointers: tuple[torch.dtype | None, ...]
    numbers: tuple[float, ...]


def jobs_of(call: Call) -> list[Job]:
    """The launches of a forward and backward."""
    return [_job(*launch) for launch in recorded(**call._asdict())]


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
            for job in jobs_of(call):
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
    own = parser(__doc__, "budget", "smoke")
    own.add_argument("--processes", type=int, default=cores(), help="default: one a core")
    args = own.parse_args(argv)
    budget = Budget(max(1.0, args.budget - _age()) if args.budget > 0 else 0)
    with multiprocessing.get_context("fork").Pool(args.processes) as pool:  # forked before CUDA is touched
        capability, multiprocessors = device()
        todo = itertools.islice(jobs(multiprocessors), SMOKE_JOBS if args.smoke else None)
        done, failures = wait_for(pool.imap_unordered(build, ((job, capability) for job in todo)), budget)
    print(f"sm_{capability}: {done} kernels by {args.processes} processes, {_age():.1f} s after the start", flush=True)
    if failures:
        raise SystemExit("\n".join(failures[:MOST_SHOWN]))


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
