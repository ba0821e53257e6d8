"""Capturing work as CUDA graphs, all on one stream."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch


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
