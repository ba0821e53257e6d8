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

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import device_timing
from benchmarks.checking import EPS, Case, hold, make_case
from benchmarks.harness import (
    ENVIRONMENT,
    Budget,
    Results,
    arguments,
    interleave,
    ratio,
    results_path,
    summarize,
    timing_columns,
)
from benchmarks.layer import bn_backend, plan_columns
from benchmarks.layer_gpu import environment_of, rotation
from benchmarks.resilience import parsed, report, through
from benchmarks.shapes import Plan, gpu_plans
from syncbn.backends import name_for, reference, select
from syncbn.formulas import Epilogue

COLUMNS = (
    *ENVIRONMENT,
    *("epilogue", "shape", "layout", "dtype", "cache", "verb", "variant", "bytes"),
    *("ms", "ms_p20", "ms_p80", "reps", "over_copy", "gigabytes_per_second", "error", "backend", "bn_backend"),
)
VERBS = {"batch_sums": (1, 1), "normalize": (2, 3), "grad_sums": (2, 3), "grad_input": (3, 5)}
"""Activations read and written, without and with add_relu."""


class Fixed(NamedTuple):
    """What every copy of a case shares: (C) statistics and reduced sums, right to float64 and in compute precision."""

    sums: Tensor
    mean: Tensor
    invstd: Tensor
    dsums: Tensor
    count: Tensor
    right: dict[str, Tensor]


Call = Callable[[Case], Any]


class Entrant(NamedTuple):
    """A verb's implementation; main picks from its output what is compared with `Fixed.right`."""

    name: str
    call: Call
    main: Callable[[Any], Tensor]
    is_ours: bool


class Job(NamedTuple):
    """One comparison: every verb on one shape, layout and dtype, without or with add_relu."""

    plan: Plan
    fused: bool

    def __str__(self) -> str:
        return f"{self.plan} {'add_relu' if self.fused else 'none'}"


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, reps=20)
    parser.add_argument("--only", default="", help="comparisons whose name contains this, e.g. 32x2048x7x7")
    args = parsed(parser, argv, "kernels")
    if args.smoke:
        args.reps = min(args.reps, 3)
        torch.set_num_threads(1)
    results = Results(results_path(args, "kernels"), COLUMNS, args.append)
    jobs = [Job(plan, fused) for plan in gpu_plans(args.smoke) for fused in (False, True) if args.only in str(plan)]
    through(jobs, partial(measure, args=args, results=results), args, torch.device(args.device))


def measure(job: Job, budget: Budget, args: argparse.Namespace, results: Results) -> list[str]:
    """Every verb; the reasons why implementations were not timed."""
    device, (plan, fused) = torch.device(args.device), job
    case = make_case(plan, device, fused=fused)
    size = case.x.numel() * case.x.element_size()
    if not device_timing.fits(size * 60, device):
        print(f"{job}: skipped, it needs more memory than is free", file=sys.stderr)
        return []
    case = Case(*(None if t is None else t.detach() for t in case))
    fixed = fix(case)
    shared = {**environment_of(plan, args.machine, device), **plan_columns(plan), "bn_backend": bn_backend(case)}
    shared |= {"epilogue": "add_relu" if fused else "none", "backend": name_for(case.x)}
    refused: list[str] = []
    for verb, passes in VERBS.items():
        if fused and verb == "batch_sums":
            continue
        shared |= {"verb": verb, "bytes": passes[fused] * size}
        entrants, errors, wrong = right_ones(verb, case, fixed, str(job))
        refused += wrong
        for cold in (True, False):
            copies = device_timing.copies_for(shared["bytes"], cold, device)
            shared["cache"] = device_timing.cache_state(copies, shared["bytes"], device)
            refused += time_verb(entrants, rotation(case, copies), shared, errors, args.reps, results)
    return refused


def fix(case: Case) -> Fixed:
    """Statistics by the reference in float64 of the tensors as they are, rounded once to what the verbs take."""
    wide = Case(*(None if t is None else t.double() for t in case))
    sums = reference.batch_sums(wide.x, None)
    y, mean, invstd = reference.normalize(wide.x, sums, epilogue(wide), EPS, None)
    dsums, dweight, _ = reference.grad_sums(wide.dy, wide.x, mean, invstd, epilogue(wide))
    count = sums[-3:-2].clone()
    grads = reference.grad_input(wide.dy, wide.x, mean, invstd, epilogue(wide), dsums, count, False)
    right = {"batch_sums": sums, "normalize": y, "grad_sums": dweight, "grad_input": grads[0], "mean": mean}
    return Fixed(sums, mean.float(), invstd.float(), dsums, count, right)


def epilogue(case: Case) -> Epilogue:
    return Epilogue(case.weight, case.bias, case.residual, None, None if case.residual is None else "relu")


def ours(verb: str, case: Case, fixed: Fixed) -> Entrant:
    """The back-end that serves this device."""
    backend = select(case.x)
    _, mean, invstd, dsums, count, _ = fixed
    needs = case.residual is not None
    calls: dict[str, tuple[Call, Callable[[Any], Tensor]]] = {
        "batch_sums": (lambda c: backend.batch_sums(c.x, None), lambda out: out),
        "normalize": (lambda c: backend.normalize(c.x, fixed.sums, epilogue(c), EPS, None), lambda out: out[0]),
        "grad_sums": (lambda c: backend.grad_sums(c.dy, c.x, mean, invstd, epilogue(c)), lambda out: out[1]),
        "grad_input": (
            lambda c: backend.grad_input(c.dy, c.x, mean, invstd, epilogue(c), dsums, count, needs),
            lambda out: out[0],
        ),
    }
    return Entrant("syncbn", *calls[verb], True)


