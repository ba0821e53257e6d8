"""Which goals do the rows in a folder meet? One line a goal, with the worst row of its kind.

    python -m benchmarks.summary out

Of what was measured more than once, the last counts. Files may be missing, and rows cut short; torch is not needed.
"""

import sys
from pathlib import Path

from benchmarks.goals import GOALS, KEYS, Goal, Rows, key_of
from benchmarks.tables import read_rows

MODES = ("cache", "mode", "comparison")
"""Columns that say so where a call could not be captured."""


def read(folder: Path, script: str) -> Rows:
    """The last row of each comparison and variant; one that lacks a column was cut."""
    found = [row for path in sorted(folder.glob(f"{script}-*.csv")) for row in read_rows(path)]
    whole = [row for row in found if None not in row and None not in row.values()]
    return {key_of(script, row, row.get("variant", "")): row for row in whole}


def line(goal: Goal, rows: Rows) -> str:
    """met, missed or not measured; the worst value, the limit, the goal, how many rows meet it, where the worst is."""
    limit = f"{'≤' if goal.is_most else '≥'} {goal.limit:<4g}"
    found = [(value, row) for row in rows.values() if (value := goal.value(row, rows)) is not None]
    if not found:
        return f"{'not measured':>12} {'':>7} {limit} {goal.name}"
    worst, row = (max if goal.is_most else min)(found, key=lambda pair: pair[0])
    where = " ".join(row[column] for column in KEYS[goal.script] if column not in goal.columns)
    counts = f"{sum(goal.met(value) for value, _ in found)} of {len(found)}"
    return f"{'met' if goal.met(worst) else 'missed':>12} {worst:>7.3g} {limit} {goal.name} ({counts}; worst: {where})"


def summary(folder: Path) -> list[str]:
    """At most two dozen lines."""
    files = {script: read(folder, script) for script in KEYS}
    lines = [line(goal, files[goal.script]) for goal in GOALS]
    counts = [sum(each.lstrip().startswith(found) for each in lines) for found in ("met", "missed", "not measured")]
    every = [row for rows in files.values() for row in rows.values()]
    uncaptured = sum(any("uncaptured" in row.get(column, "") for column in MODES) for row in every)
    rows = ", ".join(f"{script} {len(found)}" for script, found in files.items())
    head = "goals: {} met, {} missed, {} not measured".format(*counts)
    return [f"{head}; rows: {rows}; {uncaptured} of them not captured", *lines]


def main(argv: list[str] | None = None) -> None:
    (folder,) = sys.argv[1:] if argv is None else argv
    print(*summary(Path(folder)), sep="\n")


if __name__ == "__main__":
    main()
