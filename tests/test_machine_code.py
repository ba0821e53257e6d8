"""What is read from machine code, held against code written by hand."""

import pytest

from tests.support.machine_code import ARCHITECTURES, MachineCode, parse

SM_90 = ARCHITECTURES["sm_90"]


def code(*lines: str, registers: int = 32, shared: int = 0) -> MachineCode:
    """A kernel as nvdisasm prints it: a label ends with a colon, an instruction has its address and a semicolon."""
    printed = [line if line.endswith(":") else f"        /*{at:04x}*/    {line} ;" for at, line in enumerate(lines)]
    return MachineCode(*parse("\n".join(printed)), registers=registers, shared=shared)


def _again(label: int) -> tuple[str, str]:
    """The end of a loop and of the kernel."""
    return f"@P0 BRA `(.L_x_{label})", "EXIT"


PLAIN = (
    "S2R R0, SR_TID.X",
    ".L_x_0:",
    "LDG.E.128 R4, desc[UR8][R2.64]",
    "@!P1 LDG.E.128.CONSTANT R8, desc[UR8][R2.64+0x10]",
    "FADD R20, R7, R20",
    "FADD R21, R8, R21",
    "LDG.E.U16 R12, desc[UR8][R2.64+0x20]",
    "FADD R22, R12, R22",
    "STG.E.64 desc[UR8][R14.64], R20",
    "@P0 BRA `(.L_x_0)",
    "EXIT",
)
PIPELINE = (
    ".L_x_1:",
    "DEPBAR.LE SB0, 0x2",
    "BAR.SYNC.DEFER_BLOCKING 0x0",
    "LDS.128 R4, [R30]",
    "FADD R20, R4, R20",
    "LDGSTS.E.BYPASS.128 [R30], desc[UR8][R2.64], !P2",
    "LDGSTS.E.BYPASS.128 [R30+0x1000], desc[UR8][R2.64], !P2",
    "LDGDEPBAR",
    "@P0 BRA `(.L_x_1)",
    "DEPBAR.LE SB0, 0x0",
    "EXIT",
)
COMBINE = (
    ".L_x_2:",
    "LDG.E.64.STRONG.GPU R4, desc[UR8][R2.64]",
    "DADD R20, R4, R20",
    "@P0 BRA `(.L_x_2)",
)


def jumped_around(*part: str) -> MachineCode:
    """A streaming loop in which a jump may go around a part."""
    load, jump, end = "LDG.E.128 R4, desc[UR8][R2.64]", "@P2 BRA `(.L_x_4)", ("FADD R20, R4, R20", *_again(3))
    return code(".L_x_3:", load, jump, *part, ".L_x_4:", *end)


def test_widths_of_accesses() -> None:
    """An access has the bytes that its opcode says, guarded or not; 4 where it says nothing."""
    (loop,) = code(*PLAIN).streaming()
    assert loop.widths() == [16, 16, 2, 8]
    assert loop.loaded == 34
    (narrow,) = code(".L_x_0:", "LDG.E.U8 R4, desc[UR8][R2.64]", "LDG.E R5, desc[UR8][R2.64]", *_again(0)).streaming()
    assert narrow.widths() == [1, 4]


def test_loads_under_way_end_where_they_are_used() -> None:
    """Two loads issued before a register of either is used are under way together; a third, later one is not."""
    (loop,) = code(*PLAIN).streaming()
    assert loop.under_way == 32


def test_a_use_of_any_loaded_register_ends_a_load() -> None:
    """R7 is the last register that LDG.E.128 R4 fills: used between the loads it keeps them apart, and R3 does not."""
    loads = ("LDG.E.128 R4, desc[UR8][R2.64]", "{}", "LDG.E.128 R8, desc[UR8][R2.64]", "FADD R20, R4, R8")

    def under_way(between: str) -> int:
        (loop,) = code(".L_x_0:", *(line.format(between) for line in loads), *_again(0)).streaming()
        return loop.under_way

    assert under_way("FADD R20, R20, R7.reuse") == 16
    assert under_way("FADD R20, R20, R3") == 32


def test_a_use_leaves_younger_loads_under_way() -> None:
    """Of three loads the first is used before two more are issued: then four are under way."""
    first, second, third, fourth, fifth = (f"LDG.E.128 R{at}, desc[UR8][R2.64]" for at in (4, 8, 12, 16, 24))
    uses = [f"FADD R20, R{at}, R20" for at in (4, 8, 12, 16, 24)]
    body = (first, second, third, uses[0], fourth, fifth, *uses[1:])
    (loop,) = code(".L_x_0:", *body, *_again(0)).streaming()
    assert loop.under_way == 64


def test_a_load_used_in_the_next_iteration_stays_under_way() -> None:
    """What the compiler loads for the next iteration counts together with what that one loads before using it."""
    body = ("LDG.E.128 R8, desc[UR8][R2.64]", "FADD R20, R4, R20", "FADD R20, R8, R20", "LDG.E.64 R4, desc[UR8][R2.64]")
    (loop,) = code(".L_x_0:", *body, *_again(0)).streaming()
    assert loop.under_way == 24


def test_copies_under_way_are_those_that_the_wait_allows_and_the_next() -> None:
    """DEPBAR.LE SB0, 2 lets two groups of two 16-byte copies be under way, to which an iteration adds a third."""
    (loop,) = code(*PIPELINE).streaming()
    assert loop.widths() == [16, 16]
    assert loop.under_way == (2 + 1) * 32


