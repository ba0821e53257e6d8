"""How long does a training step take compiled, with each batch norm, and how much of it is left to Python?

    python -m benchmarks.compile                     # on CPU: 2 gloo ranks, one thread each on two cores
    python -m benchmarks.compile --ranks 1 --append  # one process with all cores
    python -m benchmarks.compile --device cuda       # one process on a GPU, bfloat16 autocast

A small ResNet (the blocks of ResNet-50, one a stage, a quarter as wide), cross entropy, SGD with momentum; gradients
are not averaged over the ranks, so that their only collectives are the batch norms'.

    nn.BatchNorm   torch's layer on each rank's own batch, then torch's add and relu
    syncbn         ours over all ranks, as a drop-in
    syncbn.fused   ours with add and relu in the layer

each eager and under torch.compile(fullgraph=True), from an empty cache. All take turns in the same processes; with
--budget there are several rounds, the eager models' first, and rows after each, since compilers may outlast it.
Before timing, logits and the first convolution's gradient are held to a float64 model of all that is synchronised.
first_seconds is the first pass, compilation and all; kernels are calls of generated code in a step, convolutions and
collectives apart; graph_breaks and graphs are Dynamo's counts: on a GPU one graph for the check, in float32, and one
for the step. --smoke generates no code.
"""

import argparse
import os
import tempfile
from functools import partial
from typing import Any

import torch

from benchmarks.compile_models import Entrant
from benchmarks.harness import Benchmark, Key, by_key, interleave
from benchmarks.options import TIMING, parsed, parser, shared_out
from benchmarks.resilience import DAY, Budget, agreed, attempt, say
from benchmarks.tables import ENVIRONMENT, TIMES, Summary
from benchmarks.training import FORMATS, Setting

COLUMNS = (
    *(*ENVIRONMENT, "model", "batch", "image", "layout", "dtype", "variant", "mode", *TIMES),
    *("over_bn", "over_eager", "first_seconds", "graphs", "graph_breaks", "kernels", "collectives", "error"),
)
"""over_bn: median over nn.BatchNorm's in the same mode; over_eager: over the same norm's, eager."""

VARIANTS = ("nn.BatchNorm", "syncbn", "syncbn.fused")
MODES = ("eager", "compiled")


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__, *TIMING, "ranks", script="compile", reps=30), argv, smoke_reps=2)
    args.ranks = 1 if args.device == "cuda" else args.ranks
    args.threads = shared_out(None, args.ranks)
    with tempfile.TemporaryDirectory() as empty:
        if not args.smoke:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        Benchmark(args, COLUMNS, settings(args), compare, "gloo", patience=DAY).run()


def settings(args: argparse.Namespace) -> list[Setting]:
    device = torch.device(args.device)
    if args.smoke:
        return [Setting(2, 32, "contiguous", device, 4, (1,), classes=10)]
    if device.type == "cuda":  # shallow, since on a GPU the check and the step are compiled apart
        return [Setting(64, 224, "channels_last", device, 64, (1, 1), classes=10)]
    return [Setting(8, 64, layout, device, 16, (1, 1, 1, 1), classes=10) for layout in FORMATS]


def rounds(with_budget: bool) -> list[list[Key]]:
    """Who takes turns with whom: all with all; with a budget, what compiles with its own baselines only."""
    if not with_budget:
        return [[(variant, mode) for variant in VARIANTS for mode in MODES]]
    eager = [(variant, "eager") for variant in VARIANTS]
    compiled = [[("nn.BatchNorm", "compiled"), (v, "eager"), (v, "compiled")] for v in reversed(VARIANTS[1:])]
    return [eager, [("nn.BatchNorm", mode) for mode in MODES], *compiled]


def compare(setting: Setting, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Check, time and write one setting; what failed."""
    torch.compiler.reset()
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the check is in float32
    args, entrants = benchmark.args, dict[Key, Entrant]()
    failures: list[str] = []
    model, dtype = f"resnet {setting.width} x {len(setting.blocks)}", "bfloat16" if args.device == "cuda" else "float32"
    for keys in rounds(args.budget > 0):
        if agreed(budget.spent()):
            say(f"out of time: {setting} skipped with {' '.join(keys[-1])}")
            continue
        new = [key for key in keys if key not in entrants]
        for key in new:
            make = partial(Entrant, *key, setting, "aot_eager" if args.smoke else "inductor", benchmark.rank)
            entrant = attempt(" ".join(key), make, setting.device, failures)
            if entrant is not None:
                entrants[key] = entrant
                say(f"{' '.join(key)}: right, first pass {entrant.found['first_seconds']:.1f} s")
        times = interleave({key: entrants[key].repetition for key in keys if key in entrants}, args.reps)

        def more(key: Key, summaries: dict[Key, Summary], new: list[Key] = new) -> dict[str, Any] | None:
            over_eager = summaries[key].over(summaries.get((key[0], "eager")))
            return {**entrants[key].found, "over_eager": over_eager} if key in new else None

        shared = {**benchmark.environment((setting, *keys)), **setting.columns(), "model": model, "dtype": dtype}
        benchmark.write(shared, by_key(times), {"over_bn": "nn.BatchNorm"}, "mode", more=more)
    return failures


if __name__ == "__main__":
    main()
