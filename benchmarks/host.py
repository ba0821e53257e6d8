"""How long does the host take for one training call of the layer, the device left aside?

    python -m benchmarks.host --device cuda      # on a GPU: nothing waits for the device while the clock runs
    python -m benchmarks.host --device cpu       # anywhere with a C compiler: Triton on a driver that runs nothing

Passes are a forward, a backward on a graph that is kept, both, and `stack`: both through 16 layers, by layer, which is
how a model calls them: its backward is one run of autograd's thread, without a hop to it for each layer.
On the stub driver our tensors are on the CPU and nothing is computed; nn.BatchNorm2d computes there, on its 2 × 8 × 8
pixels. Each of `reps` repetitions is timed by itself.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from benchmarks.harness import Benchmark, Key, Sample, by_key, interleave
from benchmarks.options import TIMING, parsed, parser
from benchmarks.resilience import Budget
from benchmarks.shapes import Plan
from benchmarks.tables import ENVIRONMENT
from syncbn import backends
from tests.support import stub_device

COLUMNS = (
    *ENVIRONMENT,
    *("driver", "shape", "layout", "dtype", "variant", "pass", "us", "us_p20", "us_p80", "reps", "over_bn"),
)
SHAPES = ((2, 64, 8, 8), (8, 64, 56, 56))
"""The first on the stub driver too; the second shows what a device that has work to do adds."""
STACK = 16
QUEUE = 50
"""Repetitions after which the host waits for the device, so that no launch has to wait for room in its queue."""


def main(argv: list[str] | None = None) -> None:
    own = parser(__doc__, *TIMING, script="host", reps=600, threads=1)
    own.add_argument("--stubbed", action="store_true", help=argparse.SUPPRESS)
    args = parsed(own, argv, smoke_reps=5)
    if args.device == "cuda" or args.stubbed:
        plans = [Plan(shape, "bfloat16", "channels_last") for shape in SHAPES]
        Benchmark(args, COLUMNS, plans if args.device == "cuda" else plans[:1], measure).run()
        return
    if reason := stub_device.why_not():
        raise SystemExit(f"Without a GPU this {reason}.")
    with tempfile.TemporaryDirectory() as folder:
        given = {**os.environ, **stub_device.build(Path(folder))}
        command = [sys.executable, "-m", "benchmarks.host", "--stubbed", *args.given]
        raise SystemExit(subprocess.run(command, env=given, check=False).returncode)


def measure(plan: Plan, budget: Budget, benchmark: Benchmark) -> list[str]:
    """Rows of one shape, in bfloat16 and channels last."""
    device, args = benchmark.device, benchmark.args
    if args.stubbed:
        stub_device.install()
        stub_device.stub().watch(False)
    torch.manual_seed(0)
    x = torch.randn(plan.shape, device=device).bfloat16().to(memory_format=torch.channels_last)
    makers = {"nn.BatchNorm": nn.BatchNorm2d, "syncbn": syncbn.SyncBatchNorm}
    samplers: dict[Key, Callable[[], Sample]] = {}
    for name, make in makers.items():
        for phase, call in calls(make, x, "gpu" if args.stubbed and name == "syncbn" else None).items():
            samplers[name, phase] = partial(timed, call, device, STACK if phase == "stack" else 1)
    times = interleave(samplers, args.reps, warmup=min(50, args.reps))
    shared = {**benchmark.environment(plan), "driver": "stub" if args.stubbed else "cuda", **plan.columns()}
    benchmark.write(shared, by_key(times), {"over_bn": "nn.BatchNorm"}, "pass", "us")
    return []


def calls(make: Callable[[int], nn.Module], x: Tensor, backend: str | None) -> dict[str, Callable[[], None]]:
    """The passes of a layer, and of a stack of them, each served by the back-end named, if one is."""
    leaf, dy = x.clone().requires_grad_(), torch.randn_like(x)
    layer = make(x.shape[1]).to(x.device)
    stack = nn.Sequential(*(make(x.shape[1]) for _ in range(STACK))).to(x.device)
    leaves = {"both": [leaf, *layer.parameters()], "stack": [leaf, *stack.parameters()]}

    def both(module: nn.Module, inputs: list[Tensor]) -> None:
        torch.autograd.grad(module(leaf), inputs, dy)

    def served(call: Callable[[], Any]) -> None:
        if backend is None:
            call()
        else:
            with backends.force(backend):
                call()

    for module, inputs in ((layer, leaves["both"]), (stack, leaves["stack"])):
        for _ in range(2):
            served(partial(both, module, inputs))
    kept: list[Tensor] = []
    served(lambda: kept.append(layer(leaf)))
    return {
        "forward": partial(served, lambda: layer(leaf)),
        "backward": partial(served, lambda: torch.autograd.grad(kept[0], leaves["both"], dy, retain_graph=True)),
        "both": partial(served, partial(both, layer, leaves["both"])),
        "stack": partial(served, partial(both, stack, leaves["stack"])),
    }


_since_wait = 0


def timed(call: Callable[[], None], device: torch.device, layers: int) -> Sample:
    """Seconds of one call on the host, by layer."""
    global _since_wait
    _since_wait += 1
    if device.type == "cuda" and _since_wait % QUEUE == 0:
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    return {"": (time.perf_counter() - start) / layers}


if __name__ == "__main__":
    main()
