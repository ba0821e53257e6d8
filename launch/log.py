"""The log of a run: one JSON line per epoch, each once, however often the run was interrupted and resumed."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Log:
    """The rows of a run so far; a checkpoint holds them, so the file can lag behind it, but is never ahead.

    path is None where nothing is to be written: on all ranks but the first, and without --log-file.
    """

    def __init__(self, path: Path | None) -> None:
        self.path, self.run = path, secrets.token_hex(8)  # a file may hold many runs, and twice the same
        self.rows: list[Row] = []

    def state_dict(self) -> Row:
        return {"run": self.run, "rows": self.rows}

    def load_state_dict(self, state: Row) -> None:
        self.run, self.rows = state["run"], state["rows"]

    def write(self) -> None:
        """Append the rows that the file lacks; a last line that was cut off is taken away first."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        *lines, rest = (self.path.read_bytes() if self.path.is_file() else b"").split(b"\n")
        if rest and not parsed(rest):
            os.truncate(self.path, sum(len(line) + 1 for line in lines))
            rest = b""
        there = {row.get("epoch") for row in map(parsed, [*lines, rest]) if row.get("run") == self.run}
        missing = [json.dumps({**row, "run": self.run}) + "\n" for row in self.rows if row["epoch"] not in there]
        if missing:
            with self.path.open("a") as file:
                file.write("\n" * bool(rest) + "".join(missing))


def worded(result: dict[str, float]) -> str:
    """Results in words, those called accuracy as percentages."""
    return ", ".join(f"{k.replace('_', ' ')} {v:{'.2%' if 'accuracy' in k else '.4f'}}" for k, v in result.items())


def parsed(line: bytes) -> Row:
    """The row that line holds; an empty one if it holds something else."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
