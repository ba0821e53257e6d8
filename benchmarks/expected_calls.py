"""What the benchmarks and the GPU tests will call, as far as it decides which kernels are compiled."""

import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

from benchmarks.shapes import DTYPES, gpu_plans, layer_plans, resnet50_norms
from tests.support.oracle import ACTIVATIONS

TEST_SHAPES = ((8, 64, 56, 56), (8, 512, 7, 7), (8, 3, 33, 31), (512, 1001))
MORE_TEST_SHAPES = ((8, 256, 14, 14), (8, 16, 32, 32), (2, 24, 5, 6, 7), (4096, 256), (16, 48, 129))
FIRST_KERNELS, FIRST_LAYERS = 24, 24


class Call(NamedTuple):
    """A forward and backward of a layer, as far as it decides what is compiled."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str = "contiguous"
    activation: str | None = None
    residual: bool = False
    masked: bool = False
    running: bool = True
    momentum: float | None = 0.1
    dy_layout: str | None = None


def calls() -> Iterator[Call]:
    """What the benchmarks and then the tests will call, the beginnings of each first."""
    kernels, layers = list(_kernels()), list(_layers())
    yield from kernels[: 2 * FIRST_KERNELS]
    yield from layers[:FIRST_LAYERS]
    yield Call((2, 64, 8, 8), torch.bfloat16, "channels_last")  # host.py
    yield from _steps(32, torch.bfloat16, "channels_last")
    yield from _tests(TEST_SHAPES, (torch.bfloat16,))
    yield from (Call((32, 64, 56, 56), torch.float32, activation="relu"), Call((32, 256, 28, 28), torch.float32))
    yield from (Call((n, 40, 9, 9), torch.float32, momentum=m) for n in (8, 0) for m in (0.1, None))
    yield from _steps(8, torch.float32, "contiguous", 64)  # step.py's check
    yield from kernels
    yield from layers
    yield from _tests(TEST_SHAPES + MORE_TEST_SHAPES, (*DTYPES.values(), torch.float64))
    for activation, residual, masked in itertools.product(ACTIVATIONS, (False, True), (False, True)):
        yield Call((6, 20, 9, 16), torch.float32, "contiguous", activation, residual, masked)
    for layout, dy_layout in itertools.product(("sliced", "channels_last"), ("contiguous", "channels_last", "sliced")):
        yield Call((6, 20, 9, 10), torch.float32, layout, "relu", dy_layout=dy_layout)
    for batch, layout in ((8, "channels_last"), (2, "channels_last"), (32, "contiguous")):
        yield from _steps(batch, torch.bfloat16, layout)


def _kernels() -> Iterator[Call]:
    for plan in gpu_plans():
        for fused in (False, True):
            yield Call(plan.shape, DTYPES[plan.dtype], plan.layout, "relu" if fused else None, fused, running=False)


def _layers() -> Iterator[Call]:
    for plan, op in layer_plans():
        fused = op == "bn_add_relu"
        yield Call(plan.shape, DTYPES[plan.dtype], plan.layout, "relu" if fused else None, fused)


def _steps(batch: int, dtype: torch.dtype, layout: str, image: int = 224) -> Iterator[Call]:
    """A training step's, as a drop-in and fused."""
    for shape in dict.fromkeys(resnet50_norms(batch, image)):
        for activation, residual in ((None, False), ("relu", False), ("relu", True)):
            yield Call(shape, dtype, layout, activation, residual)


def _tests(shapes: Iterable[tuple[int, ...]], dtypes: Iterable[torch.dtype]) -> Iterator[Call]:
    for dtype, shape, layout in itertools.product(dtypes, shapes, ("contiguous", "channels_last")):
        yield Call(shape, dtype, layout, residual=True, dy_layout=layout)
