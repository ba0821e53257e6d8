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

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from benchmarks.harness import RESULTS, Results, commit
from benchmarks.shapes import resnet50_norms

COLUMNS = ("commit", "torch", "scheme", "model", "layers", "channels", "world_size", "pass", "collectives", "kinds")
COLUMNS += ("payload", "ring_received")
WORLD_SIZES = tuple(2**k for k in range(1, 11))
SCHEMES = ("syncbn", "nn.SyncBatchNorm")
KINDS = {
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
}
"""Operations of the c10d and _c10d_functional namespaces that these schemes may issue."""
SILENT = ("wait_tensor",)


class Collective(NamedTuple):
    """One collective as this rank issued it; payload in bytes."""

    kind: str
    payload: int

    def ring_received(self, world_size: int) -> float:
        """Bytes arriving at one rank."""
        steps = world_size - 1
        return steps * self.payload * (2 / world_size if self.kind == "all_reduce" else 1)


class Recorder(TorchDispatchMode):
    """Every collective issued inside the block, whichever way it was called; an unknown one is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.rpartition("::")[2]
            if name not in SILENT:
                self.collectives.append(Collective(KINDS[name], _payload(name, args)))
            if name == "_allgather_base_":  # torch's output is (1, n·size), which the fake group fails to split
                args = (args[0].view(-1), *args[1:])
        return func(*args, **(kwargs or {}))


def _payload(name: str, args: Any) -> int:
    """Bytes of the rank's own contribution: c10d's all_gather names its output first."""
    given = args[1] if name == "_allgather_base_" else args[0]
    tensors = given if isinstance(given, list | tuple) else [given]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Be rank 0 of a default process group of this size."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


def record(scheme: str, channels: list[int]) -> dict[str, list[Collective]]:
    """The collectives of one training step through layers of these widths, by pass, in the default group."""
    recorded: dict[str, list[Collective]] = {"forward": [], "backward": []}
    for width in channels:
        x = torch.randn(2, width, 2, 2, requires_grad=True)
        with _layer(scheme, width) as layer:
            with Recorder() as forward:
                y = layer(x)
            with Recorder() as backward:
                y.backward(torch.randn(y.shape))
        recorded["forward"] += forward.collectives
        recorded["backward"] += backward.collectives
    return recorded


@contextlib.contextmanager
def _layer(scheme: str, channels: int) -> Iterator[Any]:
    if scheme == "syncbn":
        yield syncbn.SyncBatchNorm(channels)
        return
    from torch.nn.modules._functions import SyncBatchNorm

    reference = nn.BatchNorm2d(channels)
    fixed = (reference.weight, reference.bias, reference.running_mean, reference.running_var, 1e-5, 0.1)
    with mock.patch.multiple(torch, **_stand_ins(channels)):
        yield lambda x: SyncBatchNorm.apply(x, *fixed, dist.group.WORLD, dist.get_world_size())


def _stand_ins(channels: int) -> dict[str, Any]:
    """Of torch's GPU kernels: what they return, without the arithmetic."""

    def per_channel(count: int) -> tuple[Tensor, ...]:
        return tuple(torch.ones(channels) for _ in range(count))

    return {
        "batch_norm_stats": lambda *_: per_channel(2),
        "batch_norm_gather_stats_with_counts": lambda *_: per_channel(2),
        "batch_norm_elemt": lambda x, *_: x.clone(),
        "batch_norm_backward_reduce": lambda *_: per_channel(4),
        "batch_norm_backward_elemt": lambda dy, *_: dy.clone(),
    }


def rows(channels: list[int], model: str, world_size: int) -> Iterator[dict[str, Any]]:
    """A row for each scheme and pass, and for the whole step."""
    with fake_world(world_size):
        for scheme in SCHEMES:
            by_pass = record(scheme, channels)
            by_pass["step"] = by_pass["forward"] + by_pass["backward"]
            for phase, collectives in by_pass.items():
                yield {
                    "scheme": scheme,
                    "model": model,
                    "layers": len(channels),
                    "channels": sum(channels),
                    "world_size": world_size,
                    "pass": phase,
                    "collectives": len(collectives),
                    "kinds": "+".join(sorted({c.kind for c in collectives})),
                    "payload": sum(c.payload for c in collectives),
                    "ring_received": round(sum(c.ring_received(world_size) for c in collectives)),
                }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for wire.csv")
    parser.add_argument("--smoke", action="store_true", help="three layers, two world sizes")
    args = parser.parse_args(argv)
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
