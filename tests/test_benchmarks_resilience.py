"""What fails in a benchmark costs its own rows only."""

import argparse
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import (
    compile,
    device_memory,
    device_timing,
    kernels,
    resilience,
    resources,
    step,
    tables,
    variants,
    verbs,
)
from benchmarks.checking import Case, hold, make_case
from benchmarks.resilience import report, through
from benchmarks.resnet import ResNet50
from benchmarks.shapes import LayerCall, Plan
from benchmarks.training import Setting

ROOT = Path(__file__).parent.parent
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"budget": 0, "skip": 0, "script": "kernels", "given": ["--reps", "3"], **given})


def test_an_exception_costs_one_comparison(capsys: pytest.CaptureFixture[str]) -> None:
    """The others are measured, what was wrong is said at once, and once more in the end, which is a failure."""
    done = []

    def work(job: str, budget: resilience.Budget) -> list[str]:
        if job == "b":
            raise KeyError("none of them\nwith\nmany\nlines")
        done.append(job)
        return ["c was wrong"] if job == "c" else []

    with pytest.raises(SystemExit, match=r"b: KeyError.*none of them.*\nc was wrong$"):
        through(["a", "b", "c"], work, options(), CPU)
    assert done == ["a", "c"]
    assert "NOT TIMED: b: KeyError" in capsys.readouterr().err
    through(["a"], work, options(), CPU)


def test_a_budget_cuts_the_tail(capsys: pytest.CaptureFixture[str]) -> None:
    """No comparison begins after the budget is spent, and how many were not is said."""
    done: list[str] = []
    through(["a", "b"], lambda job, _: done.append(job) or [], options(budget=1e-9), CPU)
    assert done == []
    assert "2 of 2 comparisons skipped" in capsys.readouterr().err


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that this process would have become."""
    commands: list[list[str]] = []

    def become(path: str, command: list[str]) -> None:
        commands.append(command[1:])
        raise SystemExit("became another")

    monkeypatch.setattr(os, "execv", become)
    monkeypatch.setattr(os, "closerange", lambda *_: None)
    return commands


def test_a_lost_device_is_left_to_a_new_process(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After an error that spoils the device a process begins afresh with the next comparison, in what time is left."""
    monkeypatch.setattr(resilience, "works", lambda device: False)
    done = []

    def work(job: str, budget: resilience.Budget) -> list[str]:
        done.append(job)
        return [report(f"{job}: a verb", RuntimeError("illegal memory access"), CPU)] if job == "b" else []

    with pytest.raises(SystemExit, match="became another"):
        through(["a", "b", "c"], work, options(budget=100), CPU)
    assert done == ["a", "b"]
    assert executed[0][:7] == ["-m", "benchmarks.kernels", "--reps", "3", "--append", "--skip", "2"]
    assert executed[0][7] == "--budget"
    assert 80 <= float(executed[0][8]) < 100
    assert "THE DEVICE IS LOST to this process: b: a verb: RuntimeError: illegal" in capsys.readouterr().err


def test_a_device_that_stays_lost_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process that finds the device lost ends at once; one that finds it working ends with a failure."""
    with pytest.raises(SystemExit, match="An earlier process"):
        through(["a", "b"], lambda *_: [], options(skip=1), CPU)
    monkeypatch.setattr(resilience, "works", lambda device: False)
    with pytest.raises(SystemExit, match="is lost for a new process"):
        through(["a", "b"], lambda *_: [], options(skip=1), CPU)


def test_a_comparison_that_hangs_is_left() -> None:
    """On a device, a comparison without an end is left after some seconds, from another thread."""
    acted = threading.Event()
    watch = resilience._watch(acted.set, 0.01, CUDA)
    assert acted.wait(10)
    watch.cancel()
    acted.clear()
    resilience._watch(acted.set, 0.05, CUDA).cancel()
    resilience._watch(acted.set, 0.01, CPU).cancel()
    assert not acted.wait(0.2)


LOST = """
from benchmarks import kernels, resilience
def lose(*args, **kwargs):
    raise resilience.DeviceLost("an illegal access")
