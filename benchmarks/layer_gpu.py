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
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch._functorch import config as functorch_config

from benchmarks import device_memory, device_timing, variants
from benchmarks.checking import Case, bn_backend, make_case
from benchmarks.cuda_graphs import on_side_stream
from benchmarks.harness import Benchmark
from benchmarks.resilience import Budget, say
from benchmarks.resnet import ForcedOurs, ForcedTorchSync
from benchmarks.shapes import LayerCall, layer_plans

COMPILED_JOBS = 6
COMPILE_SECONDS = 45
"""Budget below which no torch.compile is started any more."""
OUTPUTS = 5
"""Times its inputs' bytes that a variant's passes keep at most: torch's bn, add and relu in three graphs, 13 / 3."""


def benchmark(args: argparse.Namespace, columns: Sequence[str]) -> Benchmark:
    """Every comparison, the more telling first."""
    functorch_config.donated_buffer = False  # else a compiled backward runs only once
    jobs = [call for call in layer_plans(args.smoke) if args.only in str(call.plan)]
    fused = [call for call in jobs if call.fused]
    compiled = fused[: 1 if args.smoke else COMPILED_JOBS] if args.compiled else []
    group = "nccl" if args.device == "cuda" else "gloo"
    return Benchmark(args, columns, jobs, partial(compare, compiled=compiled), group)


def compare(call: LayerCall, budget: Budget, benchmark: Benchmark, compiled: Sequence[LayerCall]) -> list[str]:
    """Check, time and write one comparison; the reasons why variants were left out."""
    device, args = benchmark.device, benchmark.args
    case = make_case(call.plan, device, fused=call.fused)
    size = case.x.numel() * case.x.element_size() * (3 if call.fused else 2)
    copies = device_memory.copies_for(size, True, device)
    with_compile = call in compiled and (args.smoke or budget.left() > COMPILE_SECONDS)
    entrants = gpu_variants(case, call.fused, with_compile)
    if not device_memory.fits(size * copies * OUTPUTS * len(entrants), device):
        say(f"{call}: skipped, it needs more memory than is free")
        return []
    entrants, errors, refused = variants.right_ones(call, case, entrants)
    cases = device_memory.rotation(case, copies)
    makers = {v.name: partial(timers_of, v, cases, device) for v in entrants}
    over = {"over_copy": "copy", "over_bn": "nn.BatchNorm"}
    for mode, reps in (("graph", args.reps), ("eager", -(-args.reps // 2))):
        if (mode == "graph" and device.type != "cuda") or budget.spent():
            continue
        times, marks, failures = device_timing.in_turn(makers, mode == "graph", f"{call} {mode}", device, reps)
        refused += failures
        shared = {**benchmark.environment(call.plan), "bn_backend": bn_backend(case), **call.plan.columns()}
        shared |= {"op": call.op, "cache": device_memory.cache_state(copies, size, device)}
        found = {v.name: {"mode": mode + marks.get(v.name, ""), "error": errors.get(v.name, "")} for v in entrants}
        benchmark.write(shared, times, over, "pass", more=lambda key, _, found=found: found[key[0]])
    return refused


def gpu_variants(case: Case, fused: bool, with_compile: bool) -> list[variants.Variant]:
    """Those of the docstring that this device can run."""
    kept = partial(variants.variant, retain_graph=True)
    entrants = [
        variants.copy(),
        kept("nn.BatchNorm", variants.batch_norm(case, fused)),
        kept("syncbn", variants.ours(case, fused=fused), is_ours=True),
        kept("syncbn.forced", variants.ours(case, None, fused, ForcedOurs), is_ours=True),
    ]
    if case.x.is_cuda:
        entrants.append(kept("nn.SyncBatchNorm.forced", variants.batch_norm(case, fused, ForcedTorchSync)))
    if with_compile:
        torch.compiler.reset()
        entrants.append(kept("compiled", variants.compiled_batch_norm(case, fused)))
    return entrants


def timers_of(v: variants.Variant, cases: list[Case], device: torch.device, graph: bool) -> device_timing.ByPass:
    """A timer for each pass."""

    def outputs() -> list[tuple[Case, Any]]:
        return [(case, v.forward(case)) for case in cases]

    def both(case: Case) -> tuple[Any, Any]:
        y = v.forward(case)
        return y, v.backward(case, y)

    ran = on_side_stream(outputs, device) if graph else outputs()
    return {
        "forward": device_timing.timer(v.forward, cases, device, graph),
        "backward": device_timing.timer(lambda item: v.backward(*item), ran, device, graph),
        "both": device_timing.timer(both, cases, device, graph),
    }
