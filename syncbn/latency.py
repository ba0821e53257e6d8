"""How long the layers' sums over the ranks take on this cluster, by size, and what a ResNet-50 step's would cost."""

import statistics
import time
from collections import Counter
from typing import NamedTuple

import torch
from torch.distributed import ProcessGroup

from syncbn import comm

WARMUP, REPETITIONS = 5, 50


class Latency(NamedTuple):
    """Of sums for so many channels: bytes of each rank, and seconds, the median of the repetitions and the 80th of 100;
    the slowest rank's.
    """

    channels: int
    bytes: int
    median: float
    late: float


def channels_of_resnet50() -> Counter[int]:
    """How many of its 53 batch norms have so many channels."""
    found = Counter({64: 1})  # the first convolution's
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        found += Counter({width: 2 * blocks}) + Counter({4 * width: blocks + 1})  # and the downsampling one
    return found


def measure(channels: int, group: ProcessGroup, device: torch.device) -> Latency:
    """One sum after the other, each waited for; a training may enqueue several before it waits."""
    wire = torch.zeros(2 * channels + 3, dtype=torch.float64, device=device)
    seconds = []
    for _ in range(WARMUP + REPETITIONS):
        begun = time.perf_counter()
        comm.all_sum(wire, group)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    seconds = seconds[WARMUP:]
    own = statistics.median(seconds), statistics.quantiles(seconds, n=5)[-1]
    median, late = map(max, zip(*comm.from_all(own, group), strict=True))
    return Latency(channels, wire.numel() * wire.itemsize, median, late)


def table(group: ProcessGroup, device: torch.device) -> str:
    """A line for each size of a ResNet-50's layers, and what its step would cost; alike on every rank."""
    layers = channels_of_resnet50()
    found = [measure(channels, group, device) for channels in sorted(layers)]
    lines = [f"{'channels':>8} {'bytes':>7} {'median':>10} {'80 %':>10}   sums of a ResNet-50 step"]
    for each in found:
        times = f"{1e6 * each.median:7.0f} us {1e6 * each.late:7.0f} us"
        lines.append(f"{each.channels:8} {each.bytes:7} {times}   {2 * layers[each.channels]}")
    total = sum(2 * layers[each.channels] * each.median for each in found)
    count = 2 * sum(layers.values())
    lines.append(f"{count} sums one after the other: {1e3 * total:.1f} ms a step, the most that they can add to it")
    return "\n".join(lines)
