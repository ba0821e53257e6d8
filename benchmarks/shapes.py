"""What is measured: input shapes (N, C, *S), the more telling ones first."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]
LAYOUTS = ("contiguous", "channels_last")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

CPU_SHAPES: tuple[Shape, ...] = (
    (8, 64, 56, 56),  # ResNet-50, its early layers
    (8, 256, 28, 28),
    (8, 512, 14, 14),
    (32, 2048, 7, 7),  # and its last ones
    (2, 64, 112, 112),  # batch 2, as in detection
    (4096, 256),  # an MLP
    (8, 256, 400),  # speech
    (2, 32, 8, 28, 28),  # video
    (8, 256, 14, 14),  # where the rest of a call begins to count
    (2, 64, 4, 4),  # and where it is all there is
)
SMOKE_SHAPES: tuple[Shape, ...] = ((4, 8, 5, 5), (16, 12))


class Plan(NamedTuple):
    """One comparison."""

    shape: Shape
    dtype: str
    layout: str

    def __str__(self) -> str:
        return " ".join(self.columns().values())

    def columns(self) -> dict[str, str]:
        """Those of a row."""
        return {"shape": shown(self.shape), "dtype": self.dtype, "layout": self.layout}


class LayerCall(NamedTuple):
    """One comparison of layers: bn, or bn_add_relu, y = relu(bn(x) + residual)."""

    plan: Plan
    op: str

    def __str__(self) -> str:
        return f"{self.plan} {self.op}"

    @property
    def fused(self) -> bool:
        return self.op == "bn_add_relu"


def shown(shape: Shape) -> str:
    return "x".join(map(str, shape))


def in_layout(t: Tensor, layout: str) -> Tensor:
    """t in one of `LAYOUTS`; (N, C) and (N, C, L) have only the first."""
    if layout == "contiguous":
        return t.contiguous()
    return t.contiguous(memory_format=torch.channels_last if t.ndim == 4 else torch.channels_last_3d)


def cpu_plans(smoke: bool = False) -> list[LayerCall]:
    """Every shape and layout in float32, then the first shape in bfloat16 and fused."""
    shapes = SMOKE_SHAPES if smoke else CPU_SHAPES
    calls = [(shape, "float32", "bn") for shape in shapes]
    calls += [(shapes[0], "bfloat16", "bn"), (shapes[0], "float32", "bn_add_relu")]
    return [LayerCall(Plan(shape, dtype, at), op) for shape, dtype, op in calls for at in layouts_of(shape)]


def layouts_of(shape: Shape) -> tuple[str, ...]:
    """torch has a channels-last memory format for (N, C, H, W) and (N, C, D, H, W) only."""
    return LAYOUTS if len(shape) in (4, 5) else LAYOUTS[:1]


RESNET50_STAGES = ((64, 3), (128, 4), (256, 6), (512, 3))
"""(width, blocks) of the four stages; the first sees a quarter of the image's side, each other half of the last's."""


def resnet50_norms(batch: int, image: int = 224) -> Iterator[Shape]:
    """The input of each of ResNet-50's 53 batch norms, in order; stride in the 3×3 convolution."""
    yield (batch, 64, image // 2, image // 2)
    side_in = image // 4
    for stage, (width, blocks) in enumerate(RESNET50_STAGES):
        side = image // 4 >> stage
        for block in range(blocks):
            yield (batch, width, side_in if block == 0 else side, side_in if block == 0 else side)
            yield (batch, width, side, side)
            yield (batch, 4 * width, side, side)
            if block == 0:
                yield (batch, 4 * width, side, side)
        side_in = side


TYPICAL: tuple[Shape, ...] = (
    (2, 256, 200, 336),  # detection, 800×1344: the first stage's output
    (8, 256, 128, 256),  # segmentation, 512×1024
    (2, 64, 400, 672),
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 512, 28, 28),
    (8, 64, 56, 56),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (4096, 2048),
    (8, 2048, 7, 7),
    (8, 64, 256, 512),
    (2, 2048, 25, 42),
    (8, 2048, 16, 32),
)
LAYER_FIRST: tuple[Shape, ...] = ((8, 64, 56, 56), (8, 128, 28, 28), (32, 256, 56, 56))
LAYER_NEXT: tuple[Shape, ...] = ((32, 64, 112, 112),)
LAYER_HALF: tuple[Shape, ...] = ((32, 256, 56, 56), (8, 64, 56, 56))
OPS = ("bn_add_relu", "bn")


def gpu_shapes() -> list[Shape]:
    """Typical first: a few of each kind, large ones before, then all of ResNet-50 at batch 32, 8 and 2."""
    resnet = [shape for batch in (32, 8, 2) for shape in resnet50_norms(batch)]
    return list(dict.fromkeys([*TYPICAL, *resnet]))


def gpu_plans(smoke: bool = False) -> list[Plan]:
    """Coarse to fine: every shape in bfloat16, both layouts; then the other dtypes."""
    if smoke:
        return _plans(SMOKE_SHAPES, "bfloat16")
    return [plan for dtype in ("bfloat16", "float16", "float32") for plan in _plans(gpu_shapes(), dtype)]


def layer_plans(smoke: bool = False) -> list[LayerCall]:
    """Small inputs, where the host's time counts, one large, fused float16; then as `gpu_plans`."""
    first = [] if smoke else [(plan, OPS) for plan in _plans(LAYER_FIRST, "bfloat16")]
    first += [] if smoke else [(plan, OPS[:1]) for plan in _plans(LAYER_HALF, "float16")]
    first += [] if smoke else [(plan, OPS) for plan in _plans(LAYER_NEXT, "bfloat16")]
    every = [*first, *((plan, OPS) for plan in gpu_plans(smoke))]
    return list(dict.fromkeys(LayerCall(plan, op) for plan, ops in every for op in ops))


def _plans(shapes: Iterable[Shape], dtype: str) -> list[Plan]:
    return [Plan(shape, dtype, layout) for shape in shapes for layout in reversed(layouts_of(shape))]
