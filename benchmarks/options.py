"""The command-line options of all scripts: each is here once, a script names those that it has."""

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import cores, machine_slug
from benchmarks.tables import RESULTS

OPTIONS: dict[str, dict[str, Any]] = {
    "device": {"choices": ("cpu", "cuda"), "help": "default here: %(default)s"},
    "machine": {"help": "name of this machine in rows and file names; default: from its model"},
    "out": {"type": Path, "default": RESULTS, "help": "folder for the CSV"},
    "reps": {"type": int, "help": "repetitions of every variant (default: %(default)s)"},
    "budget": {"type": float, "default": 0, "help": "seconds after which no comparison is started"},
    "append": {"action": "store_true", "help": "add rows to the file instead of starting it anew"},
    "smoke": {"action": "store_true", "help": "tiny shapes: does the script work?"},
    "skip": {"type": int, "default": 0, "help": "comparisons left out at the beginning"},
    "ranks": {"type": int, "default": 2, "help": "gloo processes on CPU (default: %(default)s)"},
    "only": {"default": "", "help": "comparisons whose name contains this, e.g. 8x64x56x56"},
    "compiled": {"action": "store_true", "help": "time torch.compile of nn.BatchNorm, too (GPU)"},
}
TIMING = ("device", "machine", "out", "reps", "budget", "append", "smoke", "skip")


def parser(doc: str | None, *names: str, **defaults: Any) -> argparse.ArgumentParser:
    """One with these of `OPTIONS`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.set_defaults(ranks=1)  # without the option
    if "device" in names:  # else CUDA is not to be touched
        made.set_defaults(device="cuda" if torch.cuda.is_available() else "cpu")
    for name in names:
        made.add_argument(f"--{name}", **OPTIONS[name])
    made.set_defaults(**defaults)
    return made


def parsed(options: argparse.ArgumentParser, argv: list[str] | None, smoke_reps: int) -> argparse.Namespace:
    """Those of a timing script, and as `given` what to start it with again; 0 threads are as many as torch has."""
    args = options.parse_args(argv)
    args.given = list(sys.argv[1:] if argv is None else argv)
    args.reps = min(args.reps, smoke_reps) if args.smoke else args.reps
    args.threads = vars(args).get("threads", 1 if args.smoke else 0)
    return args


def shared_out(threads: int | None, ranks: int) -> int:
    """Threads of each rank: those given, or the cores, shared out."""
    return threads or max(1, cores() // ranks)


def results_path(args: argparse.Namespace) -> Path:
    """<out>/<script>-<machine>.csv"""
    return Path(args.out) / f"{args.script}-{args.machine or machine_slug(torch.device(args.device))}.csv"
