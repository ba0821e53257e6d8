"""What every measurement shares: jobs on ranks, comparisons in turn, a row for each variant with its ratios.

A script says its question, its inputs, its variants and its columns. Times are comparable within one run of one script
only, so every row carries its ratio to a baseline of that run.
"""

import argparse
import functools
import gc
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

from benchmarks.machine import environment
from benchmarks.options import results_path
from benchmarks.resilience import PATIENCE, Budget, ranks, through
from benchmarks.tables import Results, Row, Summary, summarize

Sample = Mapping[str, float]
"""Seconds by pass, e.g. {"forward": …, "backward": …, "both": …}."""
Key = tuple[str, str]
"""(variant, pass)"""
Times = dict[Key, list[float]]
"""Seconds of each repetition."""

Compare = Callable[[Any, Budget, "Benchmark"], list[str]]
"""compare(job, budget, benchmark) checks, times and writes one job; it returns why variants were left out."""


@dataclass
class Benchmark:
    """A script at work: its jobs in args.ranks processes, in a default group with this back-end if one is named."""

    args: argparse.Namespace
    columns: Sequence[str]
    jobs: Sequence[Any]
    compare: Compare
    group: str | None = None
    patience: float = PATIENCE
    rank = 0

    def run(self) -> None:
        """All of it; in this process if it is one."""
        with tempfile.TemporaryDirectory() as folder:
            store = str(Path(folder) / "store")
            if self.args.ranks == 1:
                self.on_rank(0, store)
            else:
                torch.multiprocessing.spawn(self.on_rank, (store,), nprocs=self.args.ranks)

    def on_rank(self, rank: int, store: str) -> None:
        """One rank's part; the first one writes."""
        self.rank = rank
        if self.args.threads:
            torch.set_num_threads(self.args.threads)
        if self.group:
            place = {"init_method": f"file://{store}", "rank": rank, "world_size": self.args.ranks}
            dist.init_process_group(self.group, **place)
        try:
            path = results_path(self.args) if rank == 0 else None
            self.results = Results(path, self.columns, self.args.append)
            through(self.jobs, functools.partial(self.compare, benchmark=self), self.args, self.device, self.patience)
        finally:
            if self.group:
                dist.destroy_process_group()

    @property
    def device(self) -> torch.device:
        return torch.device(self.args.device)

    def environment(self, what: Any = None) -> dict[str, Any]:
        """Of what is measured; nvidia-smi, which may take a second, is asked once for all rows of the same."""
        return _environment(what, self.args.machine, self.device, self.args.ranks)

    def write(
        self,
        shared: Mapping[str, Any],
        times: Times,
        over: Mapping[str, str],
        phase: str = "",
        unit: str = "ms",
        more: Callable[[Key, dict[Key, Summary]], Mapping[str, Any] | None] = lambda key, summaries: {},
    ) -> dict[Key, Row]:
        """A row for each variant and pass, losers too.

        `over` names the baselines of columns, phase the column of the passes; more are columns of one row, or None
        where it is not to be written.
        """
        summaries, written = {key: summarize(seconds) for key, seconds in times.items()}, {}
        for key, summary in summaries.items():
            if (own := more(key, summaries)) is None:
                continue
            variant, at = key
            row = {**shared, "variant": variant, **summary.columns(unit), **({phase: at} if phase else {})}
            row |= {column: summary.over(summaries.get((baseline, at))) for column, baseline in over.items()}
            written[key] = self.results.add({**row, **own})
        return written


@functools.lru_cache(maxsize=1)
def _environment(what: Any, machine: str | None, device: torch.device, ranks: int) -> dict[str, Any]:
    return environment(machine, device, ranks)


def interleave(samplers: Mapping[str, Callable[[], Sample]], reps: int, warmup: int = 3) -> Times:
    """Seconds by (variant, pass): `reps` rounds, each of one repetition of every variant.

    The variants take turns, so that a slow second of the machine hits all of them, and the order turns from round to
    round, so that none always runs in the wake of the same other. The garbage collector waits.
    """
    times: Times = {}
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
    return slowest(times)


def slowest(times: Times) -> Times:
    """Each repetition's time on the rank where it took longest."""
    if ranks() == 1 or not times:
        return times
    t = torch.tensor(list(times.values()), dtype=torch.float64)
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return dict(zip(times, t.tolist(), strict=True))


def by_key(times: Mapping[Any, list[float]]) -> Times:
    """Those of samplers that are named (variant, pass) and have one pass each."""
    return {key: seconds for (key, _), seconds in times.items()}
