"""What the rows of a folder say about the goals."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compile, goals, host, kernels, layer, step, summary, tables

ROOT = Path(__file__).parent.parent
SCRIPTS = {"kernels": kernels, "layer": layer, "host": host, "step": step, "compile": compile}
VERB = {"verb": "batch_sums", "epilogue": "none", "layout": "channels_last", "dtype": "bfloat16", "cache": "cold"}
CALL = {"op": "bn", "layout": "channels_last", "dtype": "bfloat16", "mode": "graph", "pass": "both"}
STEP = {"comparison": "eager", "model": "resnet50", "batch": 32, "image": 224, "layout": "channels_last"}
BIG, BIGGER = "2x256x200x336", "8x256x128x256"


def write(folder: Path, script: str, *rows: dict[str, Any]) -> None:
    """A file with these rows, empty in the columns that they do not name."""
    columns = SCRIPTS[script].COLUMNS
    results = tables.Results(folder / f"{script}-here.csv", columns, append=True)
    for row in rows:
        results.add({**dict.fromkeys(columns, ""), "machine": "here", **row})


def pair(base: dict[str, Any], names: tuple[str, str], times: tuple[float, float], **more: Any) -> list[dict[str, Any]]:
    """A baseline's row and ours."""
    return [{**base, **more, "variant": name, "ms": ms} for name, ms in zip(names, times, strict=True)]


def found(folder: Path, goal: str) -> str:
    """The one line about a goal."""
    (line,) = [line for line in summary.summary(folder)[1:] if goal in line]
    return " ".join(line.split())


def test_the_worst_row_counts_and_is_named(tmp_path: Path) -> None:
    """Of several rows the slowest decides; smaller, hot, uncaptured and other layouts' rows do not count."""
    names = ("copy", "syncbn")
    write(tmp_path, "kernels", *pair(VERB, names, (0.95, 1.0), shape=BIG))
    assert found(tmp_path, "batch_sums: copy") == (
        f"met 0.95 ≥ 0.9 batch_sums: copy / verb, channels_last ≥ 64 MB (1 of 1; worst: none {BIG})"
    )
    write(tmp_path, "kernels", *pair(VERB, names, (0.5, 1.0), shape=BIGGER, epilogue="add_relu"))
    for other in ({"cache": "hot"}, {"cache": "cold uncaptured"}, {"layout": "contiguous"}, {"dtype": "float32"}):
        write(tmp_path, "kernels", *pair({**VERB, **other}, names, (0.1, 1.0), shape=BIG))
    write(tmp_path, "kernels", *pair(VERB, names, (0.1, 1.0), shape="32x64x112x112"))
    assert found(tmp_path, "batch_sums: copy").startswith("missed 0.5 ≥ 0.9")
    assert found(tmp_path, "batch_sums: copy").endswith(f"(1 of 2; worst: add_relu {BIGGER})")
    assert found(tmp_path, "normalize: copy") == "not measured ≥ 0.9 normalize: copy / verb, channels_last ≥ 64 MB"
    assert "missed 0.1 ≥ 0.85" in found(tmp_path, "any verb")


def test_small_planes_have_no_goal(tmp_path: Path) -> None:
    """Contiguous inputs count from 28 × 28 on, of whatever size."""
    contiguous = {**VERB, "layout": "contiguous"}
    write(tmp_path, "kernels", *pair(contiguous, ("copy", "syncbn"), (0.1, 1.0), shape="32x1024x14x14"))
    assert found(tmp_path, "any verb").startswith("not measured")
    write(tmp_path, "kernels", *pair(contiguous, ("copy", "syncbn"), (0.9, 1.0), shape="8x128x28x28"))
    assert found(tmp_path, "any verb").startswith("met 0.9")


def test_what_was_measured_again_counts(tmp_path: Path) -> None:
    """The last row of a comparison is the one; a row that was cut short, or of another file, is none."""
    for ours in (2.0, 1.0):
        write(tmp_path, "kernels", *pair(VERB, ("copy", "syncbn"), (0.95, ours), shape=BIG))
    path = tmp_path / "kernels-here.csv"
    path.write_text(path.read_text() + "2026-11-26,abc,here,")
    (tmp_path / "kernels-other.csv").write_text("a,b\n1,2\n")
    assert found(tmp_path, "batch_sums: copy").startswith("met 0.95 ≥ 0.9")


