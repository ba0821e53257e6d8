"""How does accuracy depend on the images a rank has in a step, with each norm?

    python -m benchmarks.batch_size             # 60 runs on 2 gloo ranks; --append goes on where an earlier one stopped

Each run is launch/train.py's, on the digits: its model, its learning rate, which is proportional to the images of a
step, and the same number of epochs for all, so that small batches make more steps. In a column of its own is the
accuracy of the same trained model with recomputed statistics, where it has any. The maps are 2×2 from the second norm
on: a norm there has four values a channel of each image that it sees, those of both ranks if it is synchronized.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.harness import Benchmark
from benchmarks.machine import commit, machine_slug
from benchmarks.options import TIMING, parsed, parser, shared_out
from benchmarks.resilience import Budget, agreed

LAUNCH = Path(__file__).parent.parent / "launch"
NORMS = ("batch", "syncbn", "group", "instance")
SIZES = (16, 8, 4, 2, 1)
COLUMNS = ("machine", "torch", "commit", "data", "norm", "seed", "ranks", "batch_per_rank", "epochs")
COLUMNS += ("accuracy", "loss", "recomputed_accuracy", "recomputed_loss")


class Setting(NamedTuple):
    """What tells one run from another."""

    norm: str
    batch_per_rank: int
    seed: int
    epochs: int
    ranks: int


def main(argv: list[str] | None = None) -> None:
    own = parser(__doc__, *TIMING, "ranks", script="batch-size", reps=3)
    own.add_argument("--epochs", type=int, default=4, help="of each run (default: %(default)s)")
    args = parsed(own, argv, smoke_reps=1)
    args.threads, args.device = shared_out(None, args.ranks), "cpu"
    args.machine = args.machine or machine_slug(torch.device("cpu"))
    Benchmark(args, COLUMNS, settings(args), compare, "gloo").run()


def settings(args: argparse.Namespace) -> list[Setting]:
    """All of a seed before the next."""
    sizes, epochs = (SIZES[:1], 1) if args.smoke else (SIZES, args.epochs)
    triples = [(norm, size, seed) for seed in range(args.reps) for size in sizes for norm in NORMS]
    return [Setting(*triple, epochs, args.ranks) for triple in triples]


def compare(setting: Setting, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Train one of them, unless it stands in the file."""
    wanted = {name: str(value) for name, value in setting._asdict().items()}
    if not agreed(any(wanted.items() <= row.items() for row in benchmark.results.rows)):
        row = trained(setting, benchmark)
        if benchmark.rank == 0:
            benchmark.results.add(row | {"machine": benchmark.args.machine})
    return []


def trained(setting: Setting, benchmark: Benchmark) -> dict[str, Any]:
    """The last line of a run's log, on rank 0."""
    if str(LAUNCH) not in sys.path:
        sys.path.insert(0, str(LAUNCH))  # whose scripts import their neighbours by their plain names
    import train
    from data import load
    from ranks import Rank

    norm, size, seed, epochs, ranks = setting
    me = Rank(benchmark.rank, ranks, "gloo", torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        given = ["--norm", norm, "--batch-size", str(size), "--seed", str(seed), "--epochs", str(epochs)]
        given += ["--log-file", str(log), *(["--recompute-statistics"] if norm in ("batch", "syncbn") else [])]
        train.run(load("digits", ""), train.parse(given), me)
        if me.rank:
            return {}
        last = json.loads(log.read_text().splitlines()[-1])
    return {name: last.get(name, "") for name in COLUMNS} | {"commit": commit()}


if __name__ == "__main__":
    main()
