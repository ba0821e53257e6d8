"""Rows of a results file: medians, ratios, and a CSV that is whole after every row. torch is not needed."""

import csv
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).resolve().parent / "results"

ENVIRONMENT = ("date", "commit", "machine", "device", "clocks", "torch", "triton", "ranks", "threads")
"""Columns of every timing row, before the script's own."""
TIMES = ("ms", "ms_p20", "ms_p80", "reps")

Row = dict[str, str]


class Summary(NamedTuple):
    """Milliseconds: the median and the 20th and 80th percentile of `reps` repetitions."""

    median: float
    p20: float
    p80: float
    reps: int

    def columns(self, unit: str = "ms") -> dict[str, Any]:
        """The four columns that it fills, in ms or us."""
        scale = {"ms": 1, "us": 1e3}[unit]
        times = (self.median, self.p20, self.p80)
        named = zip((unit, f"{unit}_p20", f"{unit}_p80"), times, strict=True)
        return {**{name: scale * ms for name, ms in named}, "reps": self.reps}

    def over(self, baseline: "Summary | None") -> float | str:
        """Median over the baseline's median in the same run; empty without one."""
        return self.median / baseline.median if baseline is not None and baseline.median > 0 else ""


def summarize(seconds: list[float]) -> Summary:
    """Percentiles by linear interpolation between order statistics; no repetition is left out."""
    ms = [1e3 * s for s in seconds]
    fifths = statistics.quantiles(ms, n=5, method="inclusive") if len(ms) > 1 else 4 * ms
    return Summary(statistics.median(ms), fifths[0], fifths[3], len(ms))


class Results:
    """A CSV file that is whole after every row: a run cut short leaves the rows measured until then."""

    def __init__(self, path: Path | None, columns: Iterable[str], append: bool = False) -> None:
        self.path, self.columns = path, list(columns)
        self.rows: list[Row] = []
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if append and path.exists():
            check_columns(path, self.columns)
            self.rows = read_rows(path)
        self._write_all()

    def add(self, row: Mapping[str, Any]) -> Row:
        """Write one row, and return it as written; its keys must be the columns, all of them."""
        if set(row) != set(self.columns):
            raise ValueError(f"A row has the columns of its file; {set(row) ^ set(self.columns)} is in one only.")
        shown = {key: _shown(value) for key, value in row.items()}
        self.rows.append(shown)
        if self.path is not None:
            with self.path.open("a", newline="") as file:
                csv.DictWriter(file, self.columns, lineterminator="\n").writerow(shown)
        return shown

    def amend(self, row: Row, values: Mapping[str, Any]) -> None:
        """Write a row that was added once more, with what was found out since."""
        row.update({key: _shown(value) for key, value in values.items()})
        self._write_all()

    def _write_all(self) -> None:
        """The file as a whole, put in the place of the last one."""
        if self.path is not None:
            new = self.path.with_suffix(".new")
            with new.open("w", newline="") as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)
            new.replace(self.path)


def read_rows(path: Path) -> list[Row]:
    """The rows of a results file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def check_columns(path: Path, columns: Iterable[str]) -> None:
    """Raise unless the file's header is these columns in this order."""
    with path.open(newline="") as file:
        header = next(csv.reader(file), [])
    if header != list(columns):
        raise ValueError(f"{path} has the columns {header}, not {list(columns)}. Write to another file.")


def _shown(value: Any) -> str:
    """Four significant digits for a float: more is noise."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
