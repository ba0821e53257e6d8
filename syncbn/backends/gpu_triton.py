"""The edge to Triton's private parts: how a compiled kernel is launched without looking anything up.

Of versions that are not known here, and where Triton would do more than launch, its own way is taken.
"""

from collections.abc import Callable
from typing import Any

import triton

Launch = Callable[..., None]
"""(stream, addresses and numbers in the kernel's order, but for those fixed at the end)"""

KNOWN = ("3.6.", "3.7.", "3.8.", "3.9.")
_runtime = triton.knobs.runtime


def has_listeners() -> bool:
    """Whether anyone hooked into launches, a profiler say: a function, or a chain of some."""
    enter, leave = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def direct_launch(compiled: Any, grid: int, fixed: tuple[Any, ...]) -> Launch:
    """`compiled[grid, 1, 1]` on a stream, for addresses as integers; whoever hooked into launches is not told."""
    run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    needs_scratch = getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1)
    unusual = (
        needs_scratch
        or getattr(run, "launch_pdl", True)
        or run.launch_cooperative_grid
        or getattr(run, "gsan_enabled", False)
    )
    if unusual or not triton.__version__.startswith(KNOWN):

        def slowly(stream: int, *given: Any) -> None:
            run(grid, 1, 1, stream, function, metadata, None, None, None, *given, *fixed)

        return slowly
    launch = run.launch
    if triton.__version__.startswith("3.6."):

        def one_by_one(stream: int, *given: Any) -> None:
            none = None
            launch(grid, 1, 1, stream, function, False, False, none, none, metadata, none, none, none, *given, *fixed)

        return one_by_one
    annotations, signature = run.arg_annotations, run.kernel_signature

    def together(stream: int, *given: Any) -> None:
        given += fixed
        launch(
            grid, 1, 1, stream, function, False, False, metadata, None, None, None, None, None, annotations, signature,
            given,
        )  # fmt: skip

    return together
