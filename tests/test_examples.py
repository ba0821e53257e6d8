"""The scripts of tests/examples on two gloo processes: every training equals one process with all samples.

The one process has the layers as they were built, torch's or timm's, and everything is float64.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.examples import segmentation_uneven_crops as segmentation
from tests.examples.small_net import build, samples
from tests.support.launching import TORCHRUN, run
from tests.support.oracle import error

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries' own warnings about themselves
LIMIT = 1e-10
"""Allowed error of float64 after three steps that amplify rounding, relative to the largest value of a tensor, or to
1e-3 if that is larger: some biases have no gradient, since the next norm takes them away, and are rounding alone.
"""


def need(library: str) -> None:
    """Skip without it. It is looked for, not imported: that takes seconds, and the ranks' processes do it anyway."""
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")


def timm_model() -> ModuleType:
    """The example, which without timm skips the test."""
    return importlib.import_module("tests.examples.timm_model")


def left_by(name: str, folder: Path, is_synchronized: bool = True) -> list[dict[str, Any]]:
    """What the two ranks of an example have saved."""
    start = (sys.executable,) if name == "lightning_layer_sync" else TORCHRUN  # Lightning starts the second one
    module = f"tests.examples.{name}"
    what = (module, folder) if is_synchronized else ("tests.support.unsynchronized", folder, module)
    run(*start, "-m", *what, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(2)]


def trained_alone(model: nn.Module, data: TensorDataset, is_shuffled: bool = False) -> dict[str, Tensor]:
    """The state after the same steps in one process, each with the 4 samples of both ranks.

    The sampler's order for one process is that of which two take alternate samples; Lightning shuffles by it, too.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in DataLoader(data, 2 * 4, sampler=DistributedSampler(data, 1, 0, shuffle=is_shuffled)):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model.state_dict()


def segmented_alone() -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The state after the same steps in one process with both ranks' crops, and the gradients of each step."""
    model, gradients = segmentation.build(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in zip(segmentation.crops(0), segmentation.crops(1), strict=True):
        scores = through(model, [images for images, _ in step])
        labels = torch.cat([labels.flatten() for _, labels in step])
        loss = F.cross_entropy(pixels_of(scores), labels, ignore_index=segmentation.UNLABELLED)
        optimizer.zero_grad()
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
        optimizer.step()
    return model.state_dict(), gradients


def through(model: nn.Sequential, parts: list[Tensor]) -> list[Tensor]:
    """Batches of different sizes through one model: a batch norm takes all their pixels as one batch."""
    for layer in model:
        if isinstance(layer, nn.BatchNorm2d):
            sizes = [part[:, 0].numel() for part in parts]
            normalized = layer(pixels_of(parts)[..., None, None]).flatten(1).split(sizes)
            parts = [
                new.reshape(len(part), *part.shape[2:], -1).movedim(-1, 1)
                for new, part in zip(normalized, parts, strict=True)
            ]
        else:
            parts = [layer(part) for part in parts]
    return parts


def pixels_of(parts: list[Tensor]) -> Tensor:
    """(pixels, C) of all batches (N, C, H, W)"""
    return torch.cat([part.movedim(1, -1).flatten(0, -2) for part in parts])


def assert_equal(actual: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(actual) == list(right)
    for name, value in right.items():
        assert actual[name].shape == value.shape, name
        difference = (actual[name] - value).abs().max()
        assert difference <= LIMIT * value.abs().max().clamp_min(1e-3), name


def assert_trained_as_one(left: list[dict[str, Any]], right: dict[str, Tensor]) -> None:
    """Both ranks have the same state to the bit, and it is that of the one process."""
    first, second = (each["state"] for each in left)
    assert all(torch.equal(first[name], second[name]) for name in right)
    assert_equal(first, right)


def test_lightning_layer_sync(tmp_path: Path) -> None:
    """Lightning with LayerSync trains as one process does; the layers are ours while it fits, theirs again after."""
    need("pytorch_lightning")
    right = trained_alone(build(), samples(), is_shuffled=True)
    left = left_by("lightning_layer_sync", tmp_path)
    assert_trained_as_one(left, right)
    assert all(each["was_synchronized"] and each["is_reverted"] for each in left)


def test_accelerate_training(tmp_path: Path) -> None:
    """A model that is converted and then prepared by accelerate trains as one process does."""
    need("accelerate")
    left = left_by("accelerate_training", tmp_path)
    assert_trained_as_one(left, trained_alone(build(), samples()))
    assert [(each["ranks"], each["distributed"]) for each in left] == [(2, "MULTI_CPU")] * 2


def test_timm_model(tmp_path: Path) -> None:
    """A timm MobileNetV3 under DDP trains as one process does with timm's own layers, all 34 of them converted."""
    shown = timm_model()
    right = trained_alone(shown.build(), samples(64))
    left = left_by("timm_model", tmp_path)
    assert_trained_as_one(left, right)
    assert [each["report"].count(" converted ") for each in left] == [34, 34]


def test_segmentation_uneven_crops(tmp_path: Path) -> None:
    """With uneven crops on each rank, state and every step's gradients are those of one process with all pixels."""
    sizes = [[images.shape for images, _ in segmentation.crops(rank)] for rank in range(2)]
    assert all(a[2:] != b[2:] for a, b in zip(*sizes, strict=True))
    assert any(a[0] != b[0] for a, b in zip(*sizes, strict=True))
    right, right_gradients = segmented_alone()
    left = left_by("segmentation_uneven_crops", tmp_path)
    assert_trained_as_one(left, right)
    for each in left:
        for step, gradients in zip(each["gradients"], right_gradients, strict=True):
            assert_equal(step, gradients)


RIGHT: dict[str, Callable[[], dict[str, Tensor]]] = {
    "accelerate_training": lambda: trained_alone(build(), samples()),
    "timm_model": lambda: trained_alone(timm_model().build(), samples(64)),
    "segmentation_uneven_crops": lambda: segmented_alone()[0],
}


@pytest.mark.parametrize("name", RIGHT)
def test_without_synchronization_they_differ(name: str, tmp_path: Path) -> None:
    """The comparisons can fail: unconverted, each rank's running statistics are none of the one process's.

    Lightning's starts take longest, and its net, samples and comparison are those of accelerate.
    """
    if name == "accelerate_training":
        need("accelerate")
    right = RIGHT[name]()
    first, second = (each["state"] for each in left_by(name, tmp_path, is_synchronized=False))
    for key in right:
        if "running" in key:
            assert min(error(first[key], right[key]), error(second[key], right[key])) > 1e-3, key
            assert not torch.equal(first[key], second[key]), key
