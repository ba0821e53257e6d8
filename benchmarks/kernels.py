"""How fast is each of the four verbs, against torch's own kernel for it and against a copy of the same bytes?

    python -m benchmarks.kernels                   # needs a GPU
    python -m benchmarks.kernels --smoke --device cpu

A verb is timed as syncbn.backends.select(x) serves it, as a CUDA graph, with inputs cold and hot in the L2 cache; where
it cannot be captured, eagerly, which `cache` then says ("cold uncaptured").
`bytes` is what it cannot do without, S being the bytes of the activation; the copy moves as many, half of them read
and half written:

    verb         reads            writes         bytes       torch's own, on a GPU
    batch_sums   x                               1 S         batch_norm_stats
    normalize    x (residual)     y              2 S (3 S)   batch_norm_elemt
    grad_sums    dy x (residual)                 2 S (3 S)   batch_norm_backward_reduce
    grad_input   dy x (residual)  dx (dresidual) 3 S (5 S)   batch_norm_backward_elemt

in brackets for epilogue add_relu, y = relu(bn(x) + residual), which torch has no kernel for. On CPU, torch's nearest
operation stands in, where there is one.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from benchmarks import device_memory, device_timing
from benchmarks.checking import Case, bn_backend, hold, make_case
from benchmarks.harness import Benchmark, Key
from benchmarks.options import TIMING, parsed, parser
from benchmarks.resilience import Budget, attempt, say
from benchmarks.shapes import Plan, gpu_plans
from benchmarks.tables import ENVIRONMENT, TIMES, Summary
from benchmarks.verbs import VERBS, Entrant, Fixed, fix, ours, torchs
from syncbn.backends import name_for

COLUMNS = (
    *(*ENVIRONMENT, "epilogue", "shape", "layout", "dtype", "cache", "verb", "variant", "bytes", *TIMES),
    *("over_copy", "gigabytes_per_second", "error", "backend", "bn_backend"),
)


class Job(NamedTuple):
    """One comparison: every verb on one shape, layout and dtype, without or with add_relu."""

    plan: Plan
    fused: bool

    def __str__(self) -> str:
        return f"{self.plan} {'add_relu' if self.fused else 'none'}"


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__, *TIMING, "only", script="kernels", reps=20), argv, smoke_reps=3)
    jobs = [Job(plan, fused) for plan in gpu_plans(args.smoke) for fused in (False, True) if args.only in str(plan)]
    Benchmark(args, COLUMNS, jobs, measure).run()


def measure(job: Job, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Every verb; the reasons why implementations were not timed."""
    device, (plan, fused) = benchmark.device, job
    case = make_case(plan, device, fused=fused)
    size = case.x.numel() * case.x.element_size()
    if not device_memory.fits(size * 60, device):
        say(f"{job}: skipped, it needs more memory than is free")
        return []
    case = Case(*(None if t is None else t.detach() for t in case))
    fixed = fix(case)
    shared = {**benchmark.environment(plan), **plan.columns(), "bn_backend": bn_backend(case)}
    shared |= {"epilogue": "add_relu" if fused else "none", "backend": name_for(case.x)}
    refused: list[str] = []
    for verb, passes in VERBS.items():
        if fused and verb == "batch_sums":
            continue
        shared |= {"verb": verb, "bytes": passes[fused] * size}
        entrants, errors = right_ones(verb, case, fixed, str(job), refused)
        for cold in (True, False):
            copies = device_memory.copies_for(shared["bytes"], cold, device)
            shared["cache"] = device_memory.cache_state(copies, shared["bytes"], device)
            refused += time_verb(entrants, device_memory.rotation(case, copies), shared, errors, benchmark)
    return refused


def right_ones(
    verb: str, case: Case, fixed: Fixed, what: str, refused: list[str]
) -> tuple[list[Entrant], dict[str, float]]:
    """The implementations whose output is right, and their errors; what is wrong with others is added to refused."""
    entrants, errors = [], {}

    def right(make: Any) -> tuple[Entrant, float] | None:
        entrant = make(verb, case, fixed)
        if entrant is None:
            return None
        wanted = "mean" if verb == "batch_sums" and not entrant.is_ours else verb
        rounded = None if entrant.is_ours else case.x.dtype
        return entrant, hold(f"{verb} by {entrant.name}", entrant.main(case), fixed.right[wanted], rounded)

    for make in (ours, torchs):
        found = attempt(f"{what}: {verb}, {make.__name__}", partial(right, make), case.x.device, refused)
        if found is not None:
            entrants.append(found[0])
            errors[found[0].name] = found[1]
    return entrants, errors


def time_verb(
    entrants: list[Entrant], cases: list[Case], shared: dict[str, Any], errors: dict[str, float], benchmark: Benchmark
) -> list[str]:
    """Rows of one verb and cache state: the copy first, then every implementation; what could not be timed."""
    device = benchmark.device
    halves = [torch.zeros(shared["bytes"] // 2, dtype=torch.uint8, device=device) for _ in cases]
    calls: dict[str, tuple[Any, list[Any]]] = {"copy": (torch.clone, halves)}
    calls |= {entrant.name: (entrant.call, cases) for entrant in entrants}
    makers = {
        name: lambda graph, given=given: {"": device_timing.timer(*given, device, graph)}
        for name, given in calls.items()
    }
    what = f"{shared['shape']} {shared['dtype']} {shared['layout']} {shared['epilogue']} {shared['verb']}"
    times, marks, failures = device_timing.in_turn(makers, device.type == "cuda", what, device, benchmark.args.reps)

    def more(key: Key, summaries: dict[Key, Summary]) -> dict[str, Any]:
        name, speed = key[0], shared["bytes"] / summaries[key].median / 1e6
        return {"cache": shared["cache"] + marks[name], "error": errors.get(name, ""), "gigabytes_per_second": speed}

    benchmark.write(shared, times, {"over_copy": "copy"}, more=more)
    return failures


if __name__ == "__main__":
    main()
