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
import contextlib
import os
import re
import tempfile
import time
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch._dynamo.utils
import torch.distributed as dist
from torch import nn
from torch._inductor.graph import GraphLowering
from torch.nn import functional as F

from benchmarks.harness import (
    ENVIRONMENT,
    Budget,
    Results,
    Sample,
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
from benchmarks.layer import agreed, say, slowest
from benchmarks.resilience import report
from benchmarks.resnet import NORMS, ResNet50
from benchmarks.step import GRADIENT, LOGITS, Batch
from tests.support.oracle import error
from tests.support.ranks import Collectives

COLUMNS = (
    *ENVIRONMENT,
    *("model", "batch", "image", "layout", "dtype", "variant", "mode", "ms", "ms_p20", "ms_p80", "reps"),
    *("over_bn", "over_eager", "first_seconds", "graphs", "graph_breaks", "kernels", "collectives", "error"),
)
"""over_bn: median over nn.BatchNorm's in the same mode; over_eager: over the same norm's, eager."""

VARIANTS = ("nn.BatchNorm", "syncbn", "syncbn.fused")
MODES = ("eager", "compiled")


class Setting(NamedTuple):
    """One comparison: its batch on each rank, its layout, and where."""

    batch: int
    image: int
    layout: str
    width: int
    blocks: tuple[int, ...]
    compiler: str
    device: torch.device
    ranks: int

    def __str__(self) -> str:
        return f"batch {self.batch} {self.layout}"

    def model(self, variant: str) -> ResNet50:
        """The same weights for every variant."""
        torch.manual_seed(0)
        model = ResNet50(NORMS[variant], classes=10, width=self.width, blocks=self.blocks).to(self.device)
        return model.to(memory_format=_format(self.layout)).train()

    def data(self, rank: int) -> Batch:
        """A rank's images and labels, the same wherever they are made."""
        generator = torch.Generator().manual_seed(1 + rank)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(10, (self.batch,), generator=generator)
        return images.to(self.device).contiguous(memory_format=_format(self.layout)), labels.to(self.device)


def main(argv: list[str] | None = None) -> None:
    args = options(argv)
    if args.device == "cuda":
        args.ranks = 1
    results_path(args, "compile").parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        if not args.smoke:
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = empty
        on_ranks(run_rank, args)


def options(argv: list[str] | None) -> argparse.Namespace:
    parser = arguments(__doc__, reps=30)
    parser.add_argument("--ranks", type=int, default=2, help="gloo processes (CPU)")
    args = parser.parse_args(argv)
    if args.smoke:
        args.reps = min(args.reps, 2)
    return args


def run_rank(rank: int, store: str, args: argparse.Namespace) -> None:
    """One rank's part of every comparison; rank 0 writes."""
    device = torch.device(args.device)
    torch.set_num_threads(max(1, cores() // args.ranks))
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # the check is in float32
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    try:
        results = Results(results_path(args, "compile") if rank == 0 else None, COLUMNS, args.append)
        budget, failures = Budget(args.budget), []
        for setting in settings(args, device):
            failures += compare(setting, rank, budget, args, results)
            say(rank, f"{setting}: done")
        if failures:
            raise SystemExit("\n".join(failures))
    finally:
        dist.destroy_process_group()


def settings(args: argparse.Namespace, device: torch.device) -> list[Setting]:
    if args.smoke:
        return [Setting(2, 32, "contiguous", 4, (1,), "aot_eager", device, args.ranks)]
    if device.type == "cuda":  # shallow, since on a GPU the check and the step are compiled apart
        return [Setting(64, 224, "channels_last", 64, (1, 1), "inductor", device, args.ranks)]
    shared = (16, (1, 1, 1, 1), "inductor", device, args.ranks)
    return [Setting(8, 64, layout, *shared) for layout in ("contiguous", "channels_last")]


Key = tuple[str, str]
"""variant, mode"""


def rounds(with_budget: bool) -> list[list[Key]]:
    """Who takes turns with whom: all with all; with a budget, what compiles with its own baselines only."""
    if not with_budget:
        return [[(variant, mode) for variant in VARIANTS for mode in MODES]]
    eager = [(variant, "eager") for variant in VARIANTS]
    compiled = [[("nn.BatchNorm", "compiled"), (v, "eager"), (v, "compiled")] for v in reversed(VARIANTS[1:])]
    return [eager, [("nn.BatchNorm", mode) for mode in MODES], *compiled]


def compare(setting: Setting, rank: int, budget: Budget, args: argparse.Namespace, results: Results) -> list[str]:
    """Check, time and write one setting; what failed."""
    torch.compiler.reset()
    entrants: dict[Key, Entrant] = {}
    failures: list[str] = []
    for keys in rounds(args.budget > 0):
        if agreed(budget.spent()):
            say(rank, f"out of time: {setting} skipped with {' '.join(keys[-1])}")
            continue
        new = [key for key in keys if key not in entrants]
        failures += enter(new, entrants, setting, rank)
        samplers = {key: partial(repetition, entrants[key]) for key in keys if key in entrants}
        times = slowest(interleave(samplers, args.reps))
        summaries = {key: summarize(seconds) for (key, _), seconds in times.items()}
        shared = {**environment(args.machine, setting.device, setting.ranks), **columns(setting)}
        for variant, mode in new:
            summary = summaries.get((variant, mode))
            if summary is not None:
                row = {**shared, "variant": variant, "mode": mode, **timing_columns(summary)}
                row |= {"over_bn": ratio(summary, summaries.get(("nn.BatchNorm", mode)))}
                row |= {"over_eager": ratio(summary, summaries.get((variant, "eager")))}
                results.add({**row, **entrants[variant, mode].found})
    return failures


def enter(keys: list[Key], entrants: "dict[Key, Entrant]", setting: Setting, rank: int) -> list[str]:
    """Make and check those; what failed, where no other rank waits for it."""
    failures = []
    for key in keys:
        try:
            entrants[key] = Entrant(*key, setting, rank)
            say(rank, f"{' '.join(key)}: right, first pass {entrants[key].found['first_seconds']:.1f} s")
        except Exception as problem:  # a compiler's, say: the others are still to be timed
            if setting.ranks > 1:
                raise
            failures.append(report(" ".join(key), problem, setting.device))
    return failures


def columns(setting: Setting) -> dict[str, Any]:
    """The setting in a row."""
    dtype = "bfloat16" if setting.device.type == "cuda" else "float32"
    shared: dict[str, Any] = {"model": f"resnet {setting.width} x {len(setting.blocks)}", "dtype": dtype}
    return shared | {"batch": setting.batch, "image": setting.image, "layout": setting.layout}


class Entrant:
    """A model with its optimizer; `found` is what its check and its first passes told."""

    def __init__(self, variant: str, mode: str, setting: Setting, rank: int) -> None:
        self.variant, self.setting, self.rank = variant, setting, rank
        self.batch, self.model = setting.data(rank), setting.model(variant)
        self.called = called(self.model, mode, setting.compiler)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
        self.found: dict[str, Any] = {"graphs": "", "graph_breaks": "", "kernels": ""}
        for first in (self.check, self.step):  # on a GPU a step is under autocast: another graph
            codes: list[str] = []
            start = time.perf_counter()
            with mock.patch.object(GraphLowering, "save_output_code", codes.append):
                first()
            if first == self.check or codes:
                self.found["first_seconds"] = time.perf_counter() - start
                self.found["kernels"] = sum(map(generated_calls, codes)) if mode == "compiled" else ""
        if mode == "compiled":
            counters = torch._dynamo.utils.counters
            self.found["graphs"] = counters["stats"]["unique_graphs"]
            self.found["graph_breaks"] = sum(counters["graph_break"].values())
        with Collectives() as collectives:
            self.step()
        self.found["collectives"] = collectives.count

    def step(self) -> None:
        images, labels = self.batch
        self.optimizer.zero_grad(set_to_none=True)
        on_gpu = self.setting.device.type == "cuda"
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
            loss = F.cross_entropy(self.called(images), labels)
        loss.backward()
        self.optimizer.step()

    def check(self) -> None:
        """Note the larger relative error of a float32 pass's logits and first gradient; raise if it is too large."""
        setting, rank = self.setting, self.rank
        ranks = [rank] if self.variant == "nn.BatchNorm" else list(range(setting.ranks))
        images, labels = self.batch
        logits = self.called(images)
        F.cross_entropy(logits, labels, reduction="sum").backward()
        gradient = self.model.conv.weight.grad.double()
        if len(ranks) > 1:
            dist.all_reduce(gradient)
        right, data = setting.model("nn.BatchNorm").double(), [setting.data(r) for r in ranks]
        every = right(torch.cat([x for x, _ in data]).double())
        F.cross_entropy(every, torch.cat([y for _, y in data]), reduction="sum").backward()
        mine = every.detach().split(setting.batch)[ranks.index(rank)]
        off = error(logits, mine), error(gradient, right.conv.weight.grad)
        if not (off[0] <= LOGITS and off[1] <= GRADIENT):
            raise AssertionError(f"{self.variant}: logits off by {off[0]:.1e}, gradient {off[1]:.1e}; it is not timed.")
        self.found["error"] = max(off)


def called(model: nn.Module, mode: str, compiler: str) -> nn.Module:
    """The model as it is called, with Dynamo's counters at 0."""
    if mode == "eager":
        return model
    torch._dynamo.utils.counters.clear()
    compiled: nn.Module = torch.compile(model, fullgraph=True, backend=compiler)
    return compiled


def generated_calls(code: str) -> int:
    """Calls of generated kernels in a graph's wrapper."""
    return len(re.findall(r"^ +(?:cpp_fused\w*\(|triton_\w+\.run\()", code, re.MULTILINE))


def repetition(entrant: Entrant) -> Sample:
    """Seconds of a step on this rank, all ranks starting together."""
    cuda = entrant.setting.device.type == "cuda"
    dist.barrier()
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    entrant.step()
    if cuda:
        torch.cuda.synchronize()
    return {"step": time.perf_counter() - start}


def _format(layout: str) -> torch.memory_format:
    return torch.channels_last if layout == "channels_last" else torch.contiguous_format


if __name__ == "__main__":
    main()
