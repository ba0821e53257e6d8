"""ResNet-50 in plain torch, with the normalization, the add and the ReLU behind one seam: norm(channels, relu).

Source: He et al., Deep Residual Learning for Image Recognition, 2015 (arXiv:1512.03385), table 1; the stride of a block
is in its 3×3 convolution, as in common implementations.
"""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn import groups

Norm = Callable[[int, bool], nn.Module]
"""(channels, relu) -> a module of (x, residual or None): relu?(bn(x) + residual?)"""


class Unfused(nn.Module):
    """A batch norm layer, then torch's add and relu; in place on a GPU, as torchvision has them."""

    def __init__(self, bn: nn.Module, relu: bool) -> None:
        super().__init__()
        self.bn, self.relu = bn, relu

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = self.bn(x)
        if residual is not None:
            y = y.add_(residual) if y.is_cuda else y + residual
        return F.relu(y, inplace=y.is_cuda) if self.relu else y


class ForcedTorchSync(nn.BatchNorm2d):
    """nn.SyncBatchNorm's synchronized path in a group of one; CUDA only."""

    def forward(self, x: Tensor) -> Tensor:
        from torch.nn.modules._functions import SyncBatchNorm

        self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var, self.eps, self.momentum)
        return SyncBatchNorm.apply(x, self.weight, self.bias, *statistics, dist.group.WORLD, 1)


FORCED: Any = object()
"""A process_group by which our collectives are issued in a group of one, too, after `allow_forced`."""
_peers, _is_group = groups.peers, groups.is_group


def allow_forced() -> None:
    """Let the library take FORCED for peers; whatever else it is given, as ever."""
    groups.peers = lambda group: dist.group.WORLD if group is FORCED else _peers(group)
    groups.is_group = lambda given: given is FORCED or _is_group(given)


class ForcedOurs(syncbn.SyncBatchNorm):
    """Ours with its collectives issued in a group of one."""

    def __init__(self, *settings: Any, **named: Any) -> None:
        allow_forced()
        super().__init__(*settings, **named)
        self.__dict__["process_group"] = FORCED  # which has no ranks to be remembered


NORMS: dict[str, Norm] = {
    "nn.BatchNorm": lambda channels, relu: Unfused(nn.BatchNorm2d(channels), relu),
    "nn.SyncBatchNorm.forced": lambda channels, relu: Unfused(ForcedTorchSync(channels), relu),
    "syncbn": lambda channels, relu: Unfused(syncbn.SyncBatchNorm(channels), relu),
    "syncbn.fused": lambda channels, relu: syncbn.SyncBatchNorm(channels, activation="relu" if relu else None),
    "syncbn.fused.forced": lambda channels, relu: ForcedOurs(channels, activation="relu" if relu else None),
}


class Bottleneck(nn.Module):
    """1×1, 3×3, 1×1 convolutions, each normalized; the input or its projection is added before the last ReLU."""

    def __init__(self, channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv(channels, width, 1), norm(width, True)
        self.conv2, self.norm2 = _conv(width, width, 3, stride), norm(width, True)
        self.conv3, self.norm3 = _conv(width, 4 * width, 1), norm(4 * width, True)
        self.project = stride != 1 or channels != 4 * width
        if self.project:
            self.conv4, self.norm4 = _conv(channels, 4 * width, 1, stride), norm(4 * width, False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        residual = self.norm4(self.conv4(x)) if self.project else x
        return self.norm3(self.conv3(y), residual)


class ResNet50(nn.Module):
    """(N, 3, H, W) -> (N, classes); width and blocks shrink it for a smoke run."""

    def __init__(
        self, norm: Norm, classes: int = 1000, width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3)
    ) -> None:
        super().__init__()
        self.conv, self.norm = _conv(3, width, 7, 2), norm(width, True)
        layers: list[nn.Module] = []
        channels = width
        for stage, count in enumerate(blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                layers.append(Bottleneck(channels, width << stage, stride, norm))
                channels = 4 * (width << stage)
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.norm(self.conv(x)), 3, 2, 1)
        return self.head(self.blocks(y).mean((2, 3)))


def _conv(channels: int, out: int, size: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
