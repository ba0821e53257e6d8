"""Memory, launches and host syncs of a training step on a GPU, beside its time."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.resilience import Budget, attempt
from benchmarks.tables import Results, Row

LAUNCHES = (
    *("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx"),
    "cudaLaunchCooperativeKernel",
)
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cudaMemcpy")

RESOURCES = {"peak_megabytes": "", "launches": "", "host_syncs": ""}
"""Of an eager step on a GPU; filled in after the times are written, since a profiler may fail or take long."""


def add_resources(
    rows: dict[str, Row],
    steps: dict[str, Callable[[], None]],
    what: str,
    device: torch.device,
    budget: Budget,
    results: Results,
) -> list[str]:
    """Fill in what a step of each model costs beside its time; what failed."""
    failures: list[str] = []
    for name, row in rows.items():
        if not budget.spent():
            found = attempt(f"{what}: resources of {name}", partial(cost, steps[name]), device, failures)
            results.amend(row, found or {})
    return failures


def cost(step: Callable[[], None]) -> dict[str, Any]:
    """Memory, launches and host syncs of a step on a GPU."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {"peak_megabytes": peak, **counted(step)}


def counted(step: Callable[[], None]) -> dict[str, int]:
    """Calls of the CUDA runtime during a step, as the profiler names them."""
    profiler = torch.profiler.profile
    # where it can be told to keep its events, it warns that else it does not
    keep = {"acc_events": True} if "acc_events" in inspect.signature(profiler).parameters else {}
    with profiler(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA], **keep) as p:
        with torch.profiler.record_function("the step"):
            step()
        torch.cuda.synchronize()
    return tally([(e.name, e.time_range.start, e.time_range.end) for e in p.events()])


def tally(events: list[tuple[str, float, float]]) -> dict[str, int]:
    """Launches and syncs among (name, start, end), of those that start within the event named "the step"."""
    start, end = next((start, end) for name, start, end in events if name == "the step")
    names = [name for name, at, _ in events if start <= at <= end]
    return {
        "launches": sum(name in LAUNCHES for name in names),
        "host_syncs": sum(name in SYNCS for name in names),
    }
