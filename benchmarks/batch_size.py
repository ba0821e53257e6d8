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
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.harness import Results, arguments, commit, cores, machine_slug, on_ranks, results_path

LAUNCH = Path(__file__).parent.parent / "launch"
NORMS = ("batch", "syncbn", "group", "instance")
SIZES = (16, 8, 4, 2, 1)
COLUMNS = ("machine", "torch", "commit", "data", "norm", "seed", "ranks", "batch_per_rank", "epochs")
COLUMNS += ("accuracy", "loss", "recomputed_accuracy", "recomputed_loss")
SETTING = ("norm", "batch_per_rank", "seed", "epochs", "ranks")
"""Columns that tell one run from another."""


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    on_ranks(run_rank, args)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, reps=3)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=4, help="of each run (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs = args.reps = 1
    args.machine = args.machine or machine_slug(torch.device("cpu"))
    return args


def settings(args: argparse.Namespace) -> list[tuple[str, int, int]]:
    """norm, images a rank, and seed of each run; all of a seed before the next."""
    sizes = SIZES[:1] if args.smoke else SIZES
    return [(norm, size, seed) for seed in range(args.reps) for size in sizes for norm in NORMS]


def run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank's part of every run; rank 0 writes."""
    sys.path.insert(0, str(LAUNCH))  # whose scripts import their neighbours by their plain names
    from ranks import Rank

    torch.set_num_threads(max(1, cores() // args.ranks))
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    me = Rank(rank, args.ranks, "gloo", torch.device("cpu"))
    path = results_path(args, "batch-size")
    path.parent.mkdir(parents=True, exist_ok=True)
    results = Results(path if rank == 0 else None, COLUMNS, args.append)
    done: list[Any] = [[tuple(row[name] for name in SETTING) for row in results.rows]]
    dist.broadcast_object_list(done, 0)
    try:
        for norm, size, seed in settings(args):
            if (norm, *map(str, (size, seed, args.epochs, args.ranks))) not in done[0]:
                row = trained(norm, size, seed, args, me)
                if rank == 0:
                    results.add(row | {"machine": args.machine})
    finally:
        dist.destroy_process_group()


def trained(norm: str, size: int, seed: int, args: argparse.Namespace, me: Any) -> dict[str, Any]:
    """The last line of a run's log, on rank 0."""
    import train
    from data import load

    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.jsonl"
        given = ["--norm", norm, "--batch-size", str(size), "--seed", str(seed), "--epochs", str(args.epochs)]
        given += ["--log-file", str(log), *(["--recompute-statistics"] if norm in ("batch", "syncbn") else [])]
        train.run(load("digits", ""), train.parse(given), me)
        if me.rank:
            return {}
        last = json.loads(log.read_text().splitlines()[-1])
    return {name: last.get(name, "") for name in COLUMNS} | {"commit": commit()}


if __name__ == "__main__":
    main()