def torchs(verb: str, case: Case, fixed: Fixed) -> Entrant | None:
    """torch's kernel for the verb without an epilogue, named by its operation."""
    if case.residual is not None:
        return None
    _, mean, invstd, dsums, count, _ = fixed
    weight, bias = case.weight, case.bias
    if not case.x.is_cuda:
        return _torchs_on_cpu(verb, case, fixed)
    sum_dy, sum_dy_xhat = dsums[:-2].float().chunk(2)
    sum_dy_xmu, counts = sum_dy_xhat / invstd, count.int()
    calls: dict[str, tuple[str, Call, Callable[[Any], Tensor]]] = {
        "batch_sums": ("batch_norm_stats", lambda c: torch.batch_norm_stats(c.x, EPS), lambda out: out[0]),
        "normalize": (
            "batch_norm_elemt",
            lambda c: torch.batch_norm_elemt(c.x, weight, bias, mean, invstd, EPS),
            lambda out: out,
        ),
        "grad_sums": (
            "batch_norm_backward_reduce",
            lambda c: torch.batch_norm_backward_reduce(c.dy, c.x, mean, invstd, weight, True, True, True),
            lambda out: out[2],
        ),
        "grad_input": (
            "batch_norm_backward_elemt",
            lambda c: torch.batch_norm_backward_elemt(c.dy, c.x, mean, invstd, weight, sum_dy, sum_dy_xmu, counts),
            lambda out: out,
        ),
    }
    return Entrant(*calls[verb], False)


def _torchs_on_cpu(verb: str, case: Case, fixed: Fixed) -> Entrant | None:
    weight, bias, mean, invstd = case.weight, case.bias, fixed.mean, fixed.invstd
    var = invstd.pow(-2) - EPS
    dims = [dim for dim in range(case.x.ndim) if dim != 1]
    aten = torch.ops.aten
    calls: dict[str, tuple[str, Call, Callable[[Any], Tensor]]] = {
        "batch_sums": ("var_mean", lambda c: torch.var_mean(c.x, dims), lambda out: out[1]),
        "normalize": (
            "native_batch_norm",
            lambda c: aten.native_batch_norm(c.x, weight, bias, mean, var, False, 0.0, EPS),
            lambda out: out[0],
        ),
        "grad_sums": (
            "native_batch_norm_backward",
            lambda c: aten.native_batch_norm_backward(
                c.dy, c.x, weight, mean, var, None, None, False, EPS, [False, True, True]
            ),
            lambda out: out[1],
        ),
    }
    return Entrant(*calls[verb], False) if verb in calls else None


def right_ones(verb: str, case: Case, fixed: Fixed, plan: str) -> tuple[list[Entrant], dict[str, float], list[str]]:
    """The implementations whose output is right, their errors, and what was wrong with the others."""
    entrants, errors, refused = [], {}, []
    for make in (ours, torchs):
        try:
            entrant = make(verb, case, fixed)
            if entrant is None:
                continue
            wanted = "mean" if verb == "batch_sums" and not entrant.is_ours else verb
            output = entrant.main(entrant.call(case))
            rounded = None if entrant.is_ours else case.x.dtype
            errors[entrant.name] = hold(f"{verb} by {entrant.name}", output, fixed.right[wanted], rounded)
            entrants.append(entrant)
        except Exception as problem:  # whatever it is, the others are still to be timed
            refused.append(report(f"{plan}: {verb}, {make.__name__}", problem, case.x.device))
    return entrants, errors, refused


def time_verb(
    entrants: list[Entrant],
    cases: list[Case],
    shared: dict[str, Any],
    errors: dict[str, float],
    reps: int,
    results: Results,
) -> list[str]:
    """Rows of one verb and cache state: the copy first, then every implementation; what could not be timed."""
    device = cases[0].x.device
    halves = [torch.zeros(shared["bytes"] // 2, dtype=torch.uint8, device=device) for _ in cases]
    device_timing.forget_captures(device)
    calls: dict[str, tuple[Call, list[Any]]] = {"copy": (torch.clone, halves)}
    calls |= {entrant.name: (entrant.call, cases) for entrant in entrants}
    makers = {
        name: lambda graph, given=given: {"": device_timing.timer(*given, device, graph)}
        for name, given in calls.items()
    }
    what = f"{shared['shape']} {shared['dtype']} {shared['layout']} {shared['epilogue']} {shared['verb']}"
    running = device_timing.samplers(makers, device.type == "cuda", what, device)
    summaries = {name: summarize(seconds) for (name, _), seconds in interleave(running.calls, reps, 1).items()}
    for name, summary in summaries.items():
        row = {**shared, "variant": name, **timing_columns(summary), "error": errors.get(name, "")}
        row |= {"cache": shared["cache"] + running.marks[name], "over_copy": ratio(summary, summaries.get("copy"))}
        results.add({**row, "gigabytes_per_second": shared["bytes"] / summary.median / 1e6})
    return running.failures


if __name__ == "__main__":
    main()
