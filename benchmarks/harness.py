"""What every measurement shares: interleaved repetitions, medians, where and with what a row was measured, the CSV.

Times are comparable within one run of one script only, so every row carries its ratio to a baseline of that run.
"""

import argparse
import csv
import datetime
import functools
import gc
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.multiprocessing

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

ENVIRONMENT = ("date", "commit", "machine", "device", "clocks", "torch", "triton", "ranks", "threads")
"""Columns of every timing row, before the script's own."""

Sample = Mapping[str, float]
"""Seconds by pass, e.g. {"forward": …, "backward": …, "both": …}."""


class Summary(NamedTuple):
    """Milliseconds: the median and the 20th and 80th percentile of `reps` repetitions."""

    median: float
    p20: float
    p80: float
    reps: int


def summarize(seconds: list[float]) -> Summary:
    """Percentiles by linear interpolation between order statistics; no repetition is left out."""
    ms = sorted(1e3 * s for s in seconds)
    return Summary(statistics.median(ms), _percentile(ms, 0.2), _percentile(ms, 0.8), len(ms))


def _percentile(ordered: list[float], fraction: float) -> float:
    at = fraction * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def interleave(
    samplers: Mapping[str, Callable[[], Sample]], reps: int, warmup: int = 3
) -> dict[tuple[str, str], list[float]]:
    """Seconds by (variant, pass): `reps` rounds, each of one repetition of every variant.

    The variants take turns, so that a slow second of the machine hits all of them, and the order turns from round to
    round, so that none always runs in the wake of the same other. The garbage collector waits.
    """
    times: dict[tuple[str, str], list[float]] = {}
    names = list(samplers)
    for _ in range(warmup):
        for name in names:
            samplers[name]()
    gc.collect()
    gc.disable()
    try:
        for rep in range(reps):
            turn = rep % max(1, len(names))
            for name in names[turn:] + names[:turn]:
                for phase, seconds in samplers[name]().items():
                    times.setdefault((name, phase), []).append(seconds)
    finally:
        gc.enable()
    return times


class Results:
    """A CSV file that is whole after every row: a run cut short leaves the rows measured until then."""

    def __init__(self, path: Path | None, columns: Iterable[str], append: bool = False) -> None:
        self.path, self.columns = path, list(columns)
        self.rows: list[dict[str, Any]] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            check_columns(path, self.columns)
            self.rows = read_rows(path)
        self._write_all()

    def add(self, row: Mapping[str, Any]) -> dict[str, str]:
        """Write one row, and return it as written; its keys must be the columns, all of them."""
        if set(row) != set(self.columns):
            raise ValueError(f"A row has the columns of its file; {set(row) ^ set(self.columns)} is in one only.")
        shown = {key: _shown(value) for key, value in row.items()}
        self.rows.append(shown)
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(shown)
        return shown

    def amend(self, row: dict[str, str], values: Mapping[str, Any]) -> None:
        """Write a row that was added once more, with what was found out since."""
        row.update({key: _shown(value) for key, value in values.items()})
        self._write_all()

    def _write_all(self) -> None:
        """The file as a whole, put in the place of the last one."""
        if self.path is not None:
            new = self.path.with_suffix(".new")
            with new.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            new.replace(self.path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_columns(path: Path, columns: Iterable[str]) -> None:
    """Raise unless the file's header is these columns in this order."""
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(columns):
        raise ValueError(f"{path} has the columns {header}, not {list(columns)}. Write to another file.")


def _shown(value: Any) -> str:
    """Four significant digits for a float: more is noise."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def timing_columns(summary: Summary) -> dict[str, Any]:
    """The four columns that a summary fills."""
    return {"ms": summary.median, "ms_p20": summary.p20, "ms_p80": summary.p80, "reps": summary.reps}


def ratio(summary: Summary, baseline: Summary | None) -> float | str:
    """Median over the baseline's median in the same run; empty without one."""
    return summary.median / baseline.median if baseline is not None and baseline.median > 0 else ""


class Budget:
    """Wall-clock seconds that a script may use; 0 is no limit."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds if seconds > 0 else float("inf")

    def left(self) -> float:
        return self.end - time.monotonic()

    def spent(self) -> bool:
        return self.left() <= 0


def environment(machine: str | None, device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """The `ENVIRONMENT` columns of a row measured now."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine or machine_slug(device),
        "device": device_name(device),
        "clocks": clocks() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
    }


@functools.cache
def commit() -> str:
    """Short hash of what was measured, '+dirty' if a tracked file other than a result differs; or $COMMIT."""
    given = os.environ.get("COMMIT")
    if given:
        return given
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return head + ("+dirty" if _output("git", "-C", str(ROOT), *status) else "")


def device_name(device: torch.device) -> str:
    """The model name of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        model = found.group(1).strip() if found else model
    return f"{model} ({cores()} cores)"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_slug(device: torch.device) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


_without_clocks: list[str] = []


def clocks() -> str:
    """SM and memory clock in MHz, now and at most, as nvidia-smi tells them; empty without it.

    Where it does not answer it is not asked again: waiting for it before every comparison would cost most of them.
    """
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    query = ("nvidia-smi", "-i", str(torch.cuda.current_device()), f"--query-gpu={fields}")
    line = "" if _without_clocks else _output(*query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in line.split(",")]
    if len(values) != 4:
        _without_clocks.append(line)
        return ""
    return "sm {} mem {} max {} {}".format(*values)


def triton_version() -> str:
    """Of the installed triton, empty without one; it is not imported."""
    from importlib import metadata

    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Standard output, stripped; empty if the command fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def arguments(description: str | None, reps: int) -> argparse.ArgumentParser:
    """The options that every timing script has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default, choices=("cpu", "cuda"), help=f"default here: {default}")
    parser.add_argument("--machine", help="name of this machine in rows and file names; default: from its model")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the CSV")
    parser.add_argument("--reps", type=int, default=reps, help="repetitions of every variant")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no comparison is started")
    parser.add_argument("--append", action="store_true", help="add rows to the file instead of starting it anew")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes: does the script work?")
    return parser


def on_ranks(run_rank: Callable[[int, str, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """run_rank(rank, store, args) in args.ranks processes, this one if it is one; store is where they meet."""
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        if args.ranks == 1:
            run_rank(0, store, args)
        else:
            torch.multiprocessing.spawn(run_rank, (store, args), nprocs=args.ranks)


def results_path(args: argparse.Namespace, script: str) -> Path:
    """<out>/<script>-<machine>.csv"""
    return Path(args.out) / f"{script}-{args.machine or machine_slug(torch.device(args.device))}.csv"
