"""The four verbs of a back-end: all of them in a row, and each by itself, by ours and by torch's own kernel for it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.checking import EPS, Case
from syncbn.backends import reference, select
from syncbn.formulas import Epilogue, Running

VERBS = {"batch_sums": (1, 1), "normalize": (2, 3), "grad_sums": (2, 3), "grad_input": (3, 5)}
"""Activations read and written, without and with add_relu."""


class Outcome(NamedTuple):
    """Of all four verbs."""

    sums: Tensor
    y: Tensor
    mean: Tensor
    invstd: Tensor
    dsums: Tensor
    dweight: Tensor
    dbias: Tensor
    dx: Tensor
    dresidual: Tensor | None


def all_verbs(
    backend: Any, x: Tensor, dy: Tensor, epilogue: Epilogue, running: Running | None, needs_dresidual: bool
) -> Outcome:
    """A forward and backward by a back-end."""
    sums = backend.batch_sums(x, epilogue.mask)
    counted = sums.clone()
    y, mean, invstd = backend.normalize(x, sums, epilogue, EPS, running)
    dsums, dweight, dbias = backend.grad_sums(dy, x, mean, invstd, epilogue)
    grads = backend.grad_input(dy, x, mean, invstd, epilogue, dsums, counted[-3:-2], needs_dresidual)
    return Outcome(counted, y, mean, invstd, dsums, dweight, dbias, *grads)


def in_float64(epilogue: Epilogue) -> Epilogue:
    return Epilogue(*(t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in epilogue))


class Fixed(NamedTuple):
    """What every copy of a case shares: (C) statistics and reduced sums, right to float64 and in compute precision."""

    sums: Tensor
    mean: Tensor
    invstd: Tensor
    dsums: Tensor
    count: Tensor
    right: dict[str, Tensor]


def fix(case: Case) -> Fixed:
    """Statistics by the reference in float64 of the tensors as they are, rounded once to what the verbs take."""
    wide = in_float64(epilogue(case))
    out = all_verbs(reference, case.x.double(), case.dy.double(), wide, None, needs_dresidual=False)
    right = {"batch_sums": out.sums, "normalize": out.y, "grad_sums": out.dweight, "grad_input": out.dx}
    count = out.sums[-3:-2].clone()
    return Fixed(out.sums, out.mean.float(), out.invstd.float(), out.dsums, count, right | {"mean": out.mean})


def epilogue(case: Case) -> Epilogue:
    return Epilogue(case.weight, case.bias, case.residual, None, None if case.residual is None else "relu")


Call = Callable[[Case], Any]


class Entrant(NamedTuple):
    """A verb's implementation; of several outputs the one with this index is compared with `Fixed.right`."""

    name: str
    call: Call
    output: int | None
    is_ours: bool = False

    def main(self, case: Case) -> Tensor:
        """The output that is compared."""
        outputs = self.call(case)
        return outputs if self.output is None else outputs[self.output]


def ours(verb: str, case: Case, fixed: Fixed) -> Entrant:
    """The back-end that serves this device."""
    verbs = select(case.x)
    sums, mean, invstd, dsums, count, _ = fixed
    needs = case.residual is not None
    calls: dict[str, tuple[Call, int | None]] = {
        "batch_sums": (lambda c: verbs.batch_sums(c.x, None), None),
        "normalize": (lambda c: verbs.normalize(c.x, sums, epilogue(c), EPS, None), 0),
        "grad_sums": (lambda c: verbs.grad_sums(c.dy, c.x, mean, invstd, epilogue(c)), 1),
        "grad_input": (lambda c: verbs.grad_input(c.dy, c.x, mean, invstd, epilogue(c), dsums, count, needs), 0),
    }
    return Entrant("syncbn", *calls[verb], True)


def torchs(verb: str, case: Case, fixed: Fixed) -> Entrant | None:
    """torch's kernel for the verb without an epilogue, named by its operation; on CPU its nearest operation, if any."""
    if case.residual is not None:
        return None
    _, mean, invstd, dsums, count, _ = fixed
    weight, bias = case.weight, case.bias
    calls: dict[str, tuple[Call, int | None]]
    if case.x.is_cuda:
        sum_dy, sum_dy_xhat = dsums[:-2].float().chunk(2)
        back = (mean, invstd, weight, sum_dy, sum_dy_xhat / invstd, count.int())
        calls = {
            "batch_norm_stats": (lambda c: torch.batch_norm_stats(c.x, EPS), 0),
            "batch_norm_elemt": (lambda c: torch.batch_norm_elemt(c.x, weight, bias, mean, invstd, EPS), None),
            "batch_norm_backward_reduce": (
                lambda c: torch.batch_norm_backward_reduce(c.dy, c.x, mean, invstd, weight, True, True, True),
                2,
            ),
            "batch_norm_backward_elemt": (lambda c: torch.batch_norm_backward_elemt(c.dy, c.x, *back), None),
        }
    else:
        aten, dims = torch.ops.aten, [dim for dim in range(case.x.ndim) if dim != 1]
        var, frozen = invstd.pow(-2) - EPS, (None, None, False, EPS, [False, True, True])
        calls = {
            "var_mean": (lambda c: torch.var_mean(c.x, dims), 1),
            "native_batch_norm": (
                lambda c: aten.native_batch_norm(c.x, weight, bias, mean, var, False, 0.0, EPS),
                0,
            ),
            "native_batch_norm_backward": (
                lambda c: aten.native_batch_norm_backward(c.dy, c.x, weight, mean, var, *frozen),
                1,
            ),
        }
    named = dict(zip(VERBS, calls.items(), strict=False)).get(verb)
    return None if named is None else Entrant(named[0], *named[1])