kernels.measure = lose
kernels.main({options})
"""


def test_the_new_process_writes_the_other_rows(tmp_path: Path) -> None:
    """A device lost in the first of two comparisons leaves the rows of the second, and a failure."""
    given = ["--smoke", "--device", "cpu", "--machine", "here", "--out", str(tmp_path), "--only", "16x12"]
    command = [sys.executable, "-c", LOST.format(options=given)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    rows = tables.read_rows(tmp_path / "kernels-here.csv")
    assert {(row["shape"], row["epilogue"]) for row in rows} == {("16x12", "add_relu")}


def test_what_cannot_be_captured_is_timed_eagerly() -> None:
    """It is marked, what cannot be timed at all is left out, and both are reported; the others are as they were."""

    def maker(works_in: tuple[bool, ...], graph: bool) -> device_timing.ByPass:
        if graph not in works_in:
            raise RuntimeError("operation not permitted when stream is capturing")
        return {"both": lambda: 2.0 if graph else 3.0}

    ways = {"both": (True, False), "eager": (False,), "neither": ()}
    makers: dict[str, Callable[[bool], device_timing.ByPass]] = {n: partial(maker, way) for n, way in ways.items()}
    made = device_timing.samplers(makers, True, "8x64", CPU)
    assert {name: call() for name, call in made.calls.items()} == {"both": {"both": 2.0}, "eager": {"both": 3.0}}
    assert made.marks == {"both": "", "eager": " uncaptured"}
    assert [text.partition(": RuntimeError")[0] for text in made.failures] == [
        "8x64: eager as a CUDA graph",
        "8x64: neither as a CUDA graph",
        "8x64: neither",
    ]
    assert device_timing.samplers(makers, False, "8x64", CPU).marks == {"both": "", "eager": ""}


def smoke(folder: Path, *more: str) -> list[str]:
    return ["--smoke", "--device", "cpu", "--machine", "here", "--out", str(folder), *more]


def test_a_verb_that_fails_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A verb that raises has no row; one that cannot be captured has rows that say so; the others are as they were."""
    right, timer = kernels.ours, device_timing.timer

    def ours(verb: str, case: Case, fixed: verbs.Fixed) -> verbs.Entrant:
        if verb == "normalize":
            raise NotImplementedError("no such kernel")
        return right(verb, case, fixed)

    def no_capture(call: Any, inputs: Any, device: torch.device, graph: bool) -> Callable[[], float]:
        if graph and call is not torch.clone:
            raise RuntimeError("cannot be captured")
        return timer(call, inputs, device, False)

    samplers = device_timing.samplers
    monkeypatch.setattr(kernels, "ours", ours)
    monkeypatch.setattr(device_timing, "timer", no_capture)
    monkeypatch.setattr(device_timing, "samplers", lambda makers, _, what, device: samplers(makers, True, what, device))
    with pytest.raises(SystemExit, match="normalize, ours: NotImplementedError"):
        kernels.main(smoke(tmp_path, "--only", "16x12"))
    rows = tables.read_rows(tmp_path / "kernels-here.csv")
    ours_in = {(row["verb"], row["cache"]) for row in rows if row["variant"] == "syncbn"}
    caches = ("hot uncaptured", "cold uncaptured")
    assert ours_in == {(verb, cache) for verb in verbs.VERBS if verb != "normalize" for cache in caches}
    assert {row["cache"] for row in rows if row["variant"] == "copy"} == {"hot", "cold"}


def test_a_layer_that_fails_costs_itself() -> None:
    """A variant whose forward raises is left out, with the reason."""
    call = LayerCall(Plan((4, 3), "float32", "contiguous"), "bn")
    case = make_case(call.plan, CPU)
    broken = variants.variant("broken", lambda x, residual: {}["nothing"])
    right = variants.variant("right", variants.batch_norm(case))
    entrants, errors, refused = variants.right_ones(call, case, [broken, right])
    assert ([v.name for v in entrants], list(errors)) == (["right"], ["right"])
    assert refused == ["4x3 float32 contiguous bn: broken: KeyError: 'nothing'"]


