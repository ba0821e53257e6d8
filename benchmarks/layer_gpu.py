"""layer.py on a GPU: one process, a default group of one rank, cold caches, eager and as a CUDA graph.

    op bn            y = bn(x)
    op bn_add_relu   y = relu(bn(x) + residual), in every variant; the fused ones do it in the layer

    nn.BatchNorm             torch's layer, then torch's add and relu
    nn.SyncBatchNorm.forced  its synchronized path under NCCL, though it has no peer; then add and relu
    compiled                 torch.compile of nn.BatchNorm, add and relu: with --compiled, the first shapes only
    syncbn                   ours, no collective, as it is in a group of one; add and relu in the layer
    syncbn.forced            ours with both collectives issued under NCCL
    copy                     one read and one write of the activation each way: the floor

A variant whose output is wrong is reported and not timed, and the script fails in the end; one that cannot be captured
is timed eagerly, which `mode` then says ("graph uncaptured"). Backward repeats on graphs that were kept, so it includes
no forward; eager repetitions are half as many. The most important comparisons come first: --budget cuts the tail.
"""

import argparse
import functools
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch._functorch import config as functorch_config

from benchmarks import device_timing, variants
from benchmarks.checking import Case, check, make_case, oracle
from benchmarks.harness import Budget, Results, environment, interleave, results_path, summarize
from benchmarks.layer import COLUMNS, bn_backend, plan_columns, write
from benchmarks.resilience import report, through
from benchmarks.shapes import Plan, layer_plans

COMPILED_JOBS = 6
COMPILE_SECONDS = 45
"""Budget below which no torch.compile is started any more."""
OUTPUTS = 5
"""Times its inputs' bytes that a variant's passes keep at most: torch's bn, add and relu in three graphs, 13 / 3."""


class Job(NamedTuple):
    """One comparison, and whether torch.compile takes part."""

    plan: Plan
    op: str
    with_compile: bool

    def __str__(self) -> str:
        return f"{self.plan} {self.op}"


def run(args: argparse.Namespace) -> None:
    """Every comparison that the budget allows; exits with 1 if an output was wrong."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads or 1)
    functorch_config.donated_buffer = False  # else a compiled backward runs only once
    results = Results(results_path(args, "layer"), COLUMNS, args.append)
    with alone(device):
        through(jobs(args), partial(compare, args=args, results=results), args, device)


class alone:
    """A default process group of this process only: NCCL on a GPU, gloo on CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> None:
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        store = Path(self.folder.name) / "store"
        dist.init_process_group(backend, init_method=f"file://{store}", rank=0, world_size=1)

    def __exit__(self, *_: Any) -> None:
        dist.destroy_process_group()
        self.folder.cleanup()


def jobs(args: argparse.Namespace) -> list[Job]:
    """The more telling first."""
    chosen = [(plan, op) for plan, op in layer_plans(args.smoke) if args.only in str(plan)]
    fused = [pair for pair in chosen if pair[1] == "bn_add_relu"]
    compiled = fused[: 1 if args.smoke else COMPILED_JOBS] if args.compiled else []
    return [Job(*pair, pair in compiled) for pair in chosen]


