"""Does it work on this machine, on this cluster?

    python -m syncbn.selfcheck                                     this process alone
    torchrun --nproc-per-node 2 -m syncbn.selfcheck                2 ranks on one machine
    torchrun --nnodes 2 ... --nproc-per-node 8 -m syncbn.selfcheck as the training itself is started
    torchrun --nproc-per-node 2 -m syncbn.selfcheck --bench        how long the sums over the ranks take, instead

Every rank makes the inputs of all ranks from one seed, runs its own through the layer, and compares output,
gradients and running statistics with one float64 batch norm of the concatenated batch on the CPU.
Rank 0 prints what it runs on and a table of the worst error over all ranks; the exit code is 1 if a row is wrong.
"""

import argparse
import itertools
import logging
import os
import sys
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from syncbn import backends, comm, groups, latency
from syncbn.module import SyncBatchNorm

CHANNELS, SAMPLES, HEIGHT, WIDTH = 24, 6, 12, 10
ALLOWED = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-8 + 3e-6, torch.float16: 2**-11 + 3e-6}
"""Relative to the largest value: float32 arithmetic, and for half precision one rounding of the result."""


class Check(NamedTuple):
    """One row: how the batch is split over the ranks, its dtype and layout, and what is fused."""

    split: str
    dtype: torch.dtype
    layout: str
    fused: bool

    def samples(self, rank: int) -> int:
        if self.split == "even":
            return SAMPLES
        if self.split == "empty":
            return SAMPLES if rank == 0 else 0
        return 1 + (rank * 3 + 2) % SAMPLES


class Inputs(NamedTuple):
    """One rank's tensors, (N, C, H, W) and mask (N, H, W)."""

    x: Tensor
    residual: Tensor
    dy: Tensor
    mask: Tensor | None


def all_checks() -> list[Check]:
    """Every split, dtype and layout, plain and with residual, relu and (where uneven) a mask."""
    splits, layouts = ("even", "uneven", "empty"), ("contiguous", "channels_last")
    return [Check(*row) for row in itertools.product(splits, ALLOWED, layouts, (False, True))]


def make_inputs(check: Check, world_size: int) -> list[Inputs]:
    """The same on every rank."""
    generator = torch.Generator().manual_seed(0)
    out = []
    for rank in range(world_size):
        height = HEIGHT + rank % 3 if check.split == "uneven" else HEIGHT
        shape = (check.samples(rank), CHANNELS, height, WIDTH)
        x, residual, dy = (
            (torch.randn(shape, generator=generator) + shift).to(check.dtype) for shift in (2.0, 0.0, 0.0)
        )
        mask = torch.rand(shape[0], *shape[2:], generator=generator) > 0.3 if check.split == "uneven" else None
        if check.layout == "channels_last":
            x = x.contiguous(memory_format=torch.channels_last)
        out.append(Inputs(x, residual, dy, mask if check.fused else None))
    return out


def columns(t: Tensor, mask: Tensor | None) -> Tensor:
    """(C, positions that count), float64, on the CPU."""
    flat = t.detach().cpu().double().movedim(1, 0).reshape(CHANNELS, -1)
    return flat if mask is None else flat[:, mask.reshape(-1)]


