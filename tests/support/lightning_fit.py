"""Run by test_integrations: two Lightning processes on CPU, each saving what its batch norm saw.

python tests/support/lightning_fit.py FOLDER
"""

import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn
from syncbn.compat.lightning import LayerSync

warnings.simplefilter("ignore")  # Lightning's advice on worker counts and loggers


class Model(pl.LightningModule):
    """One batch norm on constant data: rank r's samples are all r."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.norm = nn.BatchNorm1d(3, momentum=1.0)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        assert isinstance(self.norm, syncbn.SyncBatchNorm)
        x = torch.full_like(batch[0], float(self.global_rank))
        return self.norm(x).square().sum() + self.norm.weight.sum()

    def on_train_end(self) -> None:
        torch.save(self.norm.running_mean, self.folder / f"mean-{self.global_rank}.pt")

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def main(folder: Path) -> None:
    model = Model(folder)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_steps=2, plugins=[LayerSync()], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, DataLoader(TensorDataset(torch.zeros(16, 3)), batch_size=4))
    assert type(model.norm) is nn.BatchNorm1d, "reverted after fitting"
    (folder / f"reverted-{trainer.global_rank}").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
