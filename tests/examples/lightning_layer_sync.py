"""Lightning: `LayerSync` takes the place of `sync_batchnorm=True`. It converts when fitting starts, and reverts after.

Lightning starts its two processes itself; each leaves its state in FOLDER:

    python -m tests.examples.lightning_layer_sync FOLDER
"""

import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

import syncbn
from syncbn.compat.lightning import LayerSync
from tests.examples.small_net import build, samples

BATCH_SIZE = 4


class Classifier(pl.LightningModule):
    """Nothing in it knows of synchronization."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build()
        self.classes_in_training: set[type] = set()

    def norm_classes(self) -> set[type]:
        return {type(m) for m in self.net.modules() if isinstance(m, nn.BatchNorm2d)}

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        self.classes_in_training |= self.norm_classes()
        images, labels = batch
        return F.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def main(folder: Path) -> None:
    model = Classifier()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=1, plugins=[LayerSync()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(samples(), BATCH_SIZE))  # Lightning shuffles, and gives each rank its part
    left = {
        "state": model.net.state_dict(),
        "was_synchronized": model.classes_in_training == {syncbn.SyncBatchNorm2d},
        "is_reverted": model.norm_classes() == {nn.BatchNorm2d},
    }
    torch.save(left, folder / f"rank-{trainer.global_rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
