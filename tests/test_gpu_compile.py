"""The kernels' machine code, compiled without a device: registers, spills, vectors."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is made for Linux only")

ROOT = Path(__file__).parent.parent
REGISTERS = 128
"""A thread of 256: two programs, 512 threads with 32 bytes each in flight, fit an SM's 65,536."""

SCALAR_REGISTERS = 255
"""Where vectors do not fit, each value has an address and a predicate of its own; the most there are."""


def compiled(*targets: str) -> list[dict[str, Any]]:
    """One row a kernel and target; in a process of its own, since Triton may be interpreting in this one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "error", "-m", "tests.support.gpu_compile", *targets]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """The kernels for sm_80, sm_90 and sm_100."""
    return compiled()


def test_every_kernel_is_compiled_for_every_target(rows: list[dict[str, Any]]) -> None:
    """The rows the other tests look at are there: four kernels for sm_80, sm_90 and sm_100."""
    kernels = {"batch_sums_kernel", "normalize_kernel", "grad_sums_kernel", "grad_input_kernel"}
    assert {(row["kernel"], row["target"]) for row in rows if row["main"]} == {
        (kernel, target) for kernel in kernels for target in ("sm_80", "sm_90", "sm_100")
    }


def test_nothing_spills(rows: list[dict[str, Any]]) -> None:
    """No kernel has a stack or local memory."""
    assert [row for row in rows if row["local"] > 0] == []


def test_registers(rows: list[dict[str, Any]]) -> None:
    """At most 128 registers a thread in the main layouts, so that enough bytes are in flight."""
    assert [row for row in rows if row["registers"] > (REGISTERS if row["main"] else SCALAR_REGISTERS)] == []


def test_streaming_loops_use_full_vectors(rows: list[dict[str, Any]]) -> None:
    """In the main layouts each global load, copy or store of a streaming loop is of 128 bits, and there are some."""
    main = [row for row in rows if row["main"]]
    assert [row for row in main if not 0 < row["accesses"] == row["wide"]] == []


def test_triton_finds_what_is_compiled_ahead(rows: list[dict[str, Any]]) -> None:
    """What is looked at here is what Triton's own dispatch compiles and keeps on disk, under the same name."""
    assert [row for row in rows if not row["is_dispatched"]] == []


def test_amd() -> None:
    """For gfx942 (MI300) every call's four kernels compile, with nothing spilled and within the same registers."""
    if importlib.util.find_spec("triton.backends.amd") is None:
        pytest.skip("this Triton has no AMD compiler")
    rows = compiled("gfx942")
    assert len(rows) == 4 * len({row["call"] for row in rows}) > 4
    assert [row for row in rows if row["local"] > 0 or row["registers"] > REGISTERS] == []
