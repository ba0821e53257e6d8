"""Train a small CNN with DistributedDataParallel and one of four normalizations: the smallest honest example.

On one machine, from the repository's root, where torch, tqdm and scikit-learn are installed (quickstart.sh does that):

    python launch/train.py --norm syncbn                             # 1 process, no launcher: batch norm as usual
    torchrun --standalone --nproc-per-node 2 launch/train.py         # 2 CPU ranks, gloo; with 2 GPUs, nccl
    torchrun --standalone --nproc-per-node 8 launch/train.py --data cifar10 --amp --channels-last    # 8 GPUs
    NPROC=8 bash launch/single_node.sh --data cifar10 --amp --channels-last                          # the same

On two nodes of 8 GPUs, the same command on each but for NODE_RANK:

    NNODES=2 NODE_RANK=0 MASTER_ADDR=first.node MASTER_PORT=29500 NPROC=8 bash launch/multi_node.sh --data cifar10
    NNODES=2 NODE_RANK=1 MASTER_ADDR=first.node MASTER_PORT=29500 NPROC=8 bash launch/multi_node.sh --data cifar10

Under Slurm, with the node and GPU counts as sbatch options:

    sbatch --nodes 2 --gpus-per-node 8 launch/slurm.sbatch --data cifar10

With a checkpoint per epoch the same command, given again, goes on where the last run of it ended; with MAX_RESTARTS
the launcher gives it again by itself when a rank dies. Rank 0 alone reads and writes the folder, so on several nodes
it must be there for node 0, and shared if node 0 may be another machine the next time:

    python launch/train.py --checkpoint out/run
    MAX_RESTARTS=3 bash launch/single_node.sh --checkpoint out/run
    MAX_RESTARTS=3 NNODES=2 NODE_RANK=0 MASTER_ADDR=first.node MASTER_PORT=29500 bash launch/multi_node.sh \
        --checkpoint /shared/run                                     # and with NODE_RANK=1 on the other
    MAX_RESTARTS=3 sbatch --requeue launch/slurm.sbatch --checkpoint /shared/run

What is specific to synchronized batch norm is two lines: `convert_sync_batchnorm` in model.build, before the wrapping
in DistributedDataParallel. The rest is what any such training needs to be right.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from checkpoint import Checkpoints
from data import Data, crop_and_flip, load
from log import Log, worded
from model import NORMS, build
from options import parser
from ranks import Rank, distributed, fail, join, leave, machine_name, progress, require_alike, save
from score import classified, mine
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DistributedSampler

import syncbn


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The options; --help ends with the commands above."""
    options = parser("train.py", __doc__ or "", NORMS, batch_size=32, epochs=10)
    options.add_argument("--data", choices=("digits", "cifar10"), default="digits", help="data set (default: digits)")
    options.add_argument("--data-dir", default="data", help="folder with the CIFAR-10 binary files (default: data)")
    options.add_argument("--lr", type=float, help="first learning rate (default: 0.1 per 256 images of all ranks)")
    options.add_argument("--amp", action="store_true", help="bfloat16 autocast, on GPU and CPU")
    options.add_argument("--channels-last", action="store_true", help="keep images as (N, H, W, C) in memory")
    options.add_argument(
        "--recompute-statistics",
        action="store_true",
        help="after the last epoch, evaluate and save with the statistics of the whole training set, too",
    )
    options.add_argument("--checkpoint", type=Path, help="folder: write the state per epoch, and resume if it has one")
    args = options.parse_args(arguments)
    if args.recompute_statistics and args.norm not in ("batch", "syncbn"):
        options.error(f"--recompute-statistics is for batch norm; got --norm {args.norm}, which has no statistics")
    return args


def main() -> None:
    args = parse()
    try:
        data = load(args.data, args.data_dir)
    except ValueError as error:
        fail(str(error))
    me = join()
    run(data, args, me)
    if me.backend is not None:
        leave()


def run(data: Data, args: argparse.Namespace, me: Rank) -> None:
    """Build, train, save."""
    torch.manual_seed(args.seed)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = build(args.norm, data.train_images.shape[1]).to(me.device, memory_format=layout)
    wrapped = distributed(model, me)  # converted by now: DistributedDataParallel comes after
    if me.rank == 0:
        sizes = f"{len(data.train_images)} training and {len(data.test_images)} test images"
        where = f"{me.device.type}, {me.backend or 'no process group'}"
        print(f"{args.norm} on {me.world} x {args.batch_size} {args.data} images a step ({where}); {sizes}", flush=True)
    train(model, wrapped, data, args, me)
    save(model, args.save, me)


