"""How much of an SM each verb takes, measured: programs, warps, bytes under way; pure Python, no Triton, no tensor."""

from typing import NamedTuple

LONG = 256 << 10
LEAST_COLUMNS = 16
"""Columns of a tile of rows, where there are as many: 32 bytes of bfloat16, what memory gives at once."""

SUMS = ("batch_sums", "grad_sums")


class Effort(NamedTuple):
    """How a verb uses an SM: programs on it at once, warps in each, bytes of a tile per thread, tiles under way.

    columns: of a tile of rows or of small planes, at most. Where a program leaves sums, few columns make many groups,
    whose last programs have little to add up; many columns make long runs in memory, which long rows gain more by.
    """

    resident: int
    warps: int
    thread_bytes: int
    stages: int
    columns: int


class Efforts(NamedTuple):
    """By layout; rows are long if an SM gets LONG bytes of them or more. What has no vectors is planes in this."""

    rows: Effort
    long_rows: Effort
    planes: Effort


EFFORTS = {
    "batch_sums": Efforts(Effort(2, 8, 32, 4, 32), Effort(2, 8, 32, 4, 32), Effort(4, 4, 32, 4, 1024)),
    "normalize": Efforts(Effort(4, 4, 32, 3, 128), Effort(2, 8, 32, 3, 128), Effort(4, 4, 32, 3, 512)),
    "grad_sums": Efforts(Effort(2, 8, 32, 3, 32), Effort(2, 8, 32, 3, 64), Effort(4, 4, 32, 3, 1024)),
    "grad_input": Efforts(Effort(4, 4, 32, 3, 128), Effort(2, 8, 32, 3, 128), Effort(4, 4, 32, 3, 1024)),
}
"""By verb; the quickest on an H100, 2026-11-26, of 1 to 8 programs, 4 to 16 warps, 1 to 4 stages, 16 to 128 columns.

On an H200, 2026-11-27, long rows of 64 channels took 9 to 11 % less in tiles of 32 columns (batch_sums) and 13 to 14 %
less in tiles of 64 (grad_sums) than in tiles of 16 with one stage more; shorter rows keep those of 16.
"""


def effort_of(verb: str, layout: str, columns: int, size: int, sms: int, with_residual: bool = False) -> Effort:
    """That of a call on an x of that many columns and bytes, whose layout is "rows", "planes", "small planes" or other.

    A residual is one more tile under way for each of grad_sums', so that there is one fewer: else its registers are
    too many for two programs.
    """
    efforts = EFFORTS[verb]
    effort = efforts.planes
    if layout == "rows":
        is_long = size >= LONG * sms
        effort = efforts.long_rows if is_long else efforts.rows
        if verb in SUMS and not is_long:
            effort = effort._replace(columns=max(LEAST_COLUMNS, min(effort.columns, pow2(columns) // 4)))
    if verb == "grad_sums" and with_residual:
        effort = effort._replace(stages=effort.stages - 1)
    return effort


def pow2(size: int) -> int:
    """The least power of two that is no less."""
    return 1 << max(size - 1, 0).bit_length()
