"""Hugging Face accelerate: convert first, then `prepare`, which wraps the model in DistributedDataParallel.

On two CPU processes, which meet over gloo; each leaves its state in FOLDER:

    torchrun --nproc-per-node 2 -m tests.examples.accelerate_training FOLDER
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from torch.nn import functional as F
from torch.utils.data import DataLoader

import syncbn
from tests.examples.small_net import build, samples

BATCH_SIZE = 4


def main(folder: Path) -> None:
    accelerator = Accelerator(cpu=True)
    net = syncbn.convert_sync_batchnorm(build())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    model, optimizer, loader = accelerator.prepare(net, optimizer, DataLoader(samples(), BATCH_SIZE))
    for images, labels in loader:  # this rank's batches
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    left = {
        "state": accelerator.unwrap_model(model).state_dict(),
        "ranks": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
    }
    torch.save(left, folder / f"rank-{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
