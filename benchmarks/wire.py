"""How many collectives and how many bytes does a training step's batch norm cost, by world size?

    python -m benchmarks.wire

One forward and backward through the 53 batch norms of ResNet-50 on rank 0 of a fake process group, which counts like
a real one and moves nothing. Two schemes:

    syncbn            our layers; float64
    nn.SyncBatchNorm  torch's own autograd function, torch/nn/modules/_functions.py, issuing its own collectives.
                      Its five arithmetic kernels exist on GPUs only and are replaced by stand-ins of the same shapes
                      and dtypes: float32 statistics for float32, float16 and bfloat16 inputs.

Bytes, for each rank and step:

    payload        handed to the collectives by the rank: the size of its own contribution.
    ring_received  arriving at the rank's network port when the collective runs as a ring, the usual algorithm and the
                   least possible for an all-gather: 2·(n−1)/n·payload for an all-reduce (as much is sent),
                   (n−1)·payload for an all-gather.

Nothing is timed; small collectives cost latency, which grows with their number, before they cost bytes.
"""

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from benchmarks.collectives import Collective, Recorder, fake_world
from benchmarks.machine import commit
from benchmarks.options import parser
from benchmarks.shapes import resnet50_norms
from benchmarks.tables import Results

COLUMNS = ("commit", "torch", "scheme", "model", "layers", "channels", "world_size", "pass", "collectives", "kinds")
COLUMNS += ("payload", "ring_received")
WORLD_SIZES = tuple(2**k for k in range(1, 11))


class TorchSync(nn.BatchNorm2d):
    """nn.SyncBatchNorm's synchronized path, on whatever device."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.modules._functions import SyncBatchNorm

        fixed = (self.weight, self.bias, self.running_mean, self.running_var, self.eps, self.momentum)
        return SyncBatchNorm.apply(x, *fixed, dist.group.WORLD, dist.get_world_size())


SCHEMES: dict[str, Callable[[int], nn.Module]] = {"syncbn": syncbn.SyncBatchNorm, "nn.SyncBatchNorm": TorchSync}


def per_channel(x: Tensor, count: int) -> list[Tensor]:
    return [torch.ones(x.shape[1]) for _ in range(count)]


STAND_INS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": lambda x, *_: per_channel(x, 2),
    "batch_norm_gather_stats_with_counts": lambda x, *_: per_channel(x, 2),
    "batch_norm_elemt": lambda x, *_: x.clone(),
    "batch_norm_backward_reduce": lambda dy, *_: per_channel(dy, 4),
    "batch_norm_backward_elemt": lambda dy, *_: dy.clone(),
}
"""Of torch's GPU kernels: what they return, without the arithmetic."""


def record(scheme: str, channels: list[int]) -> dict[str, list[Collective]]:
    """The collectives of one training step through layers of these widths, by pass, in the default group."""
    forward, backward = Recorder(), Recorder()
    with mock.patch.multiple(torch, **STAND_INS):
        for width in channels:
            x = torch.randn(2, width, 2, 2, requires_grad=True)
            layer = SCHEMES[scheme](width)
            with forward:
                y = layer(x)
            with backward:
                y.backward(torch.randn(y.shape))
    return {"forward": forward.collectives, "backward": backward.collectives}


def rows(channels: list[int], model: str, world_size: int) -> Iterator[dict[str, Any]]:
    """A row for each scheme and pass, and for the whole step."""
    shared = {"model": model, "layers": len(channels), "channels": sum(channels), "world_size": world_size}
    with fake_world(world_size):
        for scheme in SCHEMES:
            by_pass = record(scheme, channels)
            by_pass["step"] = by_pass["forward"] + by_pass["backward"]
            for phase, collectives in by_pass.items():
                kinds = "+".join(sorted({c.kind for c in collectives}))
                row = {"scheme": scheme, **shared, "pass": phase, "collectives": len(collectives), "kinds": kinds}
                received = round(sum(c.ring_received(world_size) for c in collectives))
                yield {**row, "payload": sum(c.payload for c in collectives), "ring_received": received}


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, "out", "smoke").parse_args(argv)
    channels = [shape[1] for shape in resnet50_norms(1)]
    model, sizes = "resnet50", WORLD_SIZES
    if args.smoke:
        channels, model, sizes = channels[:3], "smoke", WORLD_SIZES[:2]
    results = Results(args.out / "wire.csv", COLUMNS)
    origin = {"commit": commit(), "torch": torch.__version__}
    for world_size in sizes:
        for row in rows(channels, model, world_size):
            results.add({**origin, **row})


if __name__ == "__main__":
    main()
