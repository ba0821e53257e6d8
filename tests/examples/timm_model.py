"""timm: its `BatchNormAct2d` layers are converted with their activations, here those of a MobileNetV3.

On two CPU processes, which meet over gloo; each leaves its state in FOLDER:

    torchrun --nproc-per-node 2 -m tests.examples.timm_model FOLDER
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import syncbn
from tests.examples.small_net import samples
from tests.support.fake_torchvision import timm

create_model = timm("timm").create_model  # where torchvision is installed: from timm import create_model
BATCH_SIZE = 4


def build() -> nn.Module:
    torch.manual_seed(1)
    return create_model("mobilenetv3_small_050", num_classes=5).double()


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    net = syncbn.convert_sync_batchnorm(build())
    model = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    data = samples(64)
    for images, labels in DataLoader(data, BATCH_SIZE, sampler=DistributedSampler(data, shuffle=False)):
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    left = {"state": net.state_dict(), "report": str(syncbn.conversion_report(net))}
    torch.save(left, folder / f"rank-{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
