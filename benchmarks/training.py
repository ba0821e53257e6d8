"""A ResNet's training step, and whether its logits and first gradient are right: cross entropy, SGD with momentum."""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.resnet import NORMS, ResNet50
from benchmarks.shapes import in_layout
from tests.support.oracle import error

Batch = tuple[Tensor, Tensor]
"""Images and labels."""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOGITS, GRADIENT = 1e-3, 5e-2
"""Relative errors allowed to a float32 step after 53 layers; the gradient has come back through all of them."""


class Setting(NamedTuple):
    """A model with each norm in turn, its batch on each rank, its layout, and where."""

    batch: int
    image: int
    layout: str
    device: torch.device
    width: int = 64
    blocks: tuple[int, ...] = (3, 4, 6, 3)
    classes: int = 1000

    def __str__(self) -> str:
        return f"batch {self.batch} {self.layout}"

    def columns(self) -> dict[str, Any]:
        """Those of a row."""
        return {"batch": self.batch, "image": self.image, "layout": self.layout}

    def model(self, norm: str) -> ResNet50:
        """The same weights for every norm."""
        torch.manual_seed(0)
        model = ResNet50(NORMS[norm], self.classes, self.width, self.blocks).to(self.device)
        return model.to(memory_format=FORMATS[self.layout]).train()

    def data(self, seed: int = 0) -> Batch:
        """Random, of a rank, say; the same wherever it is made."""
        generator = torch.Generator().manual_seed(1 + seed)
        images = torch.randn(self.batch, 3, self.image, self.image, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return in_layout(images.to(self.device), self.layout), labels.to(self.device)


def stepper(
    model: nn.Module, called: nn.Module, autocast: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext
) -> Callable[[Batch], None]:
    """A training step of a model, which may be called compiled."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    def step(batch: Batch) -> None:
        images, labels = batch
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            loss = F.cross_entropy(called(images), labels)
        loss.backward()
        optimizer.step()

    return step


def check(
    setting: Setting, norm: str, model: ResNet50, called: nn.Module, rank: int = 0, ranks: int = 1
) -> tuple[float, float]:
    """Relative errors of a float32 pass's logits and first gradient; raises if one is too large.

    What is right is a float64 model's, of the batches of all ranks that are synchronised.
    """
    everyone = (rank,) if norm == "nn.BatchNorm" else tuple(range(ranks))
    logits, gradient = _outcome(model, called, *setting.data(rank))
    if len(everyone) > 1:
        dist.all_reduce(gradient := gradient.double())
    right, right_gradient = _right(setting, everyone)
    off = error(logits, right.split(setting.batch)[everyone.index(rank)])
    gradient_off = error(gradient, right_gradient)
    if not (off <= LOGITS and gradient_off <= GRADIENT):
        raise AssertionError(f"logits are off by {off:.2e}, the gradient by {gradient_off:.2e}; it is not timed.")
    return off, gradient_off


@functools.lru_cache(maxsize=2)
def _right(setting: Setting, everyone: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    model = setting.model("nn.BatchNorm").double()
    images, labels = map(torch.cat, zip(*map(setting.data, everyone), strict=True))
    return _outcome(model, model, images.double(), labels)


def _outcome(model: ResNet50, called: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the first convolution's weight."""
    logits = called(images)
    F.cross_entropy(logits, labels, reduction="sum").backward()
    return logits.detach(), model.conv.weight.grad
