"""Segmentation: every rank has crops of its own height and width, and its own number of them.

The loss is the mean over the labelled pixels of all ranks: with unequal ranks, the mean of their means is not.
On two CPU processes, which meet over gloo; each leaves its state in FOLDER:

    torchrun --nproc-per-node 2 -m tests.examples.segmentation_uneven_crops FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import syncbn

CLASSES, UNLABELLED, STEPS = 5, 255, 3


def build() -> nn.Sequential:
    torch.manual_seed(1)
    hidden = [nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    hidden += [nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Conv2d(8, CLASSES, 1)).double()


def crops(rank: int) -> list[tuple[Tensor, Tensor]]:
    """For every step this rank's images, (N, 3, H, W), and the classes of their pixels, (N, H, W)."""
    generator = torch.Generator().manual_seed(10 + rank)
    batches = []
    for _ in range(STEPS):
        n = int(torch.randint(1, 4, (), generator=generator))
        h, w = torch.randint(8, 25, (2,), generator=generator).tolist()
        images = torch.randn(n, 3, h, w, generator=generator) + torch.randn(n, 3, 1, 1, generator=generator)
        labels = torch.randint(CLASSES, (n, h, w), generator=generator)
        labels[torch.rand(n, h, w, generator=generator) < 0.1] = UNLABELLED
        batches.append((images.double(), labels))
    return batches


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    net = syncbn.convert_sync_batchnorm(build())
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    gradients = []
    for images, labels in crops(dist.get_rank()):
        loss = F.cross_entropy(model(images), labels, ignore_index=UNLABELLED, reduction="sum")
        pixels = (labels != UNLABELLED).sum()
        dist.all_reduce(pixels)
        optimizer.zero_grad()
        (loss * dist.get_world_size() / pixels).backward()  # DDP divides by the number of ranks
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
        optimizer.step()
    torch.save({"state": net.state_dict(), "gradients": gradients}, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
