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
import functools
import time
from functools import partial
from typing import Any

import torch.distributed as dist

from benchmarks import layer_gpu, variants
from benchmarks.checking import Case, bn_backend, make_case
from benchmarks.harness import Benchmark, Sample, interleave
from benchmarks.options import TIMING, parsed, parser, shared_out
from benchmarks.resilience import Budget
from benchmarks.shapes import LayerCall, cpu_plans
from benchmarks.tables import ENVIRONMENT, TIMES

COLUMNS = (
    *(*ENVIRONMENT, "op", "shape", "layout", "dtype", "mode", "cache", "pass", "variant", *TIMES),
    *("over_copy", "over_bn", "error", "bn_backend"),
)
"""over_copy, over_bn: median over that of copy, of nn.BatchNorm, in the same run; error: of the output check."""


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    if args.device == "cuda" or args.gpu_flow:
        args.ranks, args.threads = 1, args.threads or 1
        layer_gpu.benchmark(args, COLUMNS).run()
        return
    args.threads = shared_out(args.threads, args.ranks)
    jobs = [call for call in cpu_plans(args.smoke) if args.only in str(call)]
    Benchmark(args, COLUMNS, jobs, compare, "gloo").run()


def options(argv: list[str] | None) -> argparse.Namespace:
    own = parser(__doc__, *TIMING, "ranks", "only", "compiled", script="layer", reps=60)
    own.add_argument("--threads", type=int, help="torch threads of each rank (CPU); default: the cores, shared out")
    own.add_argument("--gpu-flow", action="store_true", help="with --smoke, the GPU script's steps on this CPU")
    return parsed(own, argv, smoke_reps=3)


def compare(call: LayerCall, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Check, time and write one shape, layout and dtype, of the batch norm or what is fused with it."""
    rank, ranks = benchmark.rank, benchmark.args.ranks
    case = make_case(call.plan, benchmark.device, rank, call.fused)
    entrants, errors, refused = variants.right_ones(call, case, cpu_variants(case, rank, ranks, call.fused), rank)
    times = interleave({v.name: partial(repetition, v, case) for v in entrants}, benchmark.args.reps)
    shared = {**benchmark.environment(call), "op": call.op, "mode": "eager", "cache": "", **call.plan.columns()}
    shared["bn_backend"] = bn_backend(case)
    over = {"over_copy": "copy", "over_bn": "nn.BatchNorm"}
    benchmark.write(shared, times, over, "pass", more=lambda key, _: {"error": errors.get(key[0], "")})
    return refused


def cpu_variants(case: Case, rank: int, ranks: int, fused: bool = False) -> list[variants.Variant]:
    """Those of the docstring; without peers, those that need none. nn.BatchNorm adds and applies relu if fused."""
    entrants = [
        variants.copy(),
        variants.variant("nn.BatchNorm", variants.batch_norm(case, fused)),
        variants.variant("syncbn_alone", variants.ours(case, alone(rank, ranks), fused), is_ours=True),
    ]
    if ranks > 1:
        entrants += [variants.variant("syncbn", variants.ours(case, None, fused), "global", True)]
        entrants += [] if fused else [variants.variant("naive_sync", variants.naive_sync(case), "global")]
        entrants += [variants.bare_all_reduce(case)]
    return entrants


@functools.cache
def alone(rank: int, ranks: int) -> Any:
    """The group of this rank only; all ranks make all."""
    return [dist.new_group([r]) for r in range(ranks)][rank]


def repetition(v: variants.Variant, case: Case) -> Sample:
    """Seconds of a forward, the backward after it, and both, on this rank, all ranks starting together."""
    dist.barrier()
    start = time.perf_counter()
    y = v.forward(case)
    middle = time.perf_counter()
    v.backward(case, y)
    end = time.perf_counter()
    return {"forward": middle - start, "backward": end - middle, "both": end - start}


if __name__ == "__main__":
    main()