def test_the_layer_is_held_to_both_baselines(tmp_path: Path) -> None:
    """Forced against forced by size, alone against nn.BatchNorm by layout; graph and eager apart."""
    forced = ("nn.SyncBatchNorm.forced", "syncbn.forced")
    write(tmp_path, "layer", *pair(CALL, forced, (3.1, 1.0), shape="8x64x56x56"))
    write(tmp_path, "layer", *pair(CALL, forced, (2.4, 1.0), shape="32x256x56x56"))
    write(tmp_path, "layer", *pair(CALL, ("nn.BatchNorm", "syncbn"), (2.6, 1.0), shape="32x256x56x56", mode="eager"))
    half = {**CALL, "dtype": "float16", "op": "bn_add_relu"}
    write(tmp_path, "layer", *pair(half, ("nn.BatchNorm", "syncbn"), (1.4, 1.0), shape="32x256x56x56"))
    narrow = {**CALL, "layout": "contiguous"}
    write(tmp_path, "layer", *pair(narrow, ("nn.BatchNorm", "syncbn"), (9.0, 1.0), shape="32x64x112x112"))
    write(tmp_path, "layer", *pair(narrow, ("nn.BatchNorm", "syncbn"), (1.0, 1.0), shape="32x256x56x56"))
    assert found(tmp_path, "graph: forced over nn.SyncBatchNorm, ≤ 3 MB").startswith("met 3.1 ≥ 3 ")
    assert found(tmp_path, "eager: forced over nn.SyncBatchNorm, ≤ 3 MB").startswith("not measured")
    assert found(tmp_path, "graph: forced over nn.SyncBatchNorm, ≥ 51 MB").startswith("missed 2.4 ≥ 2.5")
    assert found(tmp_path, "eager: over nn.BatchNorm, channels_last").startswith("met 2.6 ≥ 2.5")
    assert found(tmp_path, "graph: over nn.BatchNorm, contiguous").startswith("met 9 ≥ 3")
    assert found(tmp_path, "graph: fp16 bn_add_relu").startswith("missed 1.4 ≥ 1.5")


def test_what_is_to_be_small_is_held_to_its_most(tmp_path: Path) -> None:
    """Host time, step time and host syncs have a limit above; the stub driver's times and blanks do not count."""
    times = {"pass": "both", "variant": "syncbn", "layout": "channels_last", "dtype": "bfloat16", "driver": "cuda"}
    rows = [{**times, "shape": "2x64x8x8", "us": 80}, {**times, "shape": "8x64x56x56", "us": 91}]
    write(tmp_path, "host", *rows, {**times, "shape": "8x64x56x56", "us": 500, "driver": "stub"})
    assert found(tmp_path, "on the host").startswith("missed 91 ≤ 90")
    steps = pair(STEP, ("nn.BatchNorm", "syncbn"), (50.0, 49.0))
    steps += [{**STEP, "variant": "syncbn.fused.forced", "ms": 51.0, "host_syncs": 0}]
    write(tmp_path, "step", *steps, {**STEP, "batch": 8, "variant": "syncbn", "ms": 1.0, "host_syncs": 2})
    assert found(tmp_path, "eager: ResNet-50, syncbn /").startswith("met 0.98 ≤ 1")
    assert found(tmp_path, "eager: ResNet-50, syncbn.fused.forced /").startswith("missed 1.02 ≤ 1")
    assert found(tmp_path, "graph: ResNet-50, syncbn /").startswith("not measured")
    assert found(tmp_path, "host syncs").startswith("missed 2 ≤ 0")
    assert "(1 of 2; worst: resnet50 8 224 channels_last )" in found(tmp_path, "host syncs")


def test_what_is_to_be_clean_is_held_to_it(tmp_path: Path) -> None:
    """The exit statuses of the GPU tests and the sanitizers count, the last of each, and no other part's."""
    path = tmp_path / "parts-here.csv"
    path.write_text("date,commit,machine,part,seconds,status\n2026-11-27,abc,here,host,12,124\n")
    assert found(tmp_path, "exit status").startswith("not measured")
    path.write_text(path.read_text() + "".join(f"2026-11-27,abc,here,{part},9,0\n" for part in goals.WATCHED))
    assert found(tmp_path, "exit status").startswith("met 0 ≤ 0")
    path.write_text(path.read_text() + "2026-11-27,abc,here,racecheck,9,9\n")
    assert found(tmp_path, "exit status") == (
        "missed 9 ≤ 0 exit status of GPU tests, memcheck, racecheck (2 of 3; worst: racecheck)"
    )


def test_it_is_short_and_counts(tmp_path: Path) -> None:
    """With no file at all, and with one, it is at most two dozen lines, of which the first counts the others."""
    lines = summary.summary(tmp_path)
    assert len(lines) <= 24
    assert lines[0].startswith(f"goals: 0 met, 0 missed, {len(goals.GOALS)} not measured; rows: kernels 0, layer 0")
    uncaptured = {**VERB, "cache": "hot uncaptured"}
    write(tmp_path, "kernels", *pair(VERB, ("copy", "syncbn"), (0.95, 1.0), shape=BIG))
    write(tmp_path, "kernels", *pair(uncaptured, ("copy", "syncbn"), (0.95, 1.0), shape=BIG))
    head = summary.summary(tmp_path)[0]
    assert head.startswith(f"goals: 1 met, 0 missed, {len(goals.GOALS) - 1} not measured; rows: kernels 4,")
    assert head.endswith("2 of them not captured")


@pytest.mark.parametrize("script", SCRIPTS)
def test_it_knows_the_columns(script: str) -> None:
    """What the summary looks at are columns of the scripts' files, and values that the scripts write."""
    columns = set(SCRIPTS[script].COLUMNS)
    named = {column for goal in goals.GOALS if goal.script == script for column in goal.columns}
    assert {*goals.KEYS[script], *named, "machine", "variant"} <= columns
    verbs = {goal.columns["verb"] for goal in goals.GOALS if "verb" in goal.columns}
    assert verbs == set(kernels.VERBS)


def test_it_needs_no_torch(tmp_path: Path) -> None:
    """It is printed also where torch cannot be imported."""
    code = f"import sys; sys.modules['torch'] = None; from benchmarks import summary; summary.main(['{tmp_path}'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.match(r"goals: 0 met, 0 missed, \d+ not measured", done.stdout)
