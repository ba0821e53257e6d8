"""Does every kernel stay within its memory? A small run of all four verbs, to be watched by compute-sanitizer.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \\
        python3 -m benchmarks.every_kernel

Each call is also held to the reference back-end in float64. Sizes are awkward: odd planes, channel counts that fill no
vector, slices, masks; the calls come shuffled, so that what --budget cuts is a bit of everything. Without caching,
every tensor is an allocation of its own, so that one byte past its end is seen.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.checking import EPS, hold
from benchmarks.harness import Budget
from benchmarks.shapes import DTYPES
from syncbn.backends import Epilogue, Running, name_for, reference, select
from tests.oracle import in_layout

SHAPES = ((3, 5, 7, 7), (33, 130), (2, 70, 9, 3), (4, 64, 33, 31), (2, 8, 40), (300, 24), (2, 3, 4, 5, 6), (0, 5, 7, 7))
EPILOGUES = ((None, False, False), ("relu", True, False), ("silu", False, True), ("leaky_relu", True, True))
"""(activation, residual, mask)"""
LAYOUTS = ("contiguous", "channels_last", "sliced")


class Small(NamedTuple):
    """One call."""

    shape: tuple[int, ...]
    dtype: str
    layout: str
    activation: str | None
    residual: bool
    mask: bool


STRIDE = 11
"""Of the walk through the calls; no divisor of their number, so that it meets all of them."""


def cases(smoke: bool) -> list[Small]:
    """Every call, in an order in which neighbours have little in common."""
    listed = list(_listed(smoke))
    return [listed[at * STRIDE % len(listed)] for at in range(len(listed))]


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

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def activation_like() -> Tensor:
        return in_layout(randn(*case.shape).to(device, DTYPES[case.dtype]), case.layout)

    channels = case.shape[1]
    x, dy, residual = activation_like(), activation_like(), activation_like() if case.residual else None
    mask = (randn(case.shape[0], *case.shape[2:]) > -0.5).to(device) if case.mask else None
    weight, bias = randn(channels).to(device), randn(channels).to(device)
    if residual is not None:  # keep z clear of 0, where a ReLU's gradient may rightly be either
        z = _right(x, dy, Epilogue(weight, bias, residual, mask))[1]
        residual = residual + torch.copysign(torch.full_like(z, 0.5), z).to(residual.dtype)
    epilogue = Epilogue(weight, bias, residual, mask, case.activation)
    names = ("sums", "y", "dweight", "dbias", "dx", "dresidual")
    pairs = zip(names, _ours(x, dy, epilogue), _right(x, dy, epilogue), strict=True)
    return max(hold(f"{case}: {name}", mine, right) for name, mine, right in pairs if mine is not None)


def _right(x: Tensor, dy: Tensor, epilogue: Epilogue) -> tuple[Tensor, ...]:
    wide = Epilogue(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in epilogue))
    return _verbs(reference, x.double(), dy.double(), wide)


def _ours(x: Tensor, dy: Tensor, epilogue: Epilogue) -> tuple[Tensor, ...]:
    return _verbs(select(x), x, dy, epilogue)


def _verbs(backend, x: Tensor, dy: Tensor, epilogue: Epilogue) -> tuple[Tensor, ...]:  # type: ignore[no-untyped-def]
    """sums, y, dweight, dbias, dx, dresidual"""
    channels = x.shape[1]
    buffers = (torch.zeros(channels, device=x.device), torch.ones(channels, device=x.device))
    running = Running(*buffers, torch.zeros((), dtype=torch.int64, device=x.device), 0.1)
    sums = backend.batch_sums(x, epilogue.mask)
    kept = sums.clone()
    y, mean, invstd = backend.normalize(x, sums, epilogue, EPS, running)
    dsums, dweight, dbias = backend.grad_sums(dy, x, mean, invstd, epilogue)
    needs = epilogue.residual is not None
    dx, dresidual = backend.grad_input(dy, x, mean, invstd, epilogue, dsums, kept[-1:], needs)
    return kept, y, dweight, dbias, dx, dresidual


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, default=0, help="seconds after which no call is started")
    parser.add_argument("--smoke", action="store_true", help="a few calls: does the script work?")
    args = parser.parse_args(argv)
    device, budget = torch.device(args.device), Budget(args.budget)
    everything, worst, done = cases(args.smoke), 0.0, 0
    for case in everything:
        if budget.spent():
            break
        worst = max(worst, run(case, device))
        done += 1
    if device.type == "cuda":
        torch.cuda.synchronize()
    backend = name_for(torch.empty(1, device=device))
    print(f"{done} of {len(everything)} calls, back-end {backend}, largest relative error {worst:.1e}", file=sys.stderr)


if __name__ == "__main__":
    main()
