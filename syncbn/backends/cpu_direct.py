"""Calls of the CPU library that are all alike: what cpu.py works out in each of them is laid out once, here.

It is made as gpu_direct.py is, so that direct.py serves both: a launch takes addresses, and is done when it returns.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn.backends.cpu import alike, is_readable, is_side_by_side
from syncbn.backends.cpu_library import Own, pack_alike, pack_own, verb
from syncbn.formulas import Epilogue, Running, compute_dtype

At = int | None
_REST = Own(0)


class Work(NamedTuple):
    """In place of a stream's workspace: the library has its own."""

    stream: int = 0
    partials_at: int = 0
    semaphores_at: int = 0


_WORK = Work()


class Step(NamedTuple):
    """A verb for calls like these: its arguments are those of gpu_direct.py's, in the same order."""

    launch: Callable[..., None]

    def bind(self) -> bool:
        """It can always be launched."""
        return True


class Launches:
    """Of the four verbs, for tensors like these; dy like y."""

    report_at = 0

    def __init__(self, x: Tensor, epilogue: Epilogue, running: Running | None) -> None:
        self.strides, self.wide = x.stride(), compute_dtype(x.dtype)
        self.shared = pack_alike(*alike(x, epilogue, running))
        self._batch_sums, self._normalize = verb("batch_sums"), verb("normalize")
        self._grad_sums, self._grad_input = verb("grad_sums"), verb("grad_input")
        self.sums, self.normalized = Step(self._launch_sums), Step(self._launch_normalize)
        self.dsums = Step(self._launch_dsums)
        self.inputs = self.both_inputs = Step(self._launch_inputs)

    def halves(self, eps: float, momentum: float) -> tuple[float, float]:
        """As they are: here an argument has all of a number."""
        return eps, momentum

    def turn(self, addresses: int) -> Work | None:
        """None if an activation does not begin where numbers may."""
        return None if addresses & 7 else _WORK

    def _launch_sums(
        self, stream: int, x: int, mask: At, partials: int, semaphores: int, sums: int, tag: float
    ) -> None:
        self._batch_sums(self._own(tag, x, 0, 0, 0, 0, 0, 0, sums))

    def _launch_normalize(
        self, stream: int, x: int, residual: At, mask: At, sums: int, weight: At, bias: At, mean: At, var: At,
        counter: At, momentum_at: At, y: int, batch_mean: int, invstd: int, report: int, eps: float, momentum: float,
        tag: float, turn: int,
    ) -> None:  # fmt: skip
        given = x, residual or 0, 0, weight or 0, bias or 0, batch_mean, invstd, sums
        self._normalize(self._own(0.0, *given, y, mean or 0, var or 0, counter or 0, eps, momentum))

    def _launch_dsums(
        self, stream: int, dy: int, x: int, residual: At, mask: At, mean: int, invstd: int, weight: At, bias: At,
        partials: int, semaphores: int, dsums: int, dweight: At, dbias: At, tag: float,
    ) -> None:  # fmt: skip
        given = x, residual or 0, 0, weight or 0, bias or 0, mean, invstd, 0
        self._grad_sums(self._own(tag, *given, *_FORWARD, dy, dsums, 0, dweight or 0, dbias or 0))

    def _launch_inputs(
        self, stream: int, dy: int, x: int, residual: At, mask: At, mean: int, invstd: int, weight: At, bias: At,
        dsums: int, count: int, dx: int, dresidual: At, report: int, tag: float, turn: int,
    ) -> None:  # fmt: skip
        given = x, residual or 0, 0, weight or 0, bias or 0, mean, invstd, 0
        self._grad_input(self._own(0.0, *given, *_FORWARD, dy, dsums, count, 0, 0, dx, dresidual or 0))

    def _own(self, *given: float) -> bytes:
        """The fields of a call, given from the tag on as far as they are not 0."""
        return self.shared + pack_own(torch.get_num_threads(), *given, *_REST[len(given) + 1 :])


_FORWARD = _REST[Own._fields.index("y") : Own._fields.index("dy")]
"""Fields between those that all verbs read and those that the backward ones do."""


def launches_for(x: Tensor, epilogue: Epilogue, running: Running | None) -> Launches | None:
    """Those for calls with tensors of these shapes, strides, dtypes and device; None where cpu.py would copy one."""
    buffers = () if running is None else running[:3]
    vectors = [t for t in (*epilogue[:2], *buffers) if t is not None]
    activations = [t for t in (x, epilogue.residual) if t is not None]
    is_usual = (
        epilogue.mask is None
        and x.numel() > 0
        and all(map(is_side_by_side, vectors))
        and all(is_readable(t, x) and t.stride() == x.stride() for t in activations)
        and (running is None or running.num_batches_tracked is None or running.num_batches_tracked.dtype == torch.int64)
    )
    return Launches(x, epilogue, running) if is_usual else None
