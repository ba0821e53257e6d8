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

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from benchmarks.harness import RESULTS, Results, commit
from tests.support.machine_code import ARCHITECTURES, MachineCode, read

if TYPE_CHECKING:
    from tests.support.gpu_compile import Launch

SMS = 132
"""Of an H100 or H200; the plans, made without a device, are for as many."""

SHAPES = (
    "8x256x128x256",
    "2x256x200x336",
    "32x64x112x112",
    "32x256x56x56",
    "32x512x28x28",
    "32x1024x14x14",
    "32x2048x7x7",
    "8x64x56x56",
)
FUSED_SHAPES = ("2x256x200x336",)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
COLUMNS = (
    "commit",
    "triton",
    "state",
    "target",
    "verb",
    "epilogue",
    "shape",
    "layout",
    "dtype",
    "registers",
    "threads_per_sm",
    "kilobytes_in_flight_per_sm",
    "instructions_per_element",
    "instructions_once",
    "barriers_once",
    "programs",
    "tiles_per_program",
    "bytes_last_program_reads",
    "local_bytes",
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
        found = recorded(shape, rows=self.layout == "NHWC", dtype=DTYPES[self.dtype], momentum=0.1, **fused)
        return [launch for launch in found if not fused or verb_of(launch) != "batch_sums"]


def calls(shapes: Sequence[str], dtypes: Sequence[str]) -> Iterator[Call]:
    for dtype in dtypes:
        for layout in ("NHWC", "NCHW"):
            yield from (Call(shape, layout, dtype, "none") for shape in shapes)
            yield from (Call(shape, layout, dtype, "add_relu") for shape in shapes if shape in FUSED_SHAPES)


def verb_of(launch: "Launch") -> str:
    return str(launch.kernel.function.__name__).removesuffix("_kernel")


class Work(NamedTuple):
    """How a launch is cut: its programs, tiles of each at most, sums that its last programs read."""

    programs: int
    tiles_per_program: int
    bytes_last_program_reads: int


def work_of(launch: "Launch") -> Work:
    """From the plan's numbers and the kernel's constants; before teams of splits, a last program read all of them."""
    constants = launch.kernel.constants
    given = dict(zip(launch.kernel.function.arg_names, (*launch.pointers, *launch.numbers), strict=False))
    unit = {constants["KIND"]: constants["ALIGN"]}
    columns = given["columns"] * unit.get("rows", 1)
    inner = given["inner"] * unit.get("planes", 1)
    splits = launch.grid // _cdiv(columns, constants.get("GROUP", constants["BLOCK_C"]))
    tiles = given["outer"] * _cdiv(inner, constants["BLOCK_I"])
    rows, width = splits, constants.get("BLOCK_K", constants["BLOCK_C"])
    if constants.get("TEAM"):
        rows = min(constants["TEAM"], splits) + _cdiv(splits, constants["TEAM"])
    read_last = rows * 2 * width * 8 if "BLOCK_S" in constants else 0
    return Work(launch.grid, given.get("per_program", _cdiv(tiles, splits)), read_last)


def bytes_per_element(launch: "Launch") -> int:
    """That a verb reads: of x, and of dy and the residual where they are given."""
    names = launch.kernel.function.arg_names
    given = dict(zip(names, launch.pointers, strict=False))
    tensors = (given.get(name) for name in ("x_ptr", "dy_ptr", "residual_ptr"))
    return sum(t.element_size() for t in tensors if t is not None)


class Compiler:
    """The machine code of launches for one target; calls that are alike share it."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._known: dict[Any, MachineCode] = {}

    def __call__(self, launch: "Launch") -> MachineCode:
        from tests.support.gpu_compile import TARGETS, compile_for, options_of

        kernel, _, pointers, numbers = launch
        options = options_of(kernel)
        kinds = [t if t is None else t.dtype for t in pointers] + [n if n is None else n >= 2**31 for n in numbers]
        key = (kernel.function, *kinds, *kernel.constants.items(), *options.items())
        if key not in self._known:
            compiled = compile_for(TARGETS[self.target], kernel, pointers, numbers)
            self._known[key] = read(compiled.asm["cubin"], compiled.metadata.shared)
        return self._known[key]


def measured(launch: "Launch", code: MachineCode, target: str) -> dict[str, Any]:
    """The columns that are read from machine code and plan."""
    from tests.support.gpu_compile import options_of

    threads = 32 * options_of(launch.kernel)["num_warps"]
    work = work_of(launch)
    resident = code.programs_per_sm(threads, ARCHITECTURES[target])
    loop, once = code.streaming()[0], code.once()
    return {
        "registers": code.registers,
        "threads_per_sm": resident * threads,
        "kilobytes_in_flight_per_sm": min(resident, _cdiv(work.programs, SMS)) * threads * loop.under_way / 1024,
        "instructions_per_element": len(loop.body) * bytes_per_element(launch) / loop.loaded,
        "instructions_once": len(once),
        "barriers_once": sum(each.name == "BAR" for each in once),
        **work._asdict(),
        "local_bytes": code.local,
    }


def rows(target: str, state: str, shapes: Sequence[str], dtypes: Sequence[str]) -> Iterator[dict[str, Any]]:
    import triton

    compiler = Compiler(target)
    origin = {"commit": commit(), "triton": triton.__version__, "state": state, "target": target}
    for call in calls(shapes, dtypes):
        for launch in call.launches():
            found = measured(launch, compiler(launch), target)
            yield origin | call._asdict() | {"verb": verb_of(launch)} | found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="sm_90", choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path, help="file; default: static-<target>.csv among the results")
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--append", action="store_true", help="add rows to the file instead of starting it anew")
    parser.add_argument("--state", default="after", choices=("before", "after"), help="what the rows are called")
    parser.add_argument("--tree", type=Path, help="checkout whose kernels are read; default: this one")
    args = parser.parse_args(arguments)
    if args.tree is not None:
        if "COMMIT" not in os.environ:
            parser.error("--tree needs $COMMIT, the commit of that checkout")
        sys.path.insert(0, str(args.tree))
        import syncbn.backends.gpu  # noqa: F401, now, so that everything else finds this one

        sys.path.pop(0)
    out = args.out or RESULTS / f"static-{args.target.replace('_', '')}.csv"
    results = Results(out, COLUMNS, args.append)
    for row in rows(args.target, args.state, args.shapes, args.dtypes):
        results.add(row)
        print(*results.rows[-1].values(), flush=True)


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)


if __name__ == "__main__":
    main()
