"""What the measurements are held to. torch is not needed."""

import math
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.tables import Row

KEYS = {
    "kernels": ("verb", "epilogue", "shape", "layout", "dtype", "cache"),
    "layer": ("op", "shape", "layout", "dtype", "mode", "pass"),
    "host": ("shape", "layout", "dtype", "driver", "pass"),
    "step": ("comparison", "model", "batch", "image", "layout", "dtype"),
    "compile": ("model", "batch", "image", "layout", "dtype", "mode"),
    "parts": ("part",),
}
"""The columns that tell one comparison of a script from another."""

ITEMSIZES = {"float64": 8, "float32": 4}
SMALL, LARGE, HUGE = 3.3, 51, 64
"""Megabytes of an activation: 8x64x56x56 in half precision are 3.2, 32x256x56x56 are 51.4."""


Rows = dict[tuple[str, ...], Row]
"""By `key_of`."""


class Goal(NamedTuple):
    """A limit for every row of a script's file with these columns that is chosen.

    It is for the time of the variant `over` in the same comparison divided by the row's, at least, or, if `is_most`,
    for the row's divided by the variant's, at most; without a variant, for what stands in `column`.
    """

    name: str
    script: str
    limit: float
    columns: Row
    over: str = ""
    column: str = "ms"
    chosen: Callable[[Row], bool] = lambda row: True
    is_most: bool = False

    def met(self, value: float) -> bool:
        return value <= self.limit if self.is_most else value >= self.limit

    def value(self, row: Row, rows: Rows) -> float | None:
        """None for a row that it is not for, or that nothing can be said of."""
        try:
            if not (self.columns.items() <= row.items() and self.chosen(row)):
                return None
            mine = float(row[self.column])
            if not self.over:
                return mine
            other = float(rows[key_of(self.script, row, self.over)][self.column])
            return mine / other if self.is_most else other / mine
        except (KeyError, ValueError, ZeroDivisionError):  # not a row of this script, or of an older one
            return None


def key_of(script: str, row: Row, variant: str) -> tuple[str, ...]:
    """Which comparison a row is of, and which variant."""
    return row.get("machine", ""), *(row.get(column, "") for column in KEYS[script]), variant


def shape(row: Row) -> tuple[int, ...]:
    return tuple(map(int, row["shape"].split("x")))


def megabytes(row: Row) -> float:
    """Of the activation."""
    return math.prod(shape(row)) * ITEMSIZES.get(row["dtype"], 2) / 1e6


def _layer(
    name: str, limit: float, ours: str, other: str, columns: Row, chosen: Callable[[Row], bool] = lambda row: True
) -> list[Goal]:
    """In a graph and eager."""
    fixed = {"pass": "both", "variant": ours, **columns}
    modes = ("graph", "eager")
    return [Goal(f"{m}: {name}", "layer", limit, {**fixed, "mode": m}, other, chosen=chosen) for m in modes]


COLD = {"dtype": "bfloat16", "cache": "cold", "variant": "syncbn"}
LAST, FIRST = ({"dtype": "bfloat16", "layout": layout} for layout in ("channels_last", "contiguous"))
HALF = {"dtype": "float16", "op": "bn_add_relu"}
ALONE, FORCED = ("syncbn", "nn.BatchNorm"), ("syncbn.forced", "nn.SyncBatchNorm.forced")
HOST = {"variant": "syncbn", "pass": "both", "driver": "cuda"}
STEP = {"model": "resnet50", "batch": "32", "layout": "channels_last"}
STEPS = [(mode, variant) for mode in ("graph", "eager") for variant in ("syncbn.fused.forced", "syncbn")]
WATCHED = ("tests", "memcheck", "racecheck")

GOALS = [
    *(
        Goal(
            f"{verb}: copy / verb, channels_last ≥ 64 MB",
            *("kernels", limit, {**COLD, **LAST, "verb": verb}, "copy"),
            chosen=lambda row: megabytes(row) >= HUGE,
        )
        for verb, limit in (("batch_sums", 0.90), ("normalize", 0.90), ("grad_sums", 0.88), ("grad_input", 0.88))
    ),
    Goal(
        "any verb: copy / verb, contiguous, H×W ≥ 784",
        *("kernels", 0.85, {**COLD, **FIRST}, "copy"),
        chosen=lambda row: math.prod(shape(row)[2:]) >= 784,
    ),
    *_layer("forced over nn.SyncBatchNorm, ≤ 3 MB", 3.0, *FORCED, {}, lambda row: megabytes(row) <= SMALL),
    *_layer("forced over nn.SyncBatchNorm, ≥ 51 MB", 2.5, *FORCED, {}, lambda row: megabytes(row) >= LARGE),
    *_layer("over nn.BatchNorm, channels_last", 2.5, *ALONE, LAST),
    *_layer("over nn.BatchNorm, contiguous, C ≤ 128", 3.0, *ALONE, FIRST, lambda row: shape(row)[1] <= 128),
    *_layer("fp16 bn_add_relu over nn.BatchNorm", 1.5, *ALONE, HALF),
    Goal("eager forward + backward on the host, µs", "host", 90, HOST, column="us", is_most=True),
    *(
        Goal(
            f"{mode}: ResNet-50, {variant} / nn.BatchNorm",
            *("step", 1.0, {**STEP, "comparison": mode, "variant": variant}, "nn.BatchNorm"),
            is_most=True,
        )
        for mode, variant in STEPS
    ),
    Goal(
        "host syncs a step",
        *("step", 0, {"comparison": "eager"}, "", "host_syncs"),
        chosen=lambda row: row["variant"].startswith("syncbn"),
        is_most=True,
    ),
    Goal(
        "exit status of GPU tests, memcheck, racecheck",
        *("parts", 0, {}, "", "status"),
        chosen=lambda row: row["part"] in WATCHED,
        is_most=True,
    ),
]
