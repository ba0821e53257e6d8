"""How long does a ResNet-50 training step take with each batch norm, with how much memory, launches and host syncs?

    python -m benchmarks.step                    # needs a GPU
    python -m benchmarks.step --smoke --device cpu

One process, autocast to bfloat16, 224² images, cross entropy, SGD with momentum; two batches are stepped through in
turn. All models are alive together and take turns, except torch.compile's, which has a comparison of its own.

    nn.BatchNorm             torch's layer, then torch's add and relu
    nn.SyncBatchNorm.forced  its synchronized path under NCCL, though it has no peer; then add and relu
    syncbn                   ours as a drop-in, then torch's add and relu
    syncbn.fused             ours with add and relu in the layer
    syncbn.fused.forced      the same with all collectives issued under NCCL
    compiled                 torch.compile of the model with nn.BatchNorm

Before timing, logits and the first convolution's gradient of a float32 step are held to a float64 model's.
peak_megabytes is what a step allocates at most beyond what was allocated before it: activations, gradients,
workspaces. Launches and host syncs of one step are the CUDA runtime's calls that torch.profiler saw.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
from benchmarks.resnet import NORMS, build
from tests.oracle import error

COLUMNS = (
    *ENVIRONMENT,
    *("comparison", "model", "batch", "image", "layout", "dtype", "variant", "ms", "ms_p20", "ms_p80", "reps"),
    *("over_bn", "peak_megabytes", "launches", "host_syncs", "error"),
)
SETTINGS = ((32, "channels_last"), (8, "channels_last"), (2, "channels_last"), (32, "contiguous"))
COMPILE_SECONDS = 75
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

Batch = tuple[Tensor, Tensor]


class Setting(NamedTuple):
    """One comparison's batch and layout."""

    batch: int
    image: int
    layout: str
    small: bool
    device: torch.device

    def batches(self, count: int = 2) -> list[Batch]:
        """(images, labels), random."""
        torch.manual_seed(1)
        classes = 10 if self.small else 1000
        shape = (self.batch, 3, self.image, self.image)
        return [
            (_to(torch.randn(shape), self.layout, self.device), torch.randint(classes, (self.batch,)).to(self.device))
            for _ in range(count)
        ]


def main(argv: list[str] | None = None) -> None:
    args = arguments(__doc__, reps=10).parse_args(argv)
    device = torch.device(args.device)
    settings = [Setting(batch, 224, layout, False, device) for batch, layout in SETTINGS]
    if args.smoke:
        args.reps = min(args.reps, 2)
        torch.set_num_threads(1)
        settings = [Setting(4, 32, "channels_last", True, device)]
    results = Results(results_path(args, "step"), COLUMNS, args.append)
    budget = Budget(args.budget)
    names = [name for name in NORMS if device.type == "cuda" or not name.startswith("nn.Sync")]
    with alone(device):
        errors = {name: checked(name, args.smoke, device) for name in names}
        for at, setting in enumerate(settings):
            if budget.spent():
                print(f"out of time: {len(settings) - at} settings skipped", file=sys.stderr)
                break
            compare(setting, "eager", names, errors, args, results)
        if device.type == "cuda" and budget.left() > COMPILE_SECONDS:
            compare(settings[0], "compiled", ["nn.BatchNorm", "compiled"], errors, args, results)


def checked(name: str, small: bool, device: torch.device) -> float:
    """The error of the logits of a float32 training step on small images; raises if it or the gradient's is wrong."""
    tf32 = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        logits, gradient = _outcome(build(name, small), torch.float32, small, device)
        wanted, wanted_gradient = _outcome(build("nn.BatchNorm", small), torch.float64, small, device)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = tf32
    off, gradient_off = error(logits, wanted), error(gradient, wanted_gradient)
    if not (off <= LOGITS and gradient_off <= GRADIENT):
        raise AssertionError(f"{name}: logits off by {off:.2e}, gradient by {gradient_off:.2e}; nothing is timed.")
    return off


def _outcome(model: nn.Module, dtype: torch.dtype, small: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the first convolution's weight."""
    images, labels = Setting(8, 64, "contiguous", small, device).batches(1)[0]
    model = model.to(device, dtype).train()
    logits = model(images.to(dtype))
    F.cross_entropy(logits, labels).backward()
    return logits.detach(), model.conv.weight.grad


def compare(
    setting: Setting,
    comparison: str,
    names: list[str],
    errors: dict[str, float],
    args: argparse.Namespace,
    results: Results,
) -> None:
    """Time and write one setting's models."""
    batches = setting.batches()
    steps = {name: make_step(name, setting) for name in names}
    timers = {name: device_timing.timer(step, batches, setting.device, False) for name, step in steps.items()}
    samplers = {name: lambda timed=timed: {"": timed()} for name, timed in timers.items()}
    summaries = {name: summarize(seconds) for (name, _), seconds in interleave(samplers, args.reps, 2).items()}
    model = "smoke" if setting.small else "resnet50"
    shared = {**environment(args.machine, setting.device), "comparison": comparison, "model": model}
    shared |= {"batch": setting.batch, "image": setting.image, "layout": setting.layout, "dtype": "bfloat16"}
    for name, summary in summaries.items():
        row = {**shared, "variant": name, **timing_columns(summary)}
        row |= {"over_bn": ratio(summary, summaries["nn.BatchNorm"]), "error": errors.get(name, "")}
        results.add({**row, **resources(partial(steps[name], batches[0]), setting.device)})
        print(f"{comparison} {name} batch {setting.batch} {setting.layout}: done", file=sys.stderr, flush=True)


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
        with torch.autocast(setting.device.type, torch.bfloat16):
            loss = F.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()

    return step


def resources(step: Callable[[], None], device: torch.device) -> dict[str, Any]:
    """Memory, launches and host syncs of a step; empty on CPU."""
    if device.type != "cuda":
        return {"peak_megabytes": "", "launches": "", "host_syncs": ""}
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
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        with torch.profiler.record_function("the step"):
            step()
        torch.cuda.synchronize()
    return tally([(e.name, e.time_range.start, e.time_range.end) for e in profile.events()])


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
