"""How long does one training call of the layer take, forward, backward and both, against what else there is?

    python -m benchmarks.layer                     # on CPU: 2 gloo ranks, one thread each on two cores
    python -m benchmarks.layer --ranks 1 --append  # one process with all cores
    python -m benchmarks.layer --device cuda       # on a GPU: see benchmarks/layer_gpu.py

On CPU all variants of a shape run in the same processes and take turns: every repetition of every variant starts at a
barrier, is timed on each rank, and counts as long as on the slowest. Each rank has its own batch of the shape, so the
unsynchronised variants run on all ranks at once too, and share the machine in the same way.

    nn.BatchNorm   torch's layer, on each rank's own batch
    syncbn_alone   ours, in a group of one
    syncbn         ours, over all ranks
    naive_sync     composed of torch operations with a differentiable all_reduce
    all_reduce     our two collectives alone
    copy           one read and one write of the activation each way: the floor
"""

import argparse
import sys
import time
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import variants
from benchmarks.checking import Case, check, make_case, oracle
from benchmarks.harness import (
    ENVIRONMENT,
    Budget,
    Results,
    Sample,
    Summary,
    arguments,
    cores,
    environment,
    interleave,
    on_ranks,
    ratio,
    results_path,
    summarize,
    timing_columns,
)
from benchmarks.resilience import parsed
from benchmarks.shapes import Plan, cpu_plans

COLUMNS = (
    *ENVIRONMENT,
    *("op", "shape", "layout", "dtype", "mode", "cache", "pass", "variant"),
    *("ms", "ms_p20", "ms_p80", "reps", "over_copy", "over_bn", "error", "bn_backend"),
)
"""over_copy, over_bn: median over that of copy, of nn.BatchNorm, in the same run; error: of the output check."""

PASSES = ("forward", "backward", "both")
CPU = torch.device("cpu")


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    if args.device == "cuda" or args.gpu_flow:
        from benchmarks import layer_gpu

        layer_gpu.run(args)
        return
    results_path(args, "layer").parent.mkdir(parents=True, exist_ok=True)
    on_ranks(run_rank, args)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, reps=60)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes (CPU)")
    parser.add_argument("--threads", type=int, help="torch threads of each rank (CPU); default: the cores, shared out")
    parser.add_argument("--only", default="", help="comparisons whose name contains this, e.g. 8x64x56x56")
    parser.add_argument("--gpu-flow", action="store_true", help="with --smoke, the GPU script's steps on this CPU")
    parser.add_argument("--compiled", action="store_true", help="time torch.compile of nn.BatchNorm, too (GPU)")
    args = parsed(parser, argv, "layer")
    if args.smoke:
        args.reps = min(args.reps, 3)
    return args


def run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank's part of every comparison; rank 0 writes."""
    torch.set_num_threads(args.threads or max(1, cores() // args.ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    try:
        alone = [dist.new_group([r]) for r in range(args.ranks)][rank]
        results = Results(results_path(args, "layer") if rank == 0 else None, COLUMNS, args.append)
        budget = Budget(args.budget)
        for plan, op in cpu_plans(args.smoke):
            if args.only not in f"{plan} {op}":
                continue
            if agreed(budget.spent()):
                say(rank, f"out of time: skipped {plan} {op}")
                continue
            compare(plan, op, rank, args, alone, results)
            say(rank, f"{plan} {op}: done")
    finally:
        dist.destroy_process_group()


def compare(plan: Plan, op: str, rank: int, args: argparse.Namespace, alone: Any, results: Results) -> None:
    """Check, time and write one shape, layout and dtype, of the batch norm or what is fused with it."""
    fused = op != "bn"
    case = make_case(plan, CPU, rank, fused)
    entrants = cpu_variants(case, alone, args.ranks, fused)
    errors = check_all(plan, case, entrants, rank, args.ranks, fused)
    samplers = {v.name: partial(repetition, v, case) for v in entrants}
    times = slowest(interleave(samplers, args.reps))
    summaries = {key: summarize(seconds) for key, seconds in times.items()}
    where = environment(args.machine, CPU, args.ranks)
    setting = {"op": op, "mode": "eager", "cache": "", "bn_backend": bn_backend(case)}
    write(results, {**where, **setting, **plan_columns(plan)}, summaries, errors)


def cpu_variants(case: Case, alone: Any, ranks: int, fused: bool = False) -> list[variants.Variant]:
    """Those of the docstring; without peers, those that need none. nn.BatchNorm adds and applies relu if fused."""
    entrants = [
        variants.copy(),
        variants.variant("nn.BatchNorm", variants.batch_norm(case, fused)),
        variants.variant("syncbn_alone", variants.ours(case, alone, fused), is_ours=True),
    ]
    if ranks > 1:
        entrants += [variants.variant("syncbn", variants.ours(case, None, fused), "global", True)]
        entrants += [] if fused else [variants.variant("naive_sync", variants.naive_sync(case), "global")]
        entrants += [variants.bare_all_reduce(case)]
    return entrants


def check_all(
    plan: Plan, case: Case, entrants: list[variants.Variant], rank: int, ranks: int, fused: bool = False
) -> dict[str, float]:
    """The error of each variant's output; raises on every rank's own finding."""
    right = {"local": oracle([case], 0, fused)}
    if any(v.scope == "global" for v in entrants):
        everyone = [case if r == rank else make_case(plan, case.x.device, r, fused) for r in range(ranks)]
        right["global"] = oracle(everyone, rank, fused)
    return {
        v.name: check(v.name, partial(v.forward, case), partial(v.backward, case), right[v.scope], v.is_ours)
        for v in entrants
        if v.scope is not None
    }


def repetition(v: variants.Variant, case: Case) -> Sample:
    """Seconds of a forward, the backward after it, and both, on this rank, all ranks starting together."""
    dist.barrier()
    start = time.perf_counter()
    y = v.forward(case)
    middle = time.perf_counter()
    v.backward(case, y)
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


def slowest(times: dict[tuple[str, str], list[float]]) -> dict[tuple[str, str], list[float]]:
    """Each repetition's time on the rank where it took longest."""
    t = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return dict(zip(times, t.tolist(), strict=True))


def agreed(flag: bool) -> bool:
    """Whether it holds on any rank."""
    t = torch.tensor(float(flag))
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return bool(t)


def write(
    results: Results,
    shared: dict[str, Any],
    summaries: dict[tuple[str, str], Summary],
    errors: dict[str, float],
    marks: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """A row for each variant and pass, losers too; marks are added to the variants' mode."""
    for (name, phase), summary in summaries.items():
        over_copy = ratio(summary, summaries.get(("copy", phase)))
        over_bn = ratio(summary, summaries.get(("nn.BatchNorm", phase)))
        row = {**shared, "pass": phase, "variant": name, **timing_columns(summary)}
        row["mode"] += marks.get(name, "")
        results.add({**row, "over_copy": over_copy, "over_bn": over_bn, "error": errors.get(name, "")})


def plan_columns(plan: Plan) -> dict[str, str]:
    return {"shape": "x".join(map(str, plan.shape)), "dtype": plan.dtype, "layout": plan.layout}


def bn_backend(case: Case) -> str:
    """What torch picks for its own batch norm of this input in training: Native, Cudnn or Miopen."""
    parameters = (case.weight, case.bias, torch.zeros_like(case.weight), torch.ones_like(case.weight))
    return str(torch._C._select_batch_norm_backend(case.x, *parameters, True, 1e-5)).rpartition(".")[-1]


def say(rank: int, text: str) -> None:
    if rank == 0:
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
