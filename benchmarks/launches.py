"""What a kernel's launch is like: how it is cut, and its machine code for a GPU that need not be there."""

from typing import TYPE_CHECKING, Any, NamedTuple

from tests.support.machine_code import ARCHITECTURES, MachineCode, read

if TYPE_CHECKING:
    from tests.support.gpu_compile import Launch

SMS = 132
"""Of an H100 or H200; the plans, made without a device, are for as many."""


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


def _cdiv(size: int, block: int) -> int:
    return -(-size // block)
