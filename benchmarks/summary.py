"""Which goals do the rows in a folder meet? One line a goal, with the worst row of its kind.

    python -m benchmarks.summary out

Of what was measured more than once, the last counts. Files may be missing, and rows cut short; torch is not needed.
"""

import csv
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

Row = dict[str, str]
Baseline = Callable[[str], Row | None]
"""The row of another variant in the same comparison."""

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


class Goal(NamedTuple):
    """A limit for every row of a script's file with these columns that is chosen."""

    name: str
    script: str
    limit: float
    columns: Row
    measure: Callable[[Row, Baseline], float | None]
    chosen: Callable[[Row], bool] = lambda row: True
    is_least: bool = True


class Verdict(NamedTuple):
    """The worst value and its row, and how many of the rows meet the goal."""

    value: float
    row: Row
    met: int
    rows: int


def faster_than(variant: str) -> Callable[[Row, Baseline], float | None]:
    """How many times as long the variant takes."""

    def measure(row: Row, baseline: Baseline) -> float | None:
        other = baseline(variant)
        return float(other["ms"]) / float(row["ms"]) if other is not None else None

    return measure


def over(variant: str) -> Callable[[Row, Baseline], float | None]:
    """The time over the variant's."""
    inverse = faster_than(variant)

    def measure(row: Row, baseline: Baseline) -> float | None:
        value = inverse(row, baseline)
        return 1 / value if value is not None else None

    return measure


def value_of(column: str) -> Callable[[Row, Baseline], float | None]:
    """What stands in the column, if anything."""
    return lambda row, _: float(row[column]) if row[column] else None


def shape(row: Row) -> tuple[int, ...]:
    return tuple(map(int, row["shape"].split("x")))


def megabytes(row: Row) -> float:
    """Of the activation."""
    return math.prod(shape(row)) * ITEMSIZES.get(row["dtype"], 2) / 1e6


def _verb(verb: str, limit: float) -> Goal:
    columns = {"verb": verb, "layout": "channels_last", "dtype": "bfloat16", "cache": "cold", "variant": "syncbn"}
    name = f"{verb}: copy / verb, channels_last ≥ 64 MB"
    return Goal(name, "kernels", limit, columns, faster_than("copy"), lambda row: megabytes(row) >= HUGE)


def _layer(
    name: str, limit: float, ours: str, other: str, columns: Row, chosen: Callable[[Row], bool] = lambda row: True
) -> list[Goal]:
    """In a graph and eager."""
    fixed = {"pass": "both", "variant": ours, **columns}
    return [
        Goal(f"{mode}: {name}", "layer", limit, {**fixed, "mode": mode}, faster_than(other), chosen)
        for mode in ("graph", "eager")
    ]


BF16 = {"dtype": "bfloat16"}
PLANES = {"layout": "contiguous", "dtype": "bfloat16", "cache": "cold", "variant": "syncbn"}
STEP = {"model": "resnet50", "batch": "32", "layout": "channels_last"}
FORCED = ("syncbn.forced", "nn.SyncBatchNorm.forced", {})
ALONE = ("syncbn", "nn.BatchNorm")
WATCHED = ("tests", "memcheck", "racecheck")

GOALS = [
    *(_verb(verb, 0.90) for verb in ("batch_sums", "normalize")),
    *(_verb(verb, 0.88) for verb in ("grad_sums", "grad_input")),
    Goal(
        "any verb: copy / verb, contiguous, H×W ≥ 784",
        *("kernels", 0.85, PLANES, faster_than("copy")),
        lambda row: math.prod(shape(row)[2:]) >= 784,
    ),
    *_layer("forced over nn.SyncBatchNorm, ≤ 3 MB", 3.0, *FORCED, lambda row: megabytes(row) <= SMALL),
    *_layer("forced over nn.SyncBatchNorm, ≥ 51 MB", 2.5, *FORCED, lambda row: megabytes(row) >= LARGE),
    *_layer("over nn.BatchNorm, channels_last", 2.5, *ALONE, {**BF16, "layout": "channels_last"}),
    *_layer(
        "over nn.BatchNorm, contiguous, C ≤ 128",
        *(3.0, *ALONE, {**BF16, "layout": "contiguous"}),
        lambda row: shape(row)[1] <= 128,
    ),
    *_layer("fp16 bn_add_relu over nn.BatchNorm", 1.5, *ALONE, {"dtype": "float16", "op": "bn_add_relu"}),
    Goal(
        "eager forward + backward on the host, µs",
        *("host", 90, {"variant": "syncbn", "pass": "both", "driver": "cuda"}, value_of("us")),
        is_least=False,
    ),
    *(
        Goal(
            f"{comparison}: ResNet-50, {variant} / nn.BatchNorm",
            *("step", 1.0, {**STEP, "comparison": comparison, "variant": variant}, over("nn.BatchNorm")),
            is_least=False,
        )
        for comparison in ("graph", "eager")
        for variant in ("syncbn.fused.forced", "syncbn")
    ),
    Goal(
        "host syncs a step",
        *("step", 0, {"comparison": "eager"}, value_of("host_syncs")),
        lambda row: row["variant"].startswith("syncbn"),
        is_least=False,
    ),
    Goal(
        "exit status of GPU tests, memcheck, racecheck",
        *("parts", 0, {}, value_of("status")),
        lambda row: row["part"] in WATCHED,
        is_least=False,
    ),
]


