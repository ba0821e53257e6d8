"""Seconds per call on a device: CUDA events around graph replays or eager loops; a plain clock on CPU.

Cold means that a call finds its inputs in no cache: the calls of one repetition walk through copies of the inputs that
together are four times the L2 cache, and keep their outputs. Hot means the same inputs again and again.
A cold repetition begins with an L2 that holds nothing to be written: else it would pay for what the variant before it
wrote last, which on an H200 made the one after the copy up to 9 % slower.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.resilience import report

COLD_TIMES_L2 = 4
MOST_COPIES = 96
"""Calls in one repetition at most; inputs so small that these are not four times the L2 count as "partial"."""
HOT_CALLS = 20
GIGABYTE = 1 << 30
UNCAPTURED = " uncaptured"
"""Added to a row's cache or mode where the call could not be captured and was timed eagerly."""

ByPass = dict[str, Callable[[], float]]
"""A repetition of each pass: seconds per call."""


class Samplers(NamedTuple):
    """What runs of a comparison: by variant, seconds by pass; `UNCAPTURED` or nothing; and what does not run."""

    calls: dict[str, Callable[[], dict[str, float]]]
    marks: dict[str, str]
    failures: list[str]


def samplers(makers: Mapping[str, Callable[[bool], ByPass]], graph: bool, what: str, device: torch.device) -> Samplers:
    """Those of each variant by its maker, which is told whether to capture; eager where it cannot be captured.

    Each has run once, so that one which fails does not take the others' repetitions with it.
    """
    made = Samplers({}, {}, [])
    for name, make in makers.items():
        for captured in (True, False) if graph else (False,):
            try:
                call = functools.partial(_sample, make(captured))
                call()
            except Exception as problem:  # whatever it is, it is this variant's own
                how = " as a CUDA graph" if captured else ""
                made.failures.append(report(f"{what}: {name}{how}", problem, device))
                continue
            made.calls[name], made.marks[name] = call, UNCAPTURED if captured != graph else ""
            break
    return made


def _sample(by_pass: ByPass) -> dict[str, float]:
    return {phase: timed() for phase, timed in by_pass.items()}


def l2_bytes(device: torch.device) -> int:
    """The size of the L2 cache as the driver reports it; a stand-in on CPU, where only the logic matters."""
    if device.type != "cuda":
        return 1 << 12
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_for(bytes_per_call: int, cold: bool, device: torch.device) -> int:
    """How many copies of the inputs a repetition walks through."""
    if not cold:
        return 1
    wanted = COLD_TIMES_L2 * l2_bytes(device)
    return max(2, min(MOST_COPIES, -(-wanted // max(1, bytes_per_call))))


def cache_state(copies: int, bytes_per_call: int, device: torch.device) -> str:
    """hot, cold, or partial: a walk too short to push everything out of the L2."""
    if copies == 1:
        return "hot"
    return "cold" if copies * bytes_per_call >= COLD_TIMES_L2 * l2_bytes(device) else "partial"


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


def capture(work: Callable[[], Any], warm: Callable[[], Any]) -> Callable[[], None]:
    """work as a CUDA graph, captured on the side stream after three warm-up calls of warm.

    torch.cuda.graph would also collect garbage and empty the allocator's cache each time; there are hundreds.
    """
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            warm()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(stream):
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                with contextlib.suppress(Exception):  # a consequence; the cause is what is raised
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        global _stream
        _stream = None  # later captures are not to meet what this one left
        raise
    torch.cuda.synchronize()
    return graph.replay


_stream: "torch.cuda.Stream | None" = None


def side_stream() -> "torch.cuda.Stream":
    """The one stream of all captures and of the forwards whose backward is captured: backward runs where they ran."""
    global _stream
    if _stream is None:
        _stream = torch.cuda.Stream()
    return _stream


def forget_captures(device: torch.device) -> None:
    """Let the GPU back-end hand out its captured launches' zeroed semaphores anew; no earlier graph may be alive.

    They last for a model's worth of captured launches. A benchmark captures many times that, and the later ones would
    carry a fill kernel each that no user's graph has.
    """
    if device.type != "cuda":
        return
    from syncbn.backends import gpu_workspace

    torch.cuda.synchronize()
    for arena in gpu_workspace._arenas.values():
        arena[:] = [torch.zeros(gpu_workspace.CAPTURED_SEMAPHORES, dtype=torch.int32, device=device)]
    torch.cuda.synchronize()


def on_side_stream(work: Callable[[], Any], device: torch.device) -> Any:
    """work's result, computed on the captures' stream."""
    if device.type != "cuda":
        return work()
    stream = side_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = work()
    torch.cuda.synchronize()
    return result


def clean_l2(device: torch.device) -> None:
    """Fill the L2 with what is only read, so that what it had to write is written."""
    _unwritten(device).amax()


@functools.lru_cache(maxsize=1)
def _unwritten(device: torch.device) -> Tensor:
    """Twice the L2 cache of zeros."""
    return torch.zeros(2 * l2_bytes(device) // 4, device=device)


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


def duplicate(t: Tensor, count: int) -> list[Tensor]:
    """t and count − 1 copies with its strides, each a leaf as t is."""
    return [t, *(t.detach().clone().requires_grad_(t.requires_grad) for _ in range(count - 1))]


def fits(bytes_needed: int, device: torch.device) -> bool:
    """Whether a comparison of that size leaves some memory free, for captures too.

    What the allocator has cached, an earlier graph's pool above all, is nothing that a capture may use or give back:
    where it is needed it is given back now.
    """
    if device.type != "cuda":
        return True
    if bytes_needed + GIGABYTE >= torch.cuda.mem_get_info(device)[0]:
        torch.cuda.empty_cache()
    return bytes_needed + GIGABYTE < torch.cuda.mem_get_info(device)[0]
