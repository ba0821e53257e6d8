"""How long does a ResNet-50 training step take with each batch norm, with how much memory, launches and host syncs?

    python -m benchmarks.step                    # needs a GPU
    python -m benchmarks.step --smoke --device cpu

One process, autocast to bfloat16, 224² images, cross entropy, SGD with momentum; two batches are stepped through in
turn. All models are alive together and take turns. Comparisons are

    eager      as most train; a slow host may take longer to launch a step than the device to run it
    graph      whole steps as CUDA graphs, which is what the device takes
    compiled   torch.compile of the model with nn.BatchNorm beside it; only with --compiled

and models

    nn.BatchNorm             torch's layer, then torch's add and relu
    nn.SyncBatchNorm.forced  its synchronized path under NCCL, though it has no peer; then add and relu
    syncbn                   ours as a drop-in, then torch's add and relu
    syncbn.fused             ours with add and relu in the layer
    syncbn.fused.forced      the same with all collectives issued under NCCL

Before timing, logits and the first convolution's gradient of a float32 step are held to a float64 model's; a model
that is wrong or fails is reported and left out, and the script fails in the end.
peak_megabytes is what a step allocates at most beyond what was allocated before it: activations, gradients,
workspaces. Launches and host syncs of one step are the CUDA runtime's calls that torch.profiler saw.
"""

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import device_timing
from benchmarks.harness import (
    ENVIRONMENT,
    Budget,
    Results,
    arguments,
    environment,
    interleave,
    ratio,
    results_path,
    summarize,
    timing_columns,
)
from benchmarks.layer_gpu import alone
from benchmarks.resilience import parsed, report, through
from benchmarks.resnet import NORMS, build
from tests.support.oracle import error

COLUMNS = (
    *ENVIRONMENT,
    *("comparison", "model", "batch", "image", "layout", "dtype", "variant", "ms", "ms_p20", "ms_p80", "reps"),
    *("over_bn", "peak_megabytes", "launches", "host_syncs", "error"),
)
SETTINGS = (
    *((32, "channels_last", "eager"), (32, "channels_last", "graph")),
    *((8, "channels_last", "graph"), (8, "channels_last", "eager"), (32, "contiguous", "graph")),
    *((2, "channels_last", "graph"), (2, "channels_last", "eager"), (32, "contiguous", "eager")),
)
"""(batch, layout, comparison)"""
LOGITS, GRADIENT = 1e-3, 5e-2
"""Relative errors allowed to a float32 step after 53 layers; the gradient has come back through all of them."""
LAUNCHES = (
    "cudaLaunchKernel",
    "cudaLaunchKernelExC",
    "cuLaunchKernel",
    "cuLaunchKernelEx",
    "cudaLaunchCooperativeKernel",
)
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize", "cudaMemcpy")

PATIENCE = 90
"""Seconds for a setting, the checks before the first and the profiles after each included."""

RESOURCES = {"peak_megabytes": "", "launches": "", "host_syncs": ""}
"""Of an eager step on a GPU; filled in after the times are written, since a profiler may fail or take long."""

Batch = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """One comparison's batch and layout."""

    batch: int
    image: int
    layout: str
    small: bool
    device: torch.device
    comparison: str = "eager"

    def __str__(self) -> str:
        return f"{self.comparison} batch {self.batch} {self.layout}"

    def batches(self, count: int = 2) -> list[Batch]:
        """(images, labels), random."""
        generator = torch.Generator().manual_seed(1)
        classes = 10 if self.small else 1000
        shape = (self.batch, 3, self.image, self.image)
        images = [torch.randn(shape, generator=generator) for _ in range(count)]
        labels = [torch.randint(classes, (self.batch,), generator=generator).to(self.device) for _ in range(count)]
        return [(_to(x, self.layout, self.device), y) for x, y in zip(images, labels, strict=True)]


def main(argv: list[str] | None = None) -> None:
    parser = arguments(__doc__, reps=10)
    parser.add_argument("--compiled", action="store_true", help="a comparison with torch.compile, at the end (GPU)")
    args = parsed(parser, argv, "step")
    device = torch.device(args.device)
    settings = [Setting(batch, 224, layout, False, device, comparison) for batch, layout, comparison in SETTINGS]
    if args.smoke:
        args.reps = min(args.reps, 2)
        torch.set_num_threads(1)
        settings = [Setting(4, 32, "channels_last", True, device, comparison) for comparison in ("eager", "graph")]
    settings = [setting for setting in settings if device.type == "cuda" or setting.comparison == "eager"]
    if args.compiled:
        settings.append(settings[0]._replace(comparison="compiled"))
    results = Results(results_path(args, "step"), COLUMNS, args.append)
    with alone(device):
        through(settings, partial(compare, args=args, results=results), args, device, PATIENCE)


def names_of(setting: Setting) -> list[str]:
    """The models of a comparison."""
    if setting.comparison == "compiled":
        return ["nn.BatchNorm", "compiled"]
    return [name for name in NORMS if setting.device.type == "cuda" or not name.startswith("nn.Sync")]


