"""The two data sets of train.py as uint8 tensors: no download, no pickle, no torchvision."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

DIGITS_TEST = 599  # of 1,797: a third, and odd, so that two ranks never get equal shares
RECORD = 1 + 3 * 32 * 32  # CIFAR-10 binary: a label byte, then the red, the green and the blue plane, row by row
CIFAR_TRAIN = [f"data_batch_{i}.bin" for i in range(1, 6)]
CIFAR_FOLDER = "cifar-10-batches-bin"  # what the official archive unpacks to
CIFAR_SOURCE = "CIFAR-10 binary version, University of Toronto, https://www.cs.toronto.edu/~kriz/cifar.html"


class Data(NamedTuple):
    """images (N, C, H, W) uint8, labels (N,) int64; pixels' mean and std per channel; augment in training?"""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: bool


def load(name: str, data_dir: str) -> Data:
    """'digits' from scikit-learn, or 'cifar10' from the files in data_dir; ValueError if those are not right."""
    return load_digits() if name == "digits" else load_cifar10(Path(data_dir))


def load_digits() -> Data:
    """1,797 real handwritten digits, 8×8; the same stratified third is the test set whatever the training seed."""
    from sklearn.datasets import load_digits as sklearn_digits
    from sklearn.model_selection import train_test_split

    images, labels = sklearn_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=DIGITS_TEST, stratify=labels, random_state=0)
    train_images, test_images = (torch.from_numpy(a.astype(np.uint8)).view(-1, 1, 8, 8) for a in parts[:2])
    train_labels, test_labels = (torch.from_numpy(a.astype(np.int64)) for a in parts[2:])
    return Data(train_images, train_labels, test_images, test_labels, (4.9,), (6.0,), augment=False)


def load_cifar10(data_dir: Path) -> Data:
    """The five training files and the test file, from data_dir or its sub-folder of the official archive's name."""
    folder = data_dir / CIFAR_FOLDER if (data_dir / CIFAR_FOLDER).is_dir() else data_dir
    missing = [name for name in (*CIFAR_TRAIN, "test_batch.bin") if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"--data cifar10 needs the files data_batch_1.bin to data_batch_5.bin and test_batch.bin in --data-dir; "
            f"{folder} has no {', '.join(missing)}. Get them from: {CIFAR_SOURCE}; "
            f"unpack the archive in {data_dir}, or pass --data-dir with the folder that holds them."
        )
    train = [read_cifar10(folder / name) for name in CIFAR_TRAIN]
    train_images, train_labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    mean, std = (125.3, 123.0, 113.9), (63.0, 62.1, 66.7)
    return Data(train_images, train_labels, *read_cifar10(folder / "test_batch.bin"), mean, std, augment=True)


def read_cifar10(path: Path) -> tuple[Tensor, Tensor]:
    """images (N, 3, 32, 32) uint8 and labels (N,) of one binary file; ValueError if it is not whole records."""
    raw = np.fromfile(path, dtype=np.uint8)
    if raw.size == 0 or raw.size % RECORD:
        raise ValueError(
            f"A CIFAR-10 binary file is a whole number of {RECORD}-byte records; {path} has {raw.size} bytes. "
            f"It is truncated or something else: get it again from: {CIFAR_SOURCE}."
        )
    records = torch.from_numpy(raw).view(-1, RECORD)
    labels = records[:, 0].long()
    if labels.max() > 9:
        raise ValueError(
            f"A CIFAR-10 record starts with a label from 0 to 9; {path} has one that starts with {int(labels.max())}. "
            f"It is damaged or something else: get it again from: {CIFAR_SOURCE}."
        )
    return records[:, 1:].reshape(-1, 3, 32, 32), labels


def crop_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 4 pixels each way over zeros and mirrored with probability ½; (N, C, H, W)."""
    n, _, h, w = images.shape
    padded = F.pad(images, (4, 4, 4, 4))
    rows = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(h)
    columns = torch.randint(0, 9, (n, 1), generator=generator) + torch.arange(w)
    mirrored = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    picked = padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None, :]]  # (N, H, W, C)
    return picked.permute(0, 3, 1, 2)
