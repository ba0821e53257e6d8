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

import functools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import device_timing
from benchmarks.harness import Benchmark
from benchmarks.options import TIMING, parsed, parser
from benchmarks.resilience import Budget, report, say
from benchmarks.resnet import NORMS, build
from benchmarks.resources import RESOURCES, add_resources
from benchmarks.tables import ENVIRONMENT, TIMES
from benchmarks.training import FORMATS, Batch, hold, outcome, random_batch, stepper

COLUMNS = (
    *(*ENVIRONMENT, "comparison", "model", "batch", "image", "layout", "dtype", "variant", *TIMES),
    *("over_bn", "peak_megabytes", "launches", "host_syncs", "error"),
)
SETTINGS = (
    *((32, "channels_last", "eager"), (32, "channels_last", "graph")),
    *((8, "channels_last", "graph"), (8, "channels_last", "eager"), (32, "contiguous", "graph")),
    *((2, "channels_last", "graph"), (2, "channels_last", "eager"), (32, "contiguous", "eager")),
)
"""(batch, layout, comparison)"""
PATIENCE = 90
"""Seconds for a setting, the checks before the first and the profiles after each included."""


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
        given = (self.batch, self.image, 10 if self.small else 1000, self.layout, self.device)
        return [random_batch(*given, seed=1 + at) for at in range(count)]


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__, *TIMING, "compiled", script="step", reps=10), argv, smoke_reps=2)
    device = torch.device(args.device)
    settings = [Setting(batch, 224, layout, False, device, comparison) for batch, layout, comparison in SETTINGS]
    if args.smoke:
        settings = [Setting(4, 32, "channels_last", True, device, comparison) for comparison in ("eager", "graph")]
    settings = [setting for setting in settings if device.type == "cuda" or setting.comparison == "eager"]
    if args.compiled:
        settings.append(settings[0]._replace(comparison="compiled"))
    group = "nccl" if args.device == "cuda" else "gloo"
    Benchmark(args, COLUMNS, settings, compare, group, PATIENCE).run()


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
        off, _ = hold(_outcome(name, torch.float32, small, device), _right(small, device))
        say(f"{name}: right, off by {off:.1e}")
        return off
    except Exception as problem:  # whatever it is, the other models are still to be timed
        return report(name, problem, device)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


@functools.cache
def _right(small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    return _outcome("nn.BatchNorm", torch.float64, small, device)


def _outcome(name: str, dtype: torch.dtype, small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    images, labels = Setting(8, 64, "contiguous", small, device).batches(1)[0]
    model = build(name, small).to(device, dtype).train()
    return outcome(model, model, images.to(dtype), labels, "mean")


def compare(setting: Setting, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Time and write one setting's models; the reasons why some were left out."""
    device, is_graph = setting.device, setting.comparison == "graph"
    errors = {name: checked(name, setting.small, device) for name in names_of(setting) if name != "compiled"}
    refused = [error for error in errors.values() if isinstance(error, str)]
    names = [name for name in names_of(setting) if not isinstance(errors.get(name), str)]
    batches, steps = setting.batches(), {}

    def maker(name: str, graph: bool) -> device_timing.ByPass:
        steps[name] = make_step(name, setting)
        return {"": device_timing.timer(steps[name], batches, device, graph)}

    makers = {name: partial(maker, name) for name in names}
    times, marks, failures = device_timing.in_turn(makers, is_graph, str(setting), device, benchmark.args.reps)
    shared = {**benchmark.environment(setting), **RESOURCES, "dtype": "bfloat16", "layout": setting.layout}
    shared |= {"model": "smoke" if setting.small else "resnet50", "batch": setting.batch, "image": setting.image}

    modes = {name: setting.comparison + mark for name, mark in marks.items()}
    found = {name: {"comparison": mode, "error": errors.get(name, "")} for name, mode in modes.items()}
    written = benchmark.write(shared, times, {"over_bn": "nn.BatchNorm"}, more=lambda key, _: found[key[0]])
    if device.type == "cuda" and not is_graph:
        rows = {name: row for (name, _), row in written.items()}
        once = {name: partial(steps[name], batches[0]) for name in rows}
        refused += add_resources(rows, once, str(setting), device, budget, benchmark.results)
    return refused + failures


def make_step(name: str, setting: Setting) -> Callable[[Batch], None]:
    """A training step of a model of its own, on one batch."""
    model = build("nn.BatchNorm" if name == "compiled" else name, setting.small).to(setting.device).train()
    model = model.to(memory_format=FORMATS[setting.layout])
    # a graph must not meet a cast that was made outside of it; here every weight is cast once a step anyway
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, cache_enabled=False)
    return stepper(model, torch.compile(model) if name == "compiled" else model, autocast)


if __name__ == "__main__":
    main()
