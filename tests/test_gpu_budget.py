"""What a kernel may cost on an H100, held against its machine code: loads under way, instructions, sums read again."""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.launches import verb_of, work_of
from benchmarks.static import DTYPES, SHAPES, calls
from benchmarks.tables import read_rows

triton = pytest.importorskip("triton", reason="triton is made for Linux only")

ROOT = Path(__file__).parent.parent
CALLS = {
    "bf16": ("2x256x200x336", "32x64x112x112", "32x512x28x28", "32x2048x7x7"),
    "fp32": ("2x256x200x336",),
}
"""Shapes by dtype: large, few channels, planes of odd and of tiny size; the others' kernels are like these."""

KILOBYTES_IN_FLIGHT = 32
"""Of an SM, at least: twice what 3 TB/s over 132 SMs need at 0.7 µs a load, since loads come in bursts."""

BYTES_LAST_PROGRAM_READS = 66 * 1024
"""At most, of other programs' sums: the last program of a group adds them alone, when all others are done."""


class Most(NamedTuple):
    """Instructions per element of the streaming loop, and with an addition and relu; those done once, and barriers."""

    per_element: float
    fused: float
    once: int
    barriers: int


LIMITS = {
    ("batch_sums", "NHWC", "bf16"): Most(11, 0, 780, 14),
    ("batch_sums", "NCHW", "bf16"): Most(12, 0, 1180, 30),
    ("batch_sums", "NHWC", "fp32"): Most(8.6, 0, 510, 15),
    ("batch_sums", "NCHW", "fp32"): Most(9.8, 0, 490, 13),
    ("normalize", "NHWC", "bf16"): Most(8.2, 11.8, 900, 9),
    ("normalize", "NCHW", "bf16"): Most(10.7, 13.5, 790, 9),
    ("normalize", "NHWC", "fp32"): Most(9.5, 13.7, 690, 3),
    ("normalize", "NCHW", "fp32"): Most(12.6, 17.2, 660, 3),
    ("grad_sums", "NHWC", "bf16"): Most(12, 16.2, 630, 25),
    ("grad_sums", "NCHW", "bf16"): Most(13.3, 18.5, 1010, 27),
    ("grad_sums", "NHWC", "fp32"): Most(9.9, 14.8, 470, 16),
    ("grad_sums", "NCHW", "fp32"): Most(12.7, 19.7, 470, 7),
    ("grad_input", "NHWC", "bf16"): Most(13.1, 21.4, 520, 11),
    ("grad_input", "NCHW", "bf16"): Most(19, 23.4, 590, 11),
    ("grad_input", "NHWC", "fp32"): Most(13.7, 22.9, 440, 3),
    ("grad_input", "NCHW", "fp32"): Most(17.1, 27.3, 490, 3),
}
"""By verb, layout and dtype: the most that Triton 3.6.0, 3.7.1 and 3.9.0 make of the kernels, and a tenth more."""

SLACK = 1.2 if triton.__version__.startswith("3.8.") else 1.0
"""Of the instructions per element: Triton 3.8.0 makes a sixth more of some than those before and after it."""

Row = dict[str, str]
every_limit = pytest.mark.parametrize(("verb", "layout", "dtype"), LIMITS)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    """One row a kernel; in processes of their own, since Triton may be interpreting in this one."""
    out = tmp_path_factory.mktemp("static") / "static.csv"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    for dtype, shapes in CALLS.items():
        options = ["--append", "--out", str(out), "--dtypes", dtype, "--shapes", *shapes]
        command = [sys.executable, "-W", "error", "-m", "benchmarks.static", *options]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
    return read_rows(out)


def of(rows: list[Row], **asked: str) -> list[Row]:
    """The rows with these values, of which there are some."""
    found = [row for row in rows if asked.items() <= row.items()]
    assert found, asked
    return found


def over(rows: list[Row], column: str, most: float) -> list[Row]:
    """The rows that are above a limit."""
    return [row for row in rows if float(row[column]) > most]


@every_limit
def test_enough_loads_are_under_way(rows: list[Row], verb: str, layout: str, dtype: str) -> None:
    """The streaming loops keep 32 KiB under way in each SM."""
    mine = of(rows, verb=verb, layout=layout, dtype=dtype)
    assert [row for row in mine if float(row["kilobytes_in_flight_per_sm"]) < KILOBYTES_IN_FLIGHT] == []


@every_limit
def test_nothing_is_in_local_memory(rows: list[Row], verb: str, layout: str, dtype: str) -> None:
    """No thread has a stack or local memory."""
    assert over(of(rows, verb=verb, layout=layout, dtype=dtype), "local_bytes", 0) == []


@every_limit
def test_instructions_per_element(rows: list[Row], verb: str, layout: str, dtype: str) -> None:
    """An element takes no more instructions than listed above, by itself and with an addition and relu."""
    most = LIMITS[verb, layout, dtype]
    plain = of(rows, verb=verb, layout=layout, dtype=dtype, epilogue="none")
    assert over(plain, "instructions_per_element", SLACK * most.per_element) == []
    if verb != "batch_sums":
        fused = of(rows, verb=verb, layout=layout, dtype=dtype, epilogue="add_relu")
        assert over(fused, "instructions_per_element", SLACK * most.fused) == []


@every_limit
def test_work_of_a_program_besides_its_tiles(rows: list[Row], verb: str, layout: str, dtype: str) -> None:
    """Besides what every tile takes a program executes no more instructions and barriers than listed above."""
    mine, most = of(rows, verb=verb, layout=layout, dtype=dtype), LIMITS[verb, layout, dtype]
    assert over(mine, "instructions_once", most.once) == []
    assert over(mine, "barriers_once", most.barriers) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("verb", ["batch_sums", "grad_sums"])
def test_the_last_program_reads_little(verb: str, layout: str, dtype: str) -> None:
    """What one program reads of the others' sums is bounded for every shape, and there is something to read."""
    mine = [call for call in calls(SHAPES, [dtype]) if call.layout == layout]
    launches = [launch for call in mine for launch in call.launches() if verb_of(launch) == verb]
    read = [work_of(launch).bytes_last_program_reads for launch in launches]
    assert len(read) >= len(SHAPES)
    assert 0 < min(read) <= max(read) <= BYTES_LAST_PROGRAM_READS
