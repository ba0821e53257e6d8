"""What a kernel's machine code says of it, read from a cubin without a device: loops, widths, bytes under way.

Code is taken in the order in which it lies. A loop is what lies between a label and a jump back to it; a streaming loop
is one with global loads. Left out are loops that add with DADD, which are those over other programs' float64 sums, and
loops around another one with loads.
"""

import importlib.util
import re
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

WARP = 32
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"(\.L\w+):")
WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
"""Bytes by the part of an opcode that says it; 4 where none does."""


class Architecture(NamedTuple):
    """What one SM has, and what it sets aside of its shared memory for each program."""

    registers: int
    threads: int
    programs: int
    shared: int
    reserved: int


ARCHITECTURES = {
    "sm_80": Architecture(65536, 2048, 32, 164 << 10, 1 << 10),
    "sm_90": Architecture(65536, 2048, 32, 228 << 10, 1 << 10),
    "sm_100": Architecture(65536, 2048, 32, 228 << 10, 1 << 10),
}


class Instruction(NamedTuple):
    """An instruction without its guard: LDG.E.128 and R4, desc[UR8][R6.64], say."""

    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that one thread loads, copies or stores."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @property
    def target(self) -> str:
        """The label that is jumped to, if any."""
        found = re.search(r"`\((\.L\w+)\)", self.operands) if self.name == "BRA" else None
        return found[1] if found else ""

    @property
    def mentioned(self) -> set[int]:
        """Registers that are named; of a longer run of them only the first is."""
        return {int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)}

    @property
    def loaded(self) -> set[int]:
        """Registers that a load fills."""
        first = re.search(r"\bR(\d+)\b", self.operands)
        return set(range(int(first[1]), int(first[1]) + max(self.width // 4, 1))) if first else set()


def is_load(instruction: Instruction) -> bool:
    """Whether global memory is read, into registers or, by a copy, into shared memory."""
    return instruction.name in ("LDG", "LDGSTS")


def is_access(instruction: Instruction) -> bool:
    return is_load(instruction) or instruction.name == "STG"


class Loop(NamedTuple):
    """What every iteration executes, and how many instructions only the first one does in addition."""

    body: list[Instruction]
    first_only: int

    def widths(self, which: Callable[[Instruction], bool] = is_access) -> list[int]:
        """Bytes of each global access of an iteration, per thread."""
        return [each.width for each in self.body if which(each)]

    @property
    def loaded(self) -> int:
        """Bytes that one thread loads or copies in an iteration."""
        return sum(self.widths(is_load))

    @property
    def under_way(self) -> int:
        """The most bytes that one thread has asked for and not yet waited for.

        A load ends, with those before it, where its register is next named. A copy ends where DEPBAR.LE SB0, n lets
        only the n youngest groups of copies, which LDGDEPBAR closes, be under way. A pipeline is full after as many
        iterations as that lets groups be.
        """
        waits = [_groups_left(each) for each in self.body if each.opcode == "DEPBAR.LE"]
        loads: list[tuple[int, set[int]]] = []
        groups: list[int] = []
        open_group = most = 0
        for each in self.body * (max(waits, default=0) + 2):
            ends = [at for at, (_, registers) in enumerate(loads) if registers & each.mentioned]
            loads = loads[max(ends, default=-1) + 1 :]
            if each.name == "LDG":
                loads.append((each.width, each.loaded))
            elif each.name == "LDGSTS":
                open_group += each.width
            elif each.name == "LDGDEPBAR":
                groups, open_group = [*groups, open_group], 0
            elif each.opcode == "DEPBAR.LE":
                groups = groups[max(len(groups) - _groups_left(each), 0) :]
            most = max(most, sum(width for width, _ in loads) + sum(groups))
        return most


def _groups_left(wait: Instruction) -> int:
    """n of DEPBAR.LE SB0, n"""
    return int(wait.operands.split(",")[1], 0)


class MachineCode(NamedTuple):
    """A kernel's instructions, where its labels lie among them, and what each thread and program takes.

    local is the bytes of local memory of a thread, its stack included; shared those of shared memory of a program.
    """

    instructions: list[Instruction]
    labels: dict[str, int]
    registers: int = 0
    local: int = 0
    shared: int = 0

    def loops(self) -> list[range]:
        """From each label that is jumped back to, to the jump."""
        jumps = ((self.labels.get(each.target, at + 1), at) for at, each in enumerate(self.instructions))
        return [range(start, at + 1) for start, at in jumps if start <= at]

    def streaming(self) -> list[Loop]:
        """The streaming loops, that with the most bytes per iteration first: what the compiler unrolled has a rest."""
        loops = [self._loop(span) for span in self._streaming_spans()]
        return sorted(loops, key=lambda loop: loop.loaded, reverse=True)

    def once(self) -> list[Instruction]:
        """What a program executes once, at most: all outside of the streaming loops, up to its arrival or its end, and
        what only their first iteration does.

        It arrives with the first atomic after those loops; what follows is done by the last program to arrive. After
        the last EXIT come subroutines for rare operands, and padding.
        """
        spans = self._streaming_spans()
        repeated = {at for span in spans for at in span} - {at for span in spans for at in self._first_only(span)}
        last = max((span.stop for span in spans), default=0)
        arrivals = [at for at, each in enumerate(self.instructions) if at >= last and each.name == "ATOMG"]
        exits = [at for at, each in enumerate(self.instructions) if each.name == "EXIT"]
        end = arrivals[0] if arrivals else exits[-1]
        return [self.instructions[at] for at in range(end + 1) if at not in repeated]

    def programs_per_sm(self, threads: int, architecture: Architecture) -> int:
        """Programs of so many threads that fit an SM: registers go to warps by 256, warps to its four quarters."""
        warps = -(-threads // WARP)
        per_warp = -(-max(self.registers, 1) * WARP // 256) * 256
        by_registers = 4 * (architecture.registers // 4 // per_warp) // warps
        by_shared = architecture.shared // (self.shared + architecture.reserved)
        return min(by_registers, by_shared, architecture.threads // threads, architecture.programs)

    def _streaming_spans(self) -> list[range]:
        found = []
        for span in self.loops():
            body = [self.instructions[at] for at in span]
            if any(map(is_load, body)) and not any(each.name == "DADD" for each in body):
                found.append(span)
        return [span for span in found if not any(other != span and _within(other, span) for other in found)]

    def _loop(self, span: range) -> Loop:
        first_only = self._first_only(span)
        return Loop([self.instructions[at] for at in span if at not in first_only], len(first_only))

    def _first_only(self, span: range) -> set[int]:
        """Of a loop, what a jump goes around that has shuffles but no access: the first tile's reduction."""
        found: set[int] = set()
        for at in span:
            around = range(at + 1, self.labels.get(self.instructions[at].target, 0))
            part = [self.instructions[inside] for inside in around]
            if around.stop <= span.stop and any(each.name == "SHFL" for each in part) and not any(map(is_access, part)):
                found.update(around)
        return found


def _within(inner: range, outer: range) -> bool:
    return outer.start <= inner.start and inner.stop <= outer.stop


def parse(code: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions of a disassembly, and which one each label precedes."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in code.splitlines():
        label, found = LABEL.match(line), INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(instructions)
        elif found:
            instructions.append(Instruction(found[1], found[2]))
    return instructions, labels


def read(cubin: bytes, shared: int) -> MachineCode:
    """The machine code of a kernel that is launched with so many bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    return MachineCode(*parse(code), registers, stack + local, shared)


def _tool(name: str, *args: str) -> str:
    """What one of the tools that come with Triton prints."""
    spec = importlib.util.find_spec("triton")
    folders: Sequence[str] = spec.submodule_search_locations or () if spec else ()
    tool = Path(folders[0]) / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout
