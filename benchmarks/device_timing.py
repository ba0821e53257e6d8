"""Seconds per call on a device: CUDA events around graph replays or eager loops; a plain clock on CPU."""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.cuda_graphs import capture, forget_captures
from benchmarks.device_memory import clean_l2
from benchmarks.harness import Times, interleave
from benchmarks.resilience import attempt

HOT_CALLS = 20
UNCAPTURED = " uncaptured"
"""Added to a row's cache or mode where the call could not be captured and was timed eagerly."""

ByPass = dict[str, Callable[[], float]]
"""A repetition of each pass: seconds per call."""


class Samplers(NamedTuple):
    """What runs of a comparison: by variant, seconds by pass; `UNCAPTURED` or nothing; and what does not run."""

    calls: dict[str, Callable[[], dict[str, float]]]
    marks: dict[str, str]
    failures: list[str]


Makers = Mapping[str, Callable[[bool], ByPass]]


def in_turn(
    makers: Makers, graph: bool, what: str, device: torch.device, reps: int
) -> tuple[Times, dict[str, str], list[str]]:
    """The times of the variants that run, their marks, and why others do not; their graphs do not outlive this."""
    forget_captures(device)
    running = samplers(makers, graph, what, device)
    return interleave(running.calls, reps, 1), running.marks, running.failures


def samplers(makers: Makers, graph: bool, what: str, device: torch.device) -> Samplers:
    """Those of each variant by its maker, which is told whether to capture; eager where it cannot be captured.

    Each has run once, so that one which fails does not take the others' repetitions with it.
    """
    made = Samplers({}, {}, [])
    for name, make in makers.items():
        for captured in (True, False) if graph else (False,):
            how = " as a CUDA graph" if captured else ""
            maker = functools.partial(_ran_once, make, captured)
            call = attempt(f"{what}: {name}{how}", maker, device, made.failures)
            if call is not None:
                made.calls[name], made.marks[name] = call, UNCAPTURED if captured != graph else ""
                break
    return made


def _ran_once(make: Callable[[bool], ByPass], captured: bool) -> Callable[[], dict[str, float]]:
    by_pass = make(captured)

    def call() -> dict[str, float]:
        return {phase: timed() for phase, timed in by_pass.items()}

    call()
    return call


def timer(call: Callable[[Any], Any], inputs: Sequence[Any], device: torch.device, graph: bool) -> Callable[[], float]:
    """A repetition: `call` on each of inputs in turn (on a single one, `HOT_CALLS` times); seconds per call.

    With graph, the repetition is captured once and replayed. Outputs live until the end of the repetition when there
    are several inputs, so that a cold call does not write where the one before just wrote.
    """
    turns = list(inputs) if len(inputs) > 1 else list(inputs) * HOT_CALLS
    keep = len(inputs) > 1

    def repetition() -> None:
        kept = [result for item in turns if (result := call(item)) is not None and keep]
        del kept

    if device.type != "cuda":
        return lambda: _clock(repetition) / len(turns)
    replay = capture(repetition, warm=lambda: call(turns[0])) if graph else repetition
    if keep:
        return lambda: _events(replay, before=functools.partial(clean_l2, device)) / len(turns)
    return lambda: _events(replay) / len(turns)


def _events(work: Callable[[], Any], before: Callable[[], None] = lambda: None) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before()
    torch.cuda.synchronize()
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


def _clock(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
