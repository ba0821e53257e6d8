"""What the interpreter's process is asked about the fingerprint: what kernels write on the wire and to the report."""

from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.backends import reference
from syncbn.formulas import Epilogue, Running
from tests.support.gpu_interpreter import device_of
from tests.support.oracle import in_layout

EPS = 1e-5
CPU = torch.device("cpu")


class Wire(NamedTuple):
    """What a sums kernel wrote, and the programs that it took."""

    sums: Tensor
    programs: int


def wires(x: Tensor, mask: Tensor | None, tag: float, sms: int) -> list[Wire]:
    """Those of the forward and the backward."""
    from syncbn.backends import gpu

    mean, invstd = torch.zeros(x.shape[1]), torch.ones(x.shape[1])
    epilogue = Epilogue(None, None, None, mask, "relu")
    with device_of(sms):
        grids = gpu.plan_batch_sums(x, mask).grid, gpu.plan_grad_sums(x, x, epilogue).grid
        sums, (dsums, _, _) = gpu.batch_sums(x, mask, tag), gpu.grad_sums(x, x, mean, invstd, epilogue, tag)
    return [Wire(sums, grids[0]), Wire(dsums, grids[1])]


class Mark(NamedTuple):
    """A call as a rank finds it after the sum: the tags of all ranks, its own, and the turn."""

    tags: list[int]
    tag: int
    turn: int = 0

    def found(self) -> list[float]:
        """V and Q, as an all-reduce of the ranks' wires makes them."""
        votes = [reference.stamped(torch.empty(2, dtype=torch.float64), float(tag)) for tag in self.tags]
        return torch.stack(votes).sum(0).tolist()  # type: ignore[no-any-return]


class Setting(NamedTuple):
    """The tensors of a call: in float32, the running statistics perhaps with gaps between their values."""

    shape: tuple[int, ...] = (2, 5, 3, 4)
    layout: str = "contiguous"
    momentum: float | None = 0.1
    gaps: bool = False
    sms: int = 132


def reports(marks: list[tuple[str, Mark]], setting: Setting, before: list[float]) -> tuple[list[list[float]], Tensor]:
    """The report after each of these directions, of calls that have it as before; and all that they returned.

    Results are one vector, so that their bits can be compared.
    """
    from syncbn.backends import gpu, gpu_report

    report = gpu_report.report_of(CPU)
    report.copy_(torch.tensor(before))
    x, dy, residual = (in_layout(torch.randn(setting.shape), setting.layout) for _ in range(3))
    channels = setting.shape[1]
    epilogue = Epilogue(torch.rand(channels), torch.rand(channels), residual, None, "relu")
    mean, var = torch.stack([torch.zeros(channels), torch.ones(channels)], 1).unbind(1)
    if not setting.gaps:
        mean, var = mean.contiguous(), var.contiguous()
    running = Running(mean, var, torch.tensor(0), setting.momentum)
    seen, results = [], []
    with device_of(setting.sms):
        sums = gpu.batch_sums(x, None)
        for direction, mark in marks:
            found = torch.tensor(mark.found(), dtype=torch.float64)
            given = float(mark.tag), mark.turn
            wire = torch.cat([sums[:-2], found])
            if direction == "forward":
                results += gpu.normalize(x, wire, epilogue, EPS, running, *given)
            else:
                statistics = torch.zeros(channels), torch.ones(channels)
                wire, count = torch.cat([sums[: 2 * channels], found]), sums[-3:-2]
                results += gpu.grad_input(dy, x, *statistics, epilogue, wire, count, True, *given)
            seen.append(report.tolist())
    return seen, torch.cat([t.flatten().double() for t in (*results, *running[:3]) if t is not None])