def oracle(check: Check, inputs: list[Inputs], weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
    """One float64 batch norm of all ranks' positions, (1, C, positions), and its gradients by autograd."""
    tensors = ([i.x for i in inputs], [i.residual for i in inputs], [i.dy for i in inputs])
    masks = [i.mask for i in inputs]
    x, residual, dy = (torch.cat(list(map(columns, each, masks)), 1)[None] for each in tensors)
    leaves = [t.double().requires_grad_() for t in (x, residual, weight, bias)]
    mean, var = torch.zeros(CHANNELS).double(), torch.ones(CHANNELS).double()
    y = F.batch_norm(leaves[0], mean, var, leaves[2], leaves[3], training=True)
    if check.fused:
        y = F.relu(y + leaves[1])
    grads = torch.autograd.grad((y * dy).sum(), leaves, allow_unused=True)
    right = {"y": y.detach(), "dx": grads[0], "dweight": grads[2], "dbias": grads[3]}
    right |= {"running_mean": mean, "running_var": var}
    return right | ({"dresidual": grads[1]} if check.fused else {})


def run(check: Check, rank: int, world_size: int, device: torch.device) -> float:
    """This rank's largest error, as a multiple of what its dtype allows."""
    inputs = make_inputs(check, world_size)
    mine = inputs[rank]
    generator = torch.Generator().manual_seed(1)
    weight, bias = (torch.randn(CHANNELS, generator=generator) for _ in range(2))
    parameter_dtype = torch.float64 if check.dtype == torch.float64 else torch.float32
    layer = SyncBatchNorm(CHANNELS, activation="relu" if check.fused else None, device=device, dtype=parameter_dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    x, residual = (t.to(device).requires_grad_() for t in (mine.x, mine.residual))
    mask = None if mine.mask is None else mine.mask.to(device)
    y = layer(x, residual if check.fused else None, mask)
    y.backward(mine.dy.to(device))
    group = groups.peers(None)
    ours: dict[str, Tensor | None] = {"y": y, "dx": x.grad, "dresidual": residual.grad}
    for name, grad in (("dweight", layer.weight.grad), ("dbias", layer.bias.grad)):
        ours[name] = None if grad is None else comm.all_sum(grad.double(), group)
    ours |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    right = oracle(check, inputs, layer.weight.detach().cpu(), layer.bias.detach().cpu())
    before = sum(columns(i.x, i.mask).shape[1] for i in inputs[:rank])
    return max(excess(check, mine, before, ours[name], right[name]) for name in right)


def excess(check: Check, mine: Inputs, before: int, ours: Tensor | None, right: Tensor) -> float:
    """|ours − right| / (allowed · largest right value); infinite where a masked-out position is not 0."""
    if ours is None:
        return float("inf")
    allowed = ALLOWED[ours.dtype] if ours.ndim > 1 else ALLOWED[torch.promote_types(check.dtype, torch.float32)]
    largest = right.abs().max().clamp_min(1e-30)
    flat = ours.detach().cpu().double()
    if ours.ndim > 1:
        if mine.mask is not None and bool(columns(ours, ~mine.mask).count_nonzero()):
            return float("inf")
        flat = columns(ours, mine.mask)
        right = right[0, :, before : before + flat.shape[1]]
    difference = (flat - right).abs().max() if right.numel() else torch.zeros(())
    return float((difference / largest / allowed).nan_to_num(float("inf")))


def table_of(errors: dict[Check, float]) -> str:
    """One line for every split, dtype and layout; plain and fused side by side."""
    lines = [f"{'split':8} {'dtype':9} {'layout':14} {'plain':>9} {'fused':>9}   error / allowed"]
    for check in errors:
        if not check.fused:
            both = [errors[check], errors[check._replace(fused=True)]]
            cells = " ".join(f"{e:9.2f}" for e in both)
            verdict = "ok" if max(both) <= 1 else "WRONG"
            lines.append(f"{check.split:8} {str(check.dtype)[6:]:9} {check.layout:14} {cells}   {verdict}")
    return "\n".join(lines)


def _bench(rank: int, device: torch.device) -> int:
    group = groups.peers(None)
    if group is None:
        print(
            "--bench measures sums over ranks; got one rank. Start it with torchrun --nproc-per-node 2.",
            file=sys.stderr,
        )
        return 2
    found = latency.table(group, device)
    if rank == 0:
        print(found)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run all checks on the ranks torchrun started; 0 if all are right."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip(), formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda if every rank has a GPU")
    parser.add_argument("--debug", action="store_true", help="show the library's debug log")
    parser.add_argument("--bench", action="store_true", help="measure the sums over the ranks, by size")
    options = parser.parse_args(arguments)
    if options.debug:
        logging.basicConfig(level=logging.DEBUG)
    with comm.joined(options.device) as (rank, world_size, device, transport):
        if rank == 0:
            path = backends.described(torch.empty(1, device=device))
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} CPU cores"
            print(f"torch {torch.__version__}   device {device.type} ({name})   back-end {path}")
            print(f"ranks {world_size}   transport {transport}", flush=True)
        if options.bench:
            return _bench(rank, device)
        errors = {}
        for check in all_checks():
            worst = torch.zeros(world_size, dtype=torch.float64, device=device)
            worst[rank] = run(check, rank, world_size, device)
            errors[check] = float(comm.all_sum(worst, groups.peers(None)).max())
    wrong = sum(e > 1 for e in errors.values())
    if rank == 0:
        print(table_of(errors))
        print(f"{wrong} of {len(errors)} checks are wrong" if wrong else f"all {len(errors)} checks are right")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