def test_a_model_that_fails_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm that raises, and one that is wrong, have no row in step.py; the others have, and the script fails."""
    check = step.check

    def changed(setting: Setting, name: str, model: ResNet50, called: torch.nn.Module) -> tuple[float, float]:
        if name == "syncbn.fused":
            raise ValueError("no fused kernel")
        if name == "syncbn":
            model.conv.weight.register_hook(lambda gradient: 2 * gradient)
        return check(setting, name, model, called)

    monkeypatch.setattr(step, "check", changed)
    step.checked.cache_clear()
    with pytest.raises(SystemExit, match=r"syncbn: logits are off .*it is not timed.\nsyncbn.fused: ValueError"):
        step.main(smoke(tmp_path))
    step.checked.cache_clear()
    rows = tables.read_rows(tmp_path / "step-here.csv")
    assert [row["variant"] for row in rows] == ["nn.BatchNorm", "syncbn.fused.forced"]


def test_a_profiler_that_fails_leaves_the_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are in the file before a step is profiled, what it is found to cost is added to them."""
    path, seen = tmp_path / "step-here.csv", []

    def cost(call: Callable[[], None]) -> dict[str, int]:
        seen.append(len(tables.read_rows(path)))
        if len(seen) == 2:
            raise RuntimeError("no profiler")
        return {"host_syncs": len(seen)}

    monkeypatch.setattr(resources, "cost", cost)
    results = tables.Results(path, step.COLUMNS)
    rows = {name: results.add({**dict.fromkeys(step.COLUMNS, ""), "variant": name}) for name in "abc"}
    monkeypatch.setattr(resilience, "works", lambda device: True)
    refused = resources.add_resources(rows, dict.fromkeys("abc", print), "eager", CUDA, resilience.Budget(0), results)
    assert seen == [3, 3, 3]
    assert [row["host_syncs"] for row in tables.read_rows(path)] == ["1", "", "3"]
    assert refused == ["eager: resources of b: RuntimeError: no profiler"]


def test_compile_begins_with_what_needs_no_compiler() -> None:
    """With a budget the eager models' rows come first, and each compiled one meets its own baselines."""
    first, *rest = compile.rounds(True)
    assert {mode for _, mode in first} == {"eager"}
    assert sorted({key for keys in rest for key in keys}) == sorted(compile.rounds(False)[0])
    for keys in rest:
        variant, mode = keys[-1]
        assert mode == "compiled"
        assert {("nn.BatchNorm", "compiled"), (variant, "eager")} <= set(keys)


def test_captures_semaphores_are_where_they_are_expected() -> None:
    """What forget_captures renews between comparisons is there."""
    from syncbn.backends import gpu_workspace

    assert isinstance(gpu_workspace._arenas, dict)
    assert gpu_workspace.CAPTURED_SEMAPHORES > 0


@pytest.mark.parametrize(("dtype", "off"), [(torch.bfloat16, 7e-3), (torch.float16, 1e-3), (torch.float32, 2e-4)])
def test_a_baseline_may_round_on_its_way(dtype: torch.dtype, off: float) -> None:
    """A baseline's float32 result is held to its activations' precision, ours to its own; what is wrong fails both."""
    want = torch.randn(64, dtype=torch.float64)
    mine = (want + off * want.abs().max()).float()
    assert hold("dweight", mine, want, dtype) == pytest.approx(off, rel=1e-3)
    for wrong, baseline in ((mine, None), ((want + 4 * off * want.abs().max()).float(), dtype), (0.97 * want, dtype)):
        with pytest.raises(AssertionError, match=r"dweight is off by .*it is not timed"):
            hold("dweight", wrong.float(), want, baseline)


def test_a_cache_is_given_back_before_captures_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the driver has too little left is the cache emptied, and what then is free decides."""
    gigabyte, emptied = device_memory.GIGABYTE, []
    free = {"now": 8 * gigabyte}

    def empty() -> None:
        emptied.append(free["now"])
        free["now"] = 30 * gigabyte

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free["now"], 80 * gigabyte))
    monkeypatch.setattr(torch.cuda, "empty_cache", empty)
    assert device_memory.fits(6 * gigabyte, CUDA)
    assert emptied == []
    assert device_memory.fits(20 * gigabyte, CUDA)
    assert emptied == [8 * gigabyte]
    assert not device_memory.fits(30 * gigabyte, CUDA)
