"""Layers and models that the swapping tests share."""

import torch
from torch import nn
from torch.nn.utils import parametrize

PLAIN = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
SHAPES = {1: (4, 3, 5), 2: (4, 3, 5, 5), 3: (4, 3, 2, 5, 5)}


class Tagged(nn.BatchNorm2d):
    """A subclass that adds an attribute and no forward."""

    def __init__(self, *args, tag: str = "", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.tag = tag


class Squared(nn.BatchNorm2d):
    """A subclass whose forward does more."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).square()


def model() -> nn.Sequential:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ModuleDict({"a": nn.BatchNorm2d(4)})["a"], nn.ReLU())
    net(torch.randn(8, 3, 5, 5))
    return net


def reparametrized(layer: nn.Module) -> None:
    """Give its weight a parametrization that changes nothing."""
    parametrize.register_parametrization(layer, "weight", nn.Identity())
