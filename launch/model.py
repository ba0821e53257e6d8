"""The convolutional network of train.py, with one of four normalizations."""

from collections.abc import Callable

from torch import Tensor, nn

import syncbn

NORMS = ("syncbn", "batch", "instance", "group")
WIDTHS_AND_STRIDES = ((32, 2), (64, 2), (64, 1), (64, 1), (64, 1), (64, 1))


class SmallCNN(nn.Module):
    """Six 3×3 convolutions, each normalized, the first two with stride 2; then mean over positions and linear.

    (N, in_channels, H, W) -> (N, 10) logits. An 8×8 digit is 2×2 from the second layer on, so a batch of 2 gives
    unsynchronized batch norm 8 values per channel there, as deep layers of large networks have with small batches.
    """

    def __init__(self, in_channels: int, make_norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width, stride in WIDTHS_AND_STRIDES:
            layers += [nn.Conv2d(in_channels, width, 3, stride, padding=1, bias=False), make_norm(width), nn.ReLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(in_channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.features(x).mean((2, 3)))


def build(norm: str, in_channels: int) -> nn.Module:
    """SmallCNN with norm; 'syncbn' is the 'batch' model converted, as one would convert one's own."""
    if norm == "instance":
        return SmallCNN(in_channels, lambda width: nn.InstanceNorm2d(width, affine=True))
    if norm == "group":
        return SmallCNN(in_channels, lambda width: nn.GroupNorm(8, width))
    model = SmallCNN(in_channels, nn.BatchNorm2d)
    return syncbn.convert_sync_batchnorm(model) if norm == "syncbn" else model