def compare(job: Job, budget: Budget, args: argparse.Namespace, results: Results) -> list[str]:
    """Check, time and write one comparison; the reasons why variants were left out."""
    device, (plan, op, with_compile), fused = torch.device(args.device), job, job.op == "bn_add_relu"
    case = make_case(plan, device, fused=fused)
    size = case.x.numel() * case.x.element_size() * (3 if fused else 2)
    copies = device_timing.copies_for(size, True, device)
    entrants = gpu_variants(case, fused, with_compile and (args.smoke or budget.left() > COMPILE_SECONDS))
    if not device_timing.fits(size * copies * OUTPUTS * len(entrants), device):
        print(f"{job}: skipped, it needs more memory than is free", file=sys.stderr)
        return []
    entrants, errors, refused = right_ones(str(job), case, entrants, fused)
    cases = rotation(case, copies)
    for mode, reps in (("graph", args.reps), ("eager", -(-args.reps // 2))):
        if (mode == "graph" and device.type != "cuda") or budget.spent():
            continue
        device_timing.forget_captures(device)
        makers = {v.name: partial(timers_of, v, cases, device) for v in entrants}
        running = device_timing.samplers(makers, mode == "graph", f"{job} {mode}", device)
        refused += running.failures
        summaries = {key: summarize(seconds) for key, seconds in interleave(running.calls, reps, 1).items()}
        shared = {**environment_of(plan, args.machine, device), "bn_backend": bn_backend(case), **plan_columns(plan)}
        shared |= {"op": op, "mode": mode, "cache": device_timing.cache_state(copies, size, device)}
        write(results, shared, summaries, errors, running.marks)
        del running  # and its graphs, before the next are captured
    return refused


@functools.lru_cache(maxsize=1)
def environment_of(plan: Plan, machine: str | None, device: torch.device) -> dict[str, Any]:
    """The environment of a plan's rows; nvidia-smi, which may take a second, is asked once for all of them."""
    return environment(machine, device)


def gpu_variants(case: Case, fused: bool, with_compile: bool) -> list[variants.Variant]:
    """Those of the docstring that this device can run."""
    kept = partial(variants.variant, retain_graph=True)
    entrants = [
        variants.copy(),
        kept("nn.BatchNorm", variants.batch_norm(case, fused)),
        kept("syncbn", variants.ours(case, fused=fused), is_ours=True),
        kept("syncbn.forced", variants.ours_forced(case, fused), is_ours=True),
    ]
    if case.x.is_cuda:
        entrants.append(kept("nn.SyncBatchNorm.forced", variants.torch_sync_forced(case, fused)))
    if with_compile:
        torch.compiler.reset()
        entrants.append(kept("compiled", variants.compiled_batch_norm(case, fused)))
    return entrants


def right_ones(
    what: str, case: Case, entrants: list[variants.Variant], fused: bool
) -> tuple[list[variants.Variant], dict[str, float], list[str]]:
    """Those with a right output or nothing to check, the errors measured, and what was wrong with the others."""
    expected = oracle([case], 0, fused)
    right, errors, refused = [], {}, []
    for v in entrants:
        try:
            if v.scope is not None:
                forward, backward = partial(v.forward, case), partial(v.backward, case)
                errors[v.name] = check(v.name, forward, backward, expected, v.is_ours)
            right.append(v)
        except Exception as problem:  # whatever it is, the others are still to be timed
            refused.append(report(f"{what}: {v.name}", problem, case.x.device))
    return right, errors, refused


def rotation(case: Case, copies: int) -> list[Case]:
    """The case and its equals at other addresses; they share the parameters."""
    xs, dys = (device_timing.duplicate(t, copies) for t in (case.x, case.dy))
    residuals = [None] * copies if case.residual is None else device_timing.duplicate(case.residual, copies)
    parts = zip(xs, dys, residuals, strict=True)
    return [case._replace(x=x, dy=dy, residual=residual) for x, dy, residual in parts]


def timers_of(v: variants.Variant, cases: list[Case], device: torch.device, graph: bool) -> device_timing.ByPass:
    """A timer for each pass."""

    def outputs() -> list[tuple[Case, Any]]:
        return [(case, v.forward(case)) for case in cases]

    def both(case: Case) -> tuple[Any, Any]:
        y = v.forward(case)
        return y, v.backward(case, y)

    ran = device_timing.on_side_stream(outputs, device) if graph else outputs()
    return {
        "forward": device_timing.timer(v.forward, cases, device, graph),
        "backward": device_timing.timer(lambda item: v.backward(*item), ran, device, graph),
        "both": device_timing.timer(both, cases, device, graph),
    }
