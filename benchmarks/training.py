"""A ResNet's training step, and whether its logits and first gradient are right: cross entropy, SGD with momentum."""

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.resnet import ResNet50
from benchmarks.shapes import in_layout
from tests.support.oracle import error

Batch = tuple[Tensor, Tensor]
"""Images and labels."""

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
LOGITS, GRADIENT = 1e-3, 5e-2
"""Relative errors allowed to a float32 step after 53 layers; the gradient has come back through all of them."""


def random_batch(batch: int, image: int, classes: int, layout: str, device: torch.device, seed: int = 1) -> Batch:
    """The same wherever it is made."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, image, image, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    return in_layout(images.to(device), layout), labels.to(device)


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


def outcome(
    model: ResNet50, called: nn.Module, images: Tensor, labels: Tensor, reduction: str
) -> tuple[Tensor, Tensor]:
    """Logits, and the gradient of the first convolution's weight."""
    logits = called(images)
    F.cross_entropy(logits, labels, reduction=reduction).backward()
    return logits.detach(), model.conv.weight.grad


def hold(mine: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The relative errors of logits and gradient; raises if they are beyond what is allowed."""
    off, gradient_off = (error(m, r) for m, r in zip(mine, right, strict=True))
    if not (off <= LOGITS and gradient_off <= GRADIENT):
        raise AssertionError(f"logits are off by {off:.2e}, the gradient by {gradient_off:.2e}; it is not timed.")
    return off, gradient_off