@functools.cache
def checked(name: str, small: bool, device: torch.device) -> float | str:
    """The error of the logits of a float32 training step on small images, or what is wrong with it."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        logits, gradient = _outcome(name, torch.float32, small, device)
        wanted, wanted_gradient = _right(small, device)
        off, gradient_off = error(logits, wanted), error(gradient, wanted_gradient)
        if not (off <= LOGITS and gradient_off <= GRADIENT):
            raise AssertionError(f"logits are off by {off:.2e}, the gradient by {gradient_off:.2e}; it is not timed.")
        print(f"{name}: right, off by {off:.1e}", file=sys.stderr, flush=True)
        return off
    except Exception as problem:  # whatever it is, the other models are still to be timed
        return report(name, problem, device)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@functools.cache
def _right(small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    return _outcome("nn.BatchNorm", torch.float64, small, device)


def _outcome(name: str, dtype: torch.dtype, small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the first convolution's weight."""
    images, labels = Setting(8, 64, "contiguous", small, device).batches(1)[0]
    model = build(name, small).to(device, dtype).train()
    logits = model(images.to(dtype))
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), model.conv.weight.grad


def compare(setting: Setting, budget: Budget, args: argparse.Namespace, results: Results) -> list[str]:
    """Time and write one setting's models; the reasons why some were left out."""
    errors = {name: checked(name, setting.small, setting.device) for name in names_of(setting) if name != "compiled"}
    refused = [error for error in errors.values() if isinstance(error, str)]
    names = [name for name in names_of(setting) if not isinstance(errors.get(name), str)]
    batches, steps = setting.batches(), {}

    def maker(name: str, graph: bool) -> device_timing.ByPass:
        steps[name] = make_step(name, setting)
        return {"": device_timing.timer(steps[name], batches, setting.device, graph)}

    makers = {name: partial(maker, name) for name in names}
    is_graph = setting.comparison == "graph"
    device_timing.forget_captures(setting.device)
    running = device_timing.samplers(makers, is_graph, str(setting), setting.device)
    summaries = {name: summarize(seconds) for (name, _), seconds in interleave(running.calls, args.reps, 1).items()}
    shared = {**environment(args.machine, setting.device), "comparison": setting.comparison, "dtype": "bfloat16"}
    shared |= {"model": "smoke" if setting.small else "resnet50", "batch": setting.batch, "image": setting.image}
    rows = {}
    for name, summary in summaries.items():
        row = {**shared, **RESOURCES, "layout": setting.layout, "variant": name, **timing_columns(summary)}
        row["comparison"] += running.marks[name]
        row |= {"over_bn": ratio(summary, summaries.get("nn.BatchNorm")), "error": errors.get(name, "")}
        rows[name] = results.add(row)
    if setting.device.type == "cuda" and not is_graph:
        refused += add_resources(
            rows, {name: partial(steps[name], batches[0]) for name in rows}, setting, budget, results
        )
    return refused + running.failures


def add_resources(
    rows: dict[str, dict[str, str]],
    steps: dict[str, Callable[[], None]],
    setting: Setting,
    budget: Budget,
    results: Results,
) -> list[str]:
    """Fill in what a step of each model costs beside its time; what failed."""
    failures = []
    for name, row in rows.items():
        if budget.spent():
            break
        try:
            results.amend(row, resources(steps[name]))
        except Exception as problem:  # of the profiler, say
            failures.append(report(f"{setting}: resources of {name}", problem, setting.device))
    return failures


def make_step(name: str, setting: Setting) -> Callable[[Batch], None]:
    """A training step of a model of its own, on one batch."""
    model = build("nn.BatchNorm" if name == "compiled" else name, setting.small).to(setting.device).train()
    if setting.layout == "channels_last":
        model = model.to(memory_format=torch.channels_last)
    called = torch.compile(model) if name == "compiled" else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(batch: Batch) -> None:
        images, labels = batch
        optimizer.zero_grad(set_to_none=True)
        # a graph must not meet a cast that was made outside of it; here every weight is cast once a step anyway
        with torch.autocast(setting.device.type, torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()

    return step


def resources(step: Callable[[], None]) -> dict[str, Any]:
    """Memory, launches and host syncs of a step on a GPU."""
    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {"peak_megabytes": peak, **counted(step)}


def counted(step: Callable[[], None]) -> dict[str, int]:
    """Calls of the CUDA runtime during a step, as the profiler names them."""
    profiler = torch.profiler.profile
    # where it can be told to keep its events, it warns that else it does not
    keep = {"acc_events": True} if "acc_events" in inspect.signature(profiler).parameters else {}
    with profiler(activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA], **keep) as p:
        with torch.profiler.record_function("the step"):
            step()
        torch.cuda.synchronize()
    return tally([(e.name, e.time_range.start, e.time_range.end) for e in p.events()])


def tally(events: list[tuple[str, float, float]]) -> dict[str, int]:
    """Launches and syncs among (name, start, end), of those that start within the event named "the step"."""
    start, end = next((start, end) for name, start, end in events if name == "the step")
    names = [name for name, at, _ in events if start <= at <= end]
    return {
        "launches": sum(name in LAUNCHES for name in names),
        "host_syncs": sum(name in SYNCS for name in names),
    }


def _to(images: Tensor, layout: str, device: torch.device) -> Tensor:
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return images.to(device).contiguous(memory_format=memory_format)


if __name__ == "__main__":
    main()
