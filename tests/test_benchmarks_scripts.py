"""Every benchmark script runs from its first line to its last, on tiny shapes and without a GPU.

Those that only a GPU needs: test_benchmarks_gpu_sh.py.
"""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import batch_size, compile, kernels, layer, tables, wire

ROOT = Path(__file__).parent.parent
SCRIPTS = {
    "layer": (layer.COLUMNS, ["layer", "--only", "4x8x5x5 float32 channels_last"]),
    "layer-gpu": (layer.COLUMNS, ["layer", "--gpu-flow", "--compiled", "--only", "4x8x5x5 bfloat16 channels_last"]),
    "compile": (compile.COLUMNS, ["compile"]),
}
VARIANTS = {
    "layer": {"copy", "nn.BatchNorm", "syncbn_alone", "syncbn", "naive_sync", "all_reduce"},
    "layer-gpu": {"copy", "nn.BatchNorm", "syncbn", "syncbn.forced", "compiled"},
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
    run(sys.executable, "-m", f"benchmarks.{script}", *options)  # it starts ranks, or a compiler that warns
    path = tmp_path / f"{script}-here.csv"
    tables.check_columns(path, columns)
    rows = tables.read_rows(path)
    assert {row["variant"] for row in rows} == VARIANTS[name]
    assert all(float(row["ms"]) > 0 and row["commit"] and row["machine"] == "here" for row in rows)
    if name == "compile":
        found = {(row["variant"], row["mode"]): row for row in rows}
        assert found["syncbn", "compiled"]["graph_breaks"] == "0"
        assert [found["syncbn", mode]["collectives"] for mode in ("eager", "compiled")] == ["10", "10"]
    if name == "layer":
        assert {row["pass"] for row in rows} == {"forward", "backward", "both"}
        assert {(row["ranks"], row["threads"]) for row in rows} <= {("2", str(n)) for n in range(1, 65)}


def test_wire_and_its_plot(tmp_path: Path) -> None:
    """wire.py writes two schemes, and a picture can be drawn of it."""
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    wire.main(["--smoke", "--out", str(tmp_path)])
    tables.check_columns(tmp_path / "wire.csv", wire.COLUMNS)
    plot.main([str(tmp_path / "wire.csv"), str(tmp_path / "wire.svg")])
    assert "<svg" in (tmp_path / "wire.svg").read_text()


def test_plots_of_timings(tmp_path: Path) -> None:
    """A picture can be drawn of a layer's and a kernel's file, also where a variant is missing from a shape."""
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    blank = {"ms": 2.0, "ms_p20": 1.0, "ms_p80": 3.0, "bytes": 100, "gigabytes_per_second": 1.0, "pass": "both"}
    for kind, columns in (("layer", layer.COLUMNS), ("kernels", kernels.COLUMNS)):
        results = tables.Results(tmp_path / f"{kind}-here.csv", columns)
        for shape, variant in (("1x2", "copy"), ("1x2", "syncbn"), ("3x4", "copy")):
            row = {**dict.fromkeys(columns, "contiguous"), **blank, "shape": shape, "variant": variant}
            results.add({key: row[key] for key in columns})
        plot.draw(tmp_path / f"{kind}-here.csv", tmp_path / f"{kind}.png")
        assert (tmp_path / f"{kind}.png").stat().st_size > 1000


def test_a_variant_has_one_colour() -> None:
    """In every panel of a layer's picture, and in its legend, a variant is in the same place and colour, or missing."""
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    blank = {**dict.fromkeys(layer.COLUMNS, ""), "ms": "2", "ms_p20": "1", "ms_p80": "3", "pass": "both"}
    panels = {"channels_last": ("copy", "a", "b"), "contiguous": ("copy", "b", "c")}
    rows = [{**blank, "layout": layout, "variant": v, "shape": "1x2"} for layout, vs in panels.items() for v in vs]
    figure = plot.layer(rows)
    bars = [
        {bar.get_label(): bar[0].get_facecolor() for bar in axis.containers if hasattr(bar, "patches") and len(bar)}
        for axis in figure.axes
    ]
    assert [tuple(panel) for panel in bars] == list(panels.values())
    assert bars[0]["b"] == bars[1]["b"]
    assert len({*bars[0].values(), *bars[1].values()}) == 4
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["copy", "a", "b", "c"]
    plot.plt.close(figure)


def test_batch_size_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Each norm has a row, those of batch norm with recomputed statistics; --append adds what is missing or was trained
    for another number of epochs; it draws as much as there is.
    """
    plot = pytest.importorskip("benchmarks.plot", reason="matplotlib is optional")
    options = ["--smoke", "--machine", "here", "--out", str(tmp_path)]
    command = (sys.executable, "-m", "benchmarks.batch_size", *options)
    run(*command)
    path = tmp_path / "batch-size-here.csv"
    tables.check_columns(path, batch_size.COLUMNS)
    rows = tables.read_rows(path)
    assert [row["norm"] for row in rows] == list(batch_size.NORMS)
    assert [bool(row["recomputed_accuracy"]) for row in rows] == [True, True, False, False]
    assert all(0 < float(row["accuracy"]) <= 1 for row in rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, batch_size.COLUMNS)
        writer.writeheader()
        writer.writerows([rows[0] | {"epochs": "7"}, *rows[1:3]])
    plot.main([str(path), str(tmp_path / "sizes.png")])
    run(*command, "--append")
    again = tables.read_rows(path)
    assert [(row["norm"], row["epochs"]) for row in again[3:]] == [("batch", "1"), ("instance", "1")]
    assert again[1:3] == rows[1:3]
    plot.main([str(path), str(tmp_path / "sizes.png")])
    assert (tmp_path / "sizes.png").stat().st_size > 1000
