"""Every benchmark script runs from its first line to its last, on tiny shapes and without a GPU."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import compile, every_kernel, harness, kernels, layer, step, wire

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "layer": (layer.COLUMNS, ["layer", "--only", "4x8x5x5 float32 channels_last"]),
    "layer-gpu": (layer.COLUMNS, ["layer", "--gpu-flow", "--only", "4x8x5x5 bfloat16 channels_last"]),
    "kernels": (kernels.COLUMNS, ["kernels", "--only", "4x8x5x5 bfloat16 contiguous"]),
    "step": (step.COLUMNS, ["step"]),
    "compile": (compile.COLUMNS, ["compile"]),
}
VARIANTS = {
    "layer": {"copy", "nn.BatchNorm", "syncbn_alone", "syncbn", "naive_sync", "all_reduce"},
    "layer-gpu": {"copy", "nn.BatchNorm", "syncbn", "syncbn.forced", "compiled"},
    "kernels": {"copy", "syncbn", "var_mean", "native_batch_norm", "native_batch_norm_backward"},
    "step": {"nn.BatchNorm", "syncbn", "syncbn.fused", "syncbn.fused.forced"},
    "compile": {"nn.BatchNorm", "syncbn", "syncbn.fused"},
}


def run(*command: str, **extra: str) -> str:
    """Its output; fails with it unless the exit status is 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **extra}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_writes_its_rows(name: str, tmp_path: Path) -> None:
    """A smoke run leaves a file with the script's columns, a row for each variant, and times that are positive."""
    columns, (script, *options) = SCRIPTS[name]
    options += ["--smoke", "--device", "cpu", "--machine", "here", "--out", str(tmp_path)]
    if script in ("layer", "compile"):  # it starts ranks, or a compiler that warns
        run(sys.executable, "-m", f"benchmarks.{script}", *options)
    else:
        importlib.import_module(f"benchmarks.{script}").main(options)
    path = tmp_path / f"{script}-here.csv"
    harness.check_columns(path, columns)
    rows = harness.read_rows(path)
    assert {row["variant"] for row in rows} == VARIANTS[name]
    assert all(float(row["ms"]) > 0 and row["commit"] and row["machine"] == "here" for row in rows)
    if name == "compile":
        found = {(row["variant"], row["mode"]): row for row in rows}
        assert found["syncbn", "compiled"]["graph_breaks"] == "0"
        assert [found["syncbn", mode]["collectives"] for mode in ("eager", "compiled")] == ["10", "10"]
    if name == "layer":
        assert {row["pass"] for row in rows} == {"forward", "backward", "both"}
        assert {(row["ranks"], row["threads"]) for row in rows} <= {("2", str(n)) for n in range(1, 65)}


def test_every_kernel_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """The run to be watched by compute-sanitizer reaches its end and says how many calls it made."""
    every_kernel.main(["--smoke", "--device", "cpu"])
    assert "18 of 18 calls, back-end cpu" in capsys.readouterr().err


def test_wire_and_its_plot(tmp_path: Path) -> None:
    """wire.py writes two schemes, and a picture can be drawn of it."""
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    wire.main(["--smoke", "--out", str(tmp_path)])
    harness.check_columns(tmp_path / "wire.csv", wire.COLUMNS)
    plot.main([str(tmp_path / "wire.csv"), str(tmp_path / "wire.svg")])
    assert "<svg" in (tmp_path / "wire.svg").read_text()


def test_plots_of_timings(tmp_path: Path) -> None:
    """A picture can be drawn of a layer's and a kernel's file, also where a variant is missing from a shape."""
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    blank = {"ms": 2.0, "ms_p20": 1.0, "ms_p80": 3.0, "bytes": 100, "gigabytes_per_second": 1.0, "pass": "both"}
    for kind, columns in (("layer", layer.COLUMNS), ("kernels", kernels.COLUMNS)):
        results = harness.Results(tmp_path / f"{kind}-here.csv", columns)
        for shape, variant in (("1x2", "copy"), ("1x2", "syncbn"), ("3x4", "copy")):
            row = {**dict.fromkeys(columns, "contiguous"), **blank, "shape": shape, "variant": variant}
            results.add({key: row[key] for key in columns})
        plot.draw(tmp_path / f"{kind}-here.csv", tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size > 1000


def test_gpu_sh_runs_every_part_within_its_time(tmp_path: Path) -> None:
    """gpu.sh calls the tests and each script once, with a budget, and leaves a log and few files."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$@" >>"$CALLS"\n')
    python.chmod(0o755)
    given = {"PYTHON": str(python), "CALLS": str(tmp_path / "calls"), "OUT": str(tmp_path / "out"), "MACHINE": "here"}
    log = run("bash", "benchmarks/gpu.sh", **given, TOTAL="100")
    calls = (tmp_path / "calls").read_text()
    assert "-m pytest tests -m gpu" in calls
    for script in ("kernels", "layer", "step", "compile", "every_kernel"):
        assert f"-m benchmarks.{script} --device cuda" in calls
    assert calls.count("--budget") >= 4
    assert "{budget}" not in calls
    assert "not clean: none" in log
    assert (tmp_path / "out" / "log.txt").exists()
    assert len(list((tmp_path / "out").iterdir())) <= 8