def test_groups_of_copies_may_be_several_in_an_iteration() -> None:
    """Two tensors copied in groups of their own: the wait counts groups, so that fewer iterations are under way."""
    other = ("LDGSTS.E.BYPASS.128 [R31], desc[UR8][R16.64], !P2", "LDGDEPBAR")
    (loop,) = code(*PIPELINE[:8], *other, *PIPELINE[8:]).streaming()
    assert loop.under_way == 32 + 16 + 32 + 16


def test_a_wait_for_everything_leaves_one_iteration_under_way() -> None:
    """A loop that waits for all copies has at most those under way that it issued since."""
    waiting = [line.replace("0x2", "0x0") for line in PIPELINE]
    (loop,) = code(*waiting).streaming()
    assert loop.under_way == 32


def test_the_end_of_a_group_is_no_access() -> None:
    """LDGDEPBAR, whose name begins like a load's, loads nothing: a loop with it alone does not stream."""
    assert code(".L_x_0:", "LDGDEPBAR", *_again(0)).streaming() == []


def test_loops_over_partial_sums_do_not_stream() -> None:
    """A loop that adds float64 is left out, one beside it is not."""
    both = code(*COMBINE, *PLAIN)
    assert [loop.loaded for loop in both.streaming()] == [34]
    assert code(*COMBINE, "EXIT").streaming() == []


def test_what_only_the_first_iteration_does_is_left_out() -> None:
    """A part with shuffles that a jump goes around is not what an iteration costs; the jump itself is."""
    (loop,) = jumped_around("SHFL.BFLY PT, R8, R4, 0x10, 0x1f", "BAR.SYNC.DEFER_BLOCKING 0x0").streaming()
    assert [each.name for each in loop.body] == ["LDG", "BRA", "FADD", "BRA"]
    assert loop.first_only == 2


def test_what_only_the_first_iteration_does_is_done_once() -> None:
    """What an iteration is not charged with is not lost: the first tile's shuffles and barriers count once."""
    once = jumped_around("SHFL.BFLY PT, R8, R4, 0x10, 0x1f", "BAR.SYNC.DEFER_BLOCKING 0x0").once()
    assert [each.name for each in once] == ["SHFL", "BAR", "EXIT"]
    every = jumped_around("FADD R8, R4, R4", "BAR.SYNC.DEFER_BLOCKING 0x0").once()
    assert [each.name for each in every] == ["EXIT"]


@pytest.mark.parametrize("access", ["STG.E.128 desc[UR8][R14.64], R4", "LDG.E.128 R8, desc[UR8][R14.64]"])
def test_other_parts_that_are_jumped_around_count(access: str) -> None:
    """A part without shuffles, or with an access beside them, may be any iteration's."""
    for part in (("SHFL.BFLY PT, R8, R4, 0x10, 0x1f", access), ("FADD R8, R4, R4", "BAR.SYNC.DEFER_BLOCKING 0x0")):
        (loop,) = jumped_around(*part).streaming()
        assert (len(loop.body), loop.first_only) == (6, 0)


def test_an_unrolled_loop_comes_before_its_rest() -> None:
    """Of several streaming loops the first is that which loads most in an iteration; one around them is none."""
    load = "LDG.E.128 R4, desc[UR8][R2.64]"
    rest, unrolled = (".L_x_0:", load, *_again(0)[:1]), (".L_x_1:", load, load, *_again(1)[:1])
    nested = code(".L_x_9:", *rest, *unrolled, "@P1 BRA P3, `(.L_x_9)", "EXIT")
    assert len(nested.loops()) == 3
    assert [loop.loaded for loop in nested.streaming()] == [32, 16]


def test_once_is_what_lies_outside_of_streaming_loops() -> None:
    """Up to the last EXIT, without the loop; subroutines, the last jump to itself and padding are not executed."""
    after = ("MUFU.RCP R4, R4", "RET.REL.NODEC R2 `(kernel)", ".L_x_8:", "BRA `(.L_x_8)", "NOP")
    assert [each.name for each in code(*PLAIN, *after).once()] == ["S2R", "EXIT"]


def test_once_ends_where_the_last_program_takes_over() -> None:
    """The arrival, an atomic after the streaming loops, is the last instruction that every program executes."""
    arrival = ("BAR.SYNC.DEFER_BLOCKING 0x0", "@P1 ATOMG.E.ADD.STRONG.GPU PT, R9, desc[UR8][R6.64], R9", "@P1 EXIT")
    once = code(*PLAIN[:-1], *arrival, *COMBINE, "EXIT").once()
    assert [each.name for each in once] == ["S2R", "BAR", "ATOMG"]


def test_an_atomic_before_the_loop_is_no_arrival() -> None:
    """normalize counts its calls with an atomic before it streams; what follows the loop still counts."""
    once = code("ATOMG.E.ADD.STRONG.GPU PT, R9, desc[UR8][R6.64], R9", *PLAIN).once()
    assert [each.name for each in once] == ["ATOMG", "S2R", "EXIT"]


@pytest.mark.parametrize(
    ("registers", "shared", "threads", "programs"),
    [
        (93, 0, 256, 2),  # 96 registers a thread, so 20 warps
        (80, 0, 256, 3),
        (96, 0, 32, 20),  # 5 warps in each quarter, where all registers together would hold 21
        (41, 0, 128, 10),  # 48 registers a thread
        (16, 0, 256, 8),  # 2048 threads
        (32, 0, 32, 32),
        (32, 75 << 10, 128, 3),  # and 1 KiB more of shared memory for each program
        (32, 76 << 10, 128, 2),
    ],
)
def test_programs_per_sm(registers: int, shared: int, threads: int, programs: int) -> None:
    """Registers, shared memory, threads and programs each limit how many programs an H100's SM holds."""
    assert code("EXIT", registers=registers, shared=shared).programs_per_sm(threads, SM_90) == programs
