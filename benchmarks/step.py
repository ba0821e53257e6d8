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

from benchmarks import device_timing
from benchmarks.harness import Benchmark
from benchmarks.options import TIMING, parsed, parser
from benchmarks.resilience import Budget, report, say
from benchmarks.resnet import NORMS
from benchmarks.resources import RESOURCES, add_resources
from benchmarks.tables import ENVIRONMENT, TIMES
from benchmarks.training import Batch, Setting, check, stepper

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


class Job(NamedTuple):
    """One comparison of the models."""

    setting: Setting
    comparison: str

    def __str__(self) -> str:
        return f"{self.comparison} {self.setting}"

    def names(self) -> list[str]:
        """Of the models."""
        if self.comparison == "compiled":
            return ["nn.BatchNorm", "compiled"]
        return [name for name in NORMS if self.setting.device.type == "cuda" or not name.startswith("nn.Sync")]


def main(argv: list[str] | None = None) -> None:
    args = parsed(parser(__doc__, *TIMING, "compiled", script="step", reps=10), argv, smoke_reps=2)
    device = torch.device(args.device)
    jobs = [Job(Setting(batch, 224, layout, device), comparison) for batch, layout, comparison in SETTINGS]
    if args.smoke:
        small = Setting(4, 32, "channels_last", device, width=8, blocks=(1, 1, 1, 1), classes=10)
        jobs = [Job(small, "eager"), Job(small, "graph")]
    jobs = [job for job in jobs if device.type == "cuda" or job.comparison == "eager"]
    if args.compiled:
        jobs.append(jobs[0]._replace(comparison="compiled"))
    Benchmark(args, COLUMNS, jobs, compare, "nccl" if args.device == "cuda" else "gloo", PATIENCE).run()


@functools.cache
def checked(name: str, setting: Setting) -> float | str:
    """The error of the logits of a float32 training step, or what is wrong with it."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        model = setting.model(name)
        off, _ = check(setting, name, model, model)
        say(f"{name}: right, off by {off:.1e}")
        return off
    except Exception as problem:  # whatever it is, the other models are still to be timed
        return report(name, problem, setting.device)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32


def compare(job: Job, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Time and write one setting's models; the reasons why some were left out."""
    setting, comparison = job
    device, is_graph = setting.device, comparison == "graph"
    tiny = setting._replace(batch=8, image=64, layout="contiguous")
    errors = {name: checked(name, tiny) for name in job.names() if name != "compiled"}
    refused = [error for error in errors.values() if isinstance(error, str)]
    batches, steps = [setting.data(seed) for seed in range(2)], {}

    def maker(name: str, graph: bool) -> device_timing.ByPass:
        steps[name] = make_step(name, setting)
        return {"": device_timing.timer(steps[name], batches, device, graph)}

    makers = {name: partial(maker, name) for name in job.names() if not isinstance(errors.get(name), str)}
    times, marks, failures = device_timing.in_turn(makers, is_graph, str(job), device, benchmark.args.reps)
    model = "resnet50" if setting.width == 64 else "smoke"
    shared = {**benchmark.environment(job), **RESOURCES, **setting.columns(), "dtype": "bfloat16", "model": model}
    found = {name: {"comparison": comparison + mark, "error": errors.get(name, "")} for name, mark in marks.items()}
    written = benchmark.write(shared, times, {"over_bn": "nn.BatchNorm"}, more=lambda key, _: found[key[0]])
    if device.type == "cuda" and not is_graph:
        rows = {name: row for (name, _), row in written.items()}
        once = {name: partial(steps[name], batches[0]) for name in rows}
        refused += add_resources(rows, once, str(job), device, budget, benchmark.results)
    return refused + failures


def make_step(name: str, setting: Setting) -> Callable[[Batch], None]:
    """A training step of a model of its own, on one batch."""
    model = setting.model("nn.BatchNorm" if name == "compiled" else name)
    # a graph must not meet a cast that was made outside of it; here every weight is cast once a step anyway
    autocast = partial(torch.autocast, setting.device.type, torch.bfloat16, cache_enabled=False)
    return stepper(model, torch.compile(model) if name == "compiled" else model, autocast)


if __name__ == "__main__":
    main()
