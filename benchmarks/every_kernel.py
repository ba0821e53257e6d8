"""Does every kernel stay within its memory? A small run of all four verbs, to be watched by compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python3 -m benchmarks.every_kernel

Each call is also held to the reference back-end in float64. Sizes are awkward: odd planes, channel counts that fill no
vector, slices, masks. The calls are in an order in which the first dozen has every layout with every mask and residual,
and --budget counts from the end of the first: what a watched run has time for is a bit of everything. Without caching,
every tensor is an allocation of its own, so that one byte past its end is seen.

    ncu … python3 -m benchmarks.every_kernel --large

runs the four verbs twice on one large bfloat16 channels_last input and holds them to nothing: for a profiler.
"""

import itertools
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.checking import hold
from benchmarks.options import parser
from benchmarks.resilience import Budget, attempt, say
from benchmarks.shapes import DTYPES
from benchmarks.verbs import Outcome, all_verbs, in_float64
from syncbn.backends import name_for, reference, select
from syncbn.formulas import Epilogue, Running
from tests.support.oracle import in_layout

SHAPES = ((3, 5, 7, 7), (33, 130), (2, 70, 9, 3), (4, 64, 33, 31), (2, 8, 40), (300, 24), (2, 3, 4, 5, 6), (0, 5, 7, 7))
EPILOGUES = ((None, False, False), ("relu", True, False), ("silu", False, True), ("leaky_relu", True, True))
"""(activation, residual, mask)"""
HELD = ("sums", "y", "dweight", "dbias", "dx", "dresidual")
LARGE = (2, 256, 200, 336)
LAYOUTS = ("contiguous", "channels_last", "sliced")


class Small(NamedTuple):
    """One call."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    activation: str | None
    residual: bool
    mask: bool


def cases(smoke: bool) -> list[Small]:
    """Every call, each time the one with most that the earlier ones did not have."""
    left, seen, ordered = list(_listed(smoke)), set(), []
    while left:
        best = max(left, key=lambda case: sum(weight for part, weight in _parts(case) if part not in seen))
        left.remove(best)
        seen |= {part for part, _ in _parts(best)}
        ordered.append(best)
    return ordered


def _parts(case: Small) -> list[tuple[tuple[object, ...], int]]:
    """What a call covers, and how much that counts: with which code the kernels are compiled above all."""
    shape, dtype, layout, activation, residual, mask = case
    pairs = [((layout, residual, mask), 100), ((shape, layout), 10), ((dtype, layout), 5), ((dtype, activation), 1)]
    return [*pairs, ((shape, residual, mask), 2), ((shape,), 20), ((dtype,), 20)]


def _listed(smoke: bool) -> Iterator[Small]:
    """Every shape with every layout and dtype; the epilogues take turns, so that each meets each."""
    turns = itertools.cycle(EPILOGUES)
    shapes = SHAPES[:2] if smoke else SHAPES
    for _ in range(1 if smoke else 3):
        for shape, dtype, layout in itertools.product(shapes, DTYPES, LAYOUTS):
            yield Small(shape, dtype, layout, *next(turns))
        next(turns)


def run(case: Small, device: torch.device) -> float:
    """The largest error of the four verbs' outputs; raises if one is beyond its tolerance."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, dy, drawn = (in_layout(randn(*case.shape, dtype=DTYPES[case.dtype]), case.layout) for _ in range(3))
    mask = randn(case.shape[0], *case.shape[2:]) > -0.5 if case.mask else None
    weight, bias = randn(case.shape[1]), randn(case.shape[1])
    residual = drawn if case.residual else None
    if residual is not None:  # keep z clear of 0, where a ReLU's gradient may rightly be either
        z = _right(x, dy, Epilogue(weight, bias, residual, mask)).y
        residual = residual + torch.copysign(torch.full_like(z, 0.5), z).to(residual.dtype)
    epilogue = Epilogue(weight, bias, residual, mask, case.activation)
    mine, right = (out._asdict() for out in (_verbs(select(x), x, dy, epilogue), _right(x, dy, epilogue)))
    return max(hold(f"{case}: {name}", mine[name], right[name]) for name in HELD if mine[name] is not None)


def _right(x: Tensor, dy: Tensor, epilogue: Epilogue) -> Outcome:
    return _verbs(reference, x.double(), dy.double(), in_float64(epilogue))


def _verbs(backend: Any, x: Tensor, dy: Tensor, epilogue: Epilogue) -> Outcome:
    channels = x.shape[1]
    buffers = (torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device))
    running = Running(*buffers, torch.zeros((), dtype=torch.int64, device=x.device), 0.1)
    return all_verbs(backend, x, dy, epilogue, running, epilogue.residual is not None)


def run_large(device: torch.device) -> None:
    """Every verb twice: the first call compiles."""
    shape = SHAPES[0] if device.type == "cpu" else LARGE
    x, dy = (torch.randn(shape, device=device).bfloat16().to(memory_format=torch.channels_last) for _ in range(2))
    weight, bias = torch.ones(2, shape[1], device=device)
    for _ in range(2):
        _verbs(select(x), x, dy, Epilogue(weight, bias))


def main(argv: list[str] | None = None) -> None:
    own = parser(__doc__, "device", "budget", "smoke")
    own.add_argument("--large", action="store_true", help="one large input instead, not checked")
    args = own.parse_args(argv)
    if args.large:
        run_large(torch.device(args.device))
    else:
        run_all(cases(args.smoke), torch.device(args.device), args.budget)


def run_all(everything: list[Small], device: torch.device, seconds: float) -> None:
    """Each call, counted aloud, since who watches may be stopped; exits with 1 if one was wrong."""
    backend, worst, done = name_for(torch.empty(1, device=device)), 0.0, 0
    budget, failures = Budget(0), list[str]()
    try:
        for case in everything:
            if budget.spent():
                break
            done += 1
            worst = max(worst, attempt(str(case), partial(run, case, device), device, failures) or 0)
            if done == 1:
                budget = Budget(seconds)
            if done in (1, len(everything)) or done % 12 == 0:
                say(f"{done} of {len(everything)} calls, back-end {backend}")
    finally:  # also when an illegal access ends it
        say(f"made {done} calls of all verbs, {len(failures)} wrong, error at most {worst:.1e}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
