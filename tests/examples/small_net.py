"""A net with two batch norms, and samples for it; any model and data would do in their place."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def build() -> nn.Module:
    torch.manual_seed(1)
    features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)).double()


def samples(size: int = 12) -> TensorDataset:
    """Images that differ in brightness and color, so that the ranks' own statistics do, and random labels."""
    torch.manual_seed(2)
    images = torch.randn(24, 3, size, size) + 2 * torch.randn(24, 3, 1, 1)
    return TensorDataset(images.double(), torch.randint(5, (24,)))