def read(folder: Path, script: str) -> dict[tuple[str, ...], Row]:
    """The last row of each comparison and variant."""
    rows: dict[tuple[str, ...], Row] = {}
    for path in sorted(folder.glob(f"{script}-*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                if None not in row and None not in row.values():  # else it was cut
                    rows[_key(script, row, row.get("variant", ""))] = row
    return rows


def _key(script: str, row: Row, variant: str) -> tuple[str, ...]:
    return row.get("machine", ""), *(row.get(column, "") for column in KEYS[script]), variant


def _other(rows: dict[tuple[str, ...], Row], script: str, row: Row, variant: str) -> Row | None:
    return rows.get(_key(script, row, variant))


def judge(goal: Goal, rows: dict[tuple[str, ...], Row]) -> Verdict | None:
    """None if there is no row."""
    values: list[tuple[float, Row]] = []
    for row in rows.values():
        try:
            if all(row[column] == value for column, value in goal.columns.items()) and goal.chosen(row):
                value = goal.measure(row, partial(_other, rows, goal.script, row))
                values += [] if value is None else [(value, row)]
        except (KeyError, ValueError, ZeroDivisionError):  # not a row of this script, or of an older one
            continue
    if not values:
        return None
    worst = (min if goal.is_least else max)(values, key=lambda pair: pair[0])
    return Verdict(*worst, sum(meets(goal, value) for value, _ in values), len(values))


def meets(goal: Goal, value: float) -> bool:
    return value >= goal.limit if goal.is_least else value <= goal.limit


def line(goal: Goal, verdict: Verdict | None) -> str:
    """met, missed or not measured; the worst value, the limit, the goal, and where that was."""
    limit = f"{'≥' if goal.is_least else '≤'} {goal.limit:<4g}"
    if verdict is None:
        return f"{'not measured':>12} {'':>7} {limit} {goal.name}"
    where = " ".join(verdict.row[column] for column in KEYS[goal.script] if column not in goal.columns)
    found = "met" if meets(goal, verdict.value) else "missed"
    return f"{found:>12} {verdict.value:>7.3g} {limit} {goal.name} ({verdict.met} of {verdict.rows}; worst: {where})"


def summary(folder: Path) -> list[str]:
    """At most two dozen lines."""
    files = {script: read(folder, script) for script in KEYS}
    verdicts = [(goal, judge(goal, files[goal.script])) for goal in GOALS]
    lines = [line(goal, verdict) for goal, verdict in verdicts]
    counts = [sum(each.lstrip().startswith(found) for each in lines) for found in ("met", "missed", "not measured")]
    uncaptured = sum(
        "uncaptured" in f"{row.get('cache')} {row.get('mode')} {row.get('comparison')}"
        for f in files.values()
        for row in f.values()
    )
    rows = ", ".join(f"{script} {len(found)}" for script, found in files.items())
    head = "goals: {} met, {} missed, {} not measured".format(*counts)
    return [f"{head}; rows: {rows}; {uncaptured} of them not captured", *lines]


def main(argv: list[str] | None = None) -> None:
    (folder,) = sys.argv[1:] if argv is None else argv
    print(*summary(Path(folder)), sep="\n")


if __name__ == "__main__":
    main()