def train(model: nn.Module, wrapped: nn.Module, data: Data, args: argparse.Namespace, me: Rank) -> None:
    """All epochs, each with its evaluation; `wrapped` is what trains, `model` what is evaluated and saved."""
    # Equal numbers of steps on every rank: the sampler repeats at most world - 1 images in an epoch.
    sampler = DistributedSampler(range(len(data.train_images)), me.world, me.rank, seed=args.seed)
    steps = math.ceil(len(sampler) / args.batch_size)
    lr = args.lr or 0.1 * args.batch_size * me.world / 256  # Goyal et al., 2017 (arXiv:1706.02677)
    optimizer = SGD(wrapped.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = CosineAnnealingLR(optimizer, args.epochs * steps)
    augmenting = torch.Generator().manual_seed(args.seed * me.world + me.rank)
    log = Log(args.log_file if me.rank == 0 else None)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "log": log}
    settings = describe(args, me) | {"lr": lr, "device": me.device.type, "images": len(data.train_images)}
    others = {"checkpoint": args.checkpoint is not None, "recompute_statistics": args.recompute_statistics}
    require_alike(me, settings | others)
    checkpoints = args.checkpoint and Checkpoints(args.checkpoint, settings, me, parts, generators(augmenting, me))
    finished = resume(checkpoints, wrapped, data, args, me) if checkpoints else 0
    log.write()
    with progress(args.epochs * steps, me, finished * steps) as bar:
        for epoch in range(finished + 1, args.epochs + 1):
            sampler.set_epoch(epoch)
            began = time.perf_counter()
            for chosen in torch.tensor(list(sampler)).split(args.batch_size):
                images = data.train_images[chosen]
                images = crop_and_flip(images, augmenting) if data.augment else images
                loss = loss_of(wrapped, images, data.train_labels[chosen], data, args, me)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
            if me.device.type == "cuda":
                torch.cuda.synchronize()
            ms_per_step = (time.perf_counter() - began) * 1e3 / steps
            result = outcome(model, epoch, data, args, me)
            log.rows.append(row(args, me, epoch, {**result, "ms_per_step": ms_per_step}))
            if checkpoints:
                checkpoints.save(epoch)  # before the log: a row that is missing there is in here
            log.write()
            if me.rank == 0:
                bar.write(f"epoch {epoch}: {worded(result)}, {ms_per_step:.1f} ms per step")


def outcome(model: nn.Module, epoch: int, data: Data, args: argparse.Namespace, me: Rank) -> dict[str, float]:
    """Accuracy and mean cross-entropy on the test set; with --recompute-statistics the last epoch's with those, too.

    They are the statistics of the whole training set, each image once, and the model keeps them. The batches are large,
    since a deep layer's statistics are of what the layers before it make of a batch.
    """
    result = evaluate(model, data, args, me)
    if args.recompute_statistics and epoch == args.epochs:
        batches = (to_input(data.train_images[i], data, args, me) for i in mine(len(data.train_images), me))
        with autocast(args, me):
            syncbn.recompute_statistics(model, batches)
        result |= {f"recomputed_{name}": value for name, value in evaluate(model, data, args, me).items()}
    return result


def resume(checkpoints: Checkpoints, wrapped: nn.Module, data: Data, args: argparse.Namespace, me: Rank) -> int:
    """Load the newest checkpoint; the finished epoch, or 0 where there is none.

    DistributedDataParallel orders its gradients anew after its first backward, and from 3 ranks on that order decides
    the roundings. One backward before the load, of which nothing is kept, and they are those of the interrupted run.
    """
    state = checkpoints.read()
    if state is None:
        return 0
    if state["epoch"] < args.epochs:
        loss_of(wrapped, data.train_images[:2], data.train_labels[:2], data, args, me).backward()
        wrapped.zero_grad()
    return checkpoints.load(state)


def generators(augmenting: torch.Generator, me: Rank) -> dict[str, torch.Generator]:
    """Every source of random numbers that a step may use."""
    sources = {"torch": torch.default_generator, "augmentation": augmenting}
    if me.device.type == "cuda":
        sources["cuda"] = torch.cuda.default_generators[me.device.index]
    return sources


def loss_of(
    wrapped: nn.Module, images: Tensor, labels: Tensor, data: Data, args: argparse.Namespace, me: Rank
) -> Tensor:
    with autocast(args, me):
        return F.cross_entropy(wrapped(to_input(images, data, args, me)), labels.to(me.device))


def evaluate(model: nn.Module, data: Data, args: argparse.Namespace, me: Rank) -> dict[str, float]:
    """Accuracy and loss on the test set, each image once."""

    def outputs() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in mine(len(data.test_images), me):
            with autocast(args, me):
                logits = model(to_input(data.test_images[chosen], data, args, me))
            yield logits.float(), data.test_labels[chosen].to(me.device)

    return classified(model, outputs(), me)


def autocast(args: argparse.Namespace, me: Rank) -> torch.autocast:
    """bfloat16 needs no loss scaling, so --amp is this alone, on every device."""
    return torch.autocast(me.device.type, torch.bfloat16, enabled=args.amp)


def to_input(images: Tensor, data: Data, args: argparse.Namespace, me: Rank) -> Tensor:
    """uint8 (N, C, H, W) -> standardized float32 on the device, in the layout of --channels-last."""
    mean, std = (torch.tensor(v, device=me.device).view(1, -1, 1, 1) for v in (data.mean, data.std))
    x = (images.to(me.device).float() - mean) / std
    return x.contiguous(memory_format=torch.channels_last) if args.channels_last else x.contiguous()


def describe(args: argparse.Namespace, me: Rank) -> dict[str, Any]:
    """The settings that are columns of the log."""
    row = {"data": args.data, "norm": args.norm, "seed": args.seed, "ranks": me.world}
    return row | {
        "batch_per_rank": args.batch_size,
        "amp": args.amp,
        "channels_last": args.channels_last,
        "epochs": args.epochs,
    }


def row(args: argparse.Namespace, me: Rank, epoch: int, result: dict[str, float]) -> dict[str, Any]:
    """A line of the log: what ran where, and what came out."""
    where = {"machine": machine_name(me.device), "torch": str(torch.__version__), "backend": me.backend}
    return where | describe(args, me) | {"epoch": epoch} | result


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
