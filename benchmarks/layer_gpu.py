"""layer.py on a GPU: one process, a default group of one rank, cold caches, eager and as a CUDA graph.

    op bn            y = bn(x)
    op bn_add_relu   y = relu(bn(x) + residual), in every variant; the fused ones do it in the layer

    nn.BatchNorm             torch's layer, then torch's add and relu
    nn.SyncBatchNorm.forced  its synchronized path under NCCL, though it has no peer; then add and relu
    compiled                 torch.compile of nn.BatchNorm, add and relu; the first shapes only, it takes seconds each
    syncbn                   ours, no collective, as it is in a group of one; add and relu in the layer
    syncbn.forced            ours with both collectives issued under NCCL
    copy                     one read and one write of the activation each way: the floor

A variant whose output is wrong is reported and not timed, and the script fails in the end. Backward repeats on graphs
that were kept, so it includes no forward. The most important comparisons come first: --budget cuts the tail.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch._functorch import config as functorch_config

from benchmarks import device_timing, variants
from benchmarks.checking import Case, check, make_case, oracle
from benchmarks.harness import Budget, Results, environment, interleave, results_path, summarize
from benchmarks.layer import COLUMNS, bn_backend, plan_columns, write
from benchmarks.shapes import Plan, gpu_plans

OPS = ("bn_add_relu", "bn")
COMPILED_PLANS = 6
COMPILE_SECONDS = 45
"""Budget below which no torch.compile is started any more."""


def run(args: argparse.Namespace) -> None:
    """Every comparison that the budget allows; exits with 1 if an output was wrong."""
    device = torch.device(args.device)
    torch.set_num_threads(args.threads or 1)
    functorch_config.donated_buffer = False  # else a compiled backward runs only once
    results = Results(results_path(args, "layer"), COLUMNS, args.append)
    refused: list[str] = []
    budget = Budget(args.budget)
    with alone(device):
        jobs = list(comparisons(args))
        for done, (plan, op, with_compile) in enumerate(jobs):
            if budget.spent():
                print(f"out of time: {len(jobs) - done} of {len(jobs)} comparisons skipped", file=sys.stderr)
                break
            with_compile = with_compile and (budget.left() > COMPILE_SECONDS or args.smoke)
            refused += compare(plan, op, with_compile, args, results)
            print(f"{plan} {op}: done", file=sys.stderr, flush=True)
    if refused:
        raise SystemExit("\n".join(refused))


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


def comparisons(args: argparse.Namespace) -> Iterator[tuple[Plan, str, bool]]:
    """(plan, op, whether torch.compile takes part), the more telling first."""
    plans = [plan for plan in gpu_plans(args.smoke) if args.only in str(plan)]
    for at, plan in enumerate(plans):
        for op in OPS:
            yield plan, op, op == "bn_add_relu" and at < (1 if args.smoke else COMPILED_PLANS)


def compare(plan: Plan, op: str, with_compile: bool, args: argparse.Namespace, results: Results) -> list[str]:
    """Check, time and write one comparison; the reasons why variants were left out for a wrong output."""
    device, fused = torch.device(args.device), op == "bn_add_relu"
    case = make_case(plan, device, fused=fused)
    size = case.x.numel() * case.x.element_size() * (3 if fused else 2)
    copies = device_timing.copies_for(size, True, device)
    entrants = gpu_variants(case, fused, with_compile)
    if not device_timing.fits(size * copies * 2 * len(entrants), device):
        print(f"{plan} {op}: skipped, it needs more memory than is free", file=sys.stderr)
        return []
    entrants, errors, refused = right_ones(plan, case, entrants, fused)
    cases = rotation(case, copies)
    for mode in ("graph", "eager") if device.type == "cuda" else ("eager",):
        device_timing.forget_captures(device)
        timers = make_timers(entrants, cases, mode == "graph", device)
        samplers = {name: partial(sample, by_pass) for name, by_pass in timers.items()}
        summaries = {key: summarize(seconds) for key, seconds in interleave(samplers, args.reps, 1).items()}
        setting = {"op": op, "mode": mode, "cache": device_timing.cache_state(copies, size, device)}
        shared = {**environment(args.machine, device), **setting, "bn_backend": bn_backend(case)}
        write(results, {**shared, **plan_columns(plan)}, summaries, errors)
        del timers, samplers
    return refused


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
    plan: Plan, case: Case, entrants: list[variants.Variant], fused: bool
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
        except (AssertionError, RuntimeError) as problem:
            refused.append(f"{plan}: {v.name}: {problem}")
            print(f"NOT TIMED: {refused[-1]}", file=sys.stderr, flush=True)
    return right, errors, refused


def rotation(case: Case, copies: int) -> list[Case]:
    """The case and its equals at other addresses; they share the parameters."""
    xs, dys = (device_timing.duplicate(t, copies) for t in (case.x, case.dy))
    residuals = [None] * copies if case.residual is None else device_timing.duplicate(case.residual, copies)
    parts = zip(xs, dys, residuals, strict=True)
    return [case._replace(x=x, dy=dy, residual=residual) for x, dy, residual in parts]


Timers = dict[str, dict[str, Callable[[], float]]]


def make_timers(entrants: list[variants.Variant], cases: list[Case], graph: bool, device: torch.device) -> Timers:
    """By variant and pass; a variant that cannot be captured is reported and missing."""
    timers: Timers = {}
    for v in entrants:
        try:
            timers[v.name] = timers_of(v, cases, graph, device)
        except RuntimeError as problem:
            print(f"NOT TIMED: {v.name} as a CUDA graph: {problem}", file=sys.stderr, flush=True)
    return timers


def timers_of(v: variants.Variant, cases: list[Case], graph: bool, device: torch.device) -> dict[str, Any]:
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


def sample(by_pass: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Seconds of a call, by pass."""
    return {phase: timed() for phase, timed in by_pass.items()}
