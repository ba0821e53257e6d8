"""What the kernels' machine code is like, read from the code that Triton makes for a GPU: not a time, and no GPU.

    python -m benchmarks.static [--target sm_90] [--out FILE] [--append] [--shapes 32x256x56x56 …] [--dtypes bf16 …]
    COMMIT=c6ee4ee0d6 python -m benchmarks.static --state before --tree CHECKOUT --append

One row a verb, shape, layout and dtype of a training step:

- threads_per_sm: as many as an SM's registers, shared memory and limits let be resident
- kilobytes_in_flight_per_sm: global loads under way at most in the streaming loop, in as many of those programs as the
  grid has for each SM; to keep the memory busy takes latency times bandwidth, an estimated 16 KiB on an H100
- instructions_per_element: a thread's in the streaming loop, without what only its first iteration does; elements are
  counted by the bytes that the loop loads, those of lanes past an edge too (7 × 7 planes in bf16: 240 of each 1024)
- instructions_once, barriers_once: outside of that loop or in its first iteration only, at most, up to a program's
  arrival where the last one combines
- bytes_last_program_reads: of other programs' sums, at most, by the last program of a group of columns
- local_bytes: a thread's local memory, where registers would spill

Bytes are 1024 to the kilobyte. --tree reads another checkout of the package, whose commit is then taken from $COMMIT.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.launches import Compiler, measured, verb_of
from benchmarks.machine import commit, triton_version
from benchmarks.options import parser
from benchmarks.tables import RESULTS, Results
from tests.support.machine_code import ARCHITECTURES

if TYPE_CHECKING:
    from tests.support.gpu_compile import Launch

SHAPES = (
    *("8x256x128x256", "2x256x200x336", "32x64x112x112", "32x256x56x56", "32x512x28x28"),
    *("32x1024x14x14", "32x2048x7x7", "8x64x56x56"),
)
FUSED_SHAPES = ("2x256x200x336",)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
LAYOUTS = {"NHWC": "channels_last", "NCHW": "contiguous"}
COLUMNS = (
    *("commit", "triton", "state", "target", "verb", "epilogue", "shape", "layout", "dtype", "registers"),
    *("threads_per_sm", "kilobytes_in_flight_per_sm", "instructions_per_element", "instructions_once", "barriers_once"),
    *("programs", "tiles_per_program", "bytes_last_program_reads", "local_bytes"),
)


class Call(NamedTuple):
    """A training step whose kernels are looked at."""

    shape: str
    layout: str
    dtype: str
    epilogue: str

    def launches(self) -> list["Launch"]:
        """Those of its four verbs; of the three that an epilogue changes, if it has one."""
        from tests.support.gpu_compile import recorded

        fused: dict[str, Any] = {"activation": "relu", "residual": True} if self.epilogue == "add_relu" else {}
        shape = tuple(map(int, self.shape.split("x")))
        found = recorded(shape, DTYPES[self.dtype], LAYOUTS[self.layout], momentum=0.1, **fused)
        return [launch for launch in found if not fused or verb_of(launch) != "batch_sums"]


def calls(shapes: Sequence[str], dtypes: Sequence[str]) -> Iterator[Call]:
    for dtype in dtypes:
        for layout in LAYOUTS:
            yield from (Call(shape, layout, dtype, "none") for shape in shapes)
            yield from (Call(shape, layout, dtype, "add_relu") for shape in shapes if shape in FUSED_SHAPES)


def rows(target: str, state: str, shapes: Sequence[str], dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    compiler = Compiler(target)
    origin = {"commit": commit(), "triton": triton_version(), "state": state, "target": target}
    for call in calls(shapes, dtypes):
        for launch in call.launches():
            found = measured(launch, compiler(launch), target)
            yield origin | call._asdict() | {"verb": verb_of(launch)} | found


def main(arguments: Sequence[str] | None = None) -> None:
    own = parser(__doc__, "append")
    own.add_argument("--target", default="sm_90", choices=ARCHITECTURES)
    own.add_argument("--out", type=Path, help="file; default: static-<target>.csv among the results")
    own.add_argument("--shapes", nargs="+", default=SHAPES)
    own.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    own.add_argument("--state", default="after", choices=("before", "after"), help="what the rows are called")
    own.add_argument("--tree", type=Path, help="checkout whose kernels are read; default: this one")
    args = own.parse_args(arguments)
    if args.tree is not None:
        if "COMMIT" not in os.environ:
            own.error("--tree needs $COMMIT, the commit of that checkout")
        sys.path.insert(0, str(args.tree))
        import syncbn.backends.gpu  # noqa: F401, now, so that everything else finds this one

        sys.path.pop(0)
    out = args.out or RESULTS / f"static-{args.target.replace('_', '')}.csv"
    results = Results(out, COLUMNS, args.append)
    for row in rows(args.target, args.state, args.shapes, args.dtypes):
        results.add(row)
        print(*results.rows[-1].values(), flush=True)


if __name__ == "__main__":
    main()
