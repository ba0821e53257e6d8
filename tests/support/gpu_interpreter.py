"""A process in which Triton interprets its kernels on the CPU, and the jobs that tests run in it."""

import importlib.metadata
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.formulas import Epilogue, Running
from syncbn.functional import sync_batch_norm
from tests.support.oracle import UNIT, Call, Case, Outcome, compare, make_calls
from tests.support.triton_process import TritonProcess

CUT_BFLOAT16 = 2**-7 + 3e-6
"""oracle.UNIT's bound where bfloat16 is cut off, by a whole unit in the last place, as the interpreter does."""


class Interpreter(TritonProcess):
    """A process whose Triton interprets."""

    def __init__(self) -> None:
        old_triton, old_numpy = (_version(name) < limit for name, limit in (("triton", (3, 7)), ("numpy", (2, 4))))
        if old_triton and not old_numpy:
            pytest.skip("the interpreter of Triton before 3.7 has no range() with numpy 2.4 or later")
        super().__init__({"TRITON_INTERPRET": "1"}, _begin)


def _begin() -> None:
    from triton.runtime import interpreter

    warnings.filterwarnings("ignore", "Conversion of an array", DeprecationWarning)  # Triton 3.6's own, for range()
    UNIT[torch.bfloat16] = CUT_BFLOAT16
    interpreter.ReduceOps.reduce_by_elements = interpreter.ReduceOps.generic_reduce
    interpreter.ReduceOps.generic_reduce = reduce_by_slices


def reduce_by_slices(self: Any, given: tuple[Any, ...]) -> list[Any]:
    """tl.reduce by a function of the kernels' own, which Triton's interpreter calls for one element at a time.

    Here it gets all elements of a position along the axis at once, in the same order: it works on blocks, too.
    """
    blocks = [np.moveaxis(block.handle.data, self.axis, 0) for block in given]
    total: tuple[Any, ...] = ()
    for parts in zip(*blocks, strict=True):
        part = tuple(self.to_tensor(each, block.dtype) for each, block in zip(parts, given, strict=True))
        total = self.combine_fn.fn(*total, *part) if total else part
    return [self.to_tensor(each.handle.data, block.dtype) for each, block in zip(total, given, strict=True)]


def check_reduction(shape: tuple[int, int], axis: int) -> None:
    """What `reduce_by_slices` makes of two sums are the bits that Triton's own way makes."""
    from triton.runtime.interpreter import ReduceOps

    from tests.support.small_kernels import two_sums_kernel

    x = torch.randn(shape)
    sums = [torch.zeros(2, shape[1 - axis]) for _ in range(2)]
    for way, out in zip((ReduceOps.reduce_by_elements, reduce_by_slices), sums, strict=True):
        ReduceOps.generic_reduce = way
        two_sums_kernel[1,](x, out, *shape, axis)
    assert torch.equal(*sums)
    torch.testing.assert_close(sums[0], torch.stack([x.sum(axis), x.square().sum(axis)]))


def check_share(shape: tuple[int, ...], dtype: torch.dtype, rows: bool) -> None:
    """A few programs together have all tiles of an x, in every verb's cut of it."""
    from syncbn.backends import gpu
    from tests.support.small_kernels import share_kernel

    x = torch.empty(shape, dtype=dtype, device="meta")
    x = x.to(memory_format=torch.channels_last) if rows else x
    epilogue = Epilogue(None, None)
    for plan in (
        gpu.plan_batch_sums(x, None),
        gpu.plan_normalize(x, x, epilogue, None),
        gpu.plan_grad_sums(x, x, epilogue),
        gpu.plan_grad_input(x, x, epilogue, x, None),
    ):
        outer, inner, columns, _ = plan.integers[:4]
        names = ("KIND", "ALIGN", "WIDE", "GROUP", "BLOCK_I")
        kind, align, wide, group, block_i = (plan.kernel.constants[name] for name in names)
        groups = -(-columns * (align if kind == "rows" else 1) // group)
        tiles_of_each = -(-inner * (align if kind == "planes" else 1) // block_i)
        tiles = torch.zeros(3 * groups, dtype=torch.int32)
        share_kernel[3 * groups,](tiles, outer, inner, columns, kind, align, wide, group, block_i)
        assert int(tiles.sum()) == groups * outer * tiles_of_each > 0


def check_negated() -> None:
    """Of x, residual and dy that are negated lazily, the negated values count."""
    from syncbn import backends

    def negated() -> Tensor:
        return torch.randn(2, 3, 4, 5, dtype=torch.complex64).conj().imag

    x, residual, dy = negated(), negated(), negated()
    results = []
    for plain in (False, True):
        given = [t.resolve_neg() if plain else t for t in (x, residual, dy)]
        assert plain or all(t.is_neg() for t in given)
        leaf, added = (t.detach().requires_grad_() for t in given[:2])
        with backends.force("gpu"):
            y = sync_batch_norm(leaf, None, None, training=True, residual=added, activation="silu")
            results.append([y, *torch.autograd.grad(y, (leaf, added), given[2])])
    for mine, right in zip(*results, strict=True):
        torch.testing.assert_close(mine, right, rtol=0, atol=0)


class Copies(TorchDispatchMode):
    """The shapes of activations that are copied meanwhile, not as bytes, which is how the interpreter copies."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default):
            self.shapes += [tuple(args[0].shape)] if args[0].ndim > 1 else []
        return func(*args, **(kwargs or {}))


def check_copies() -> None:
    """Of a crop a kernel gets a copy; its result is copied only if it is to have strides that no kernel writes."""
    from syncbn.backends import gpu

    def crop() -> Tensor:
        return torch.randn(2, 3, 4, 9)[..., :7]

    dense, turned = torch.randn(2, 3, 4, 7), torch.randn(2, 3, 7, 4).transpose(2, 3)
    for x, residual, copies in ((dense, crop(), 1), (crop(), dense, 1), (crop(), crop(), 2), (turned, dense, 2)):
        sums = gpu.batch_sums(x, None)
        epilogue = Epilogue(None, None, residual, None, "relu")
        with Copies() as copied:
            y, mean, invstd = gpu.normalize(x, sums, epilogue, 1e-5, None)
        assert copied.shapes == [(2, 3, 4, 7)] * copies
        with Copies() as copied:
            dx, dresidual = gpu.grad_input(
                dense, x, mean, invstd, epilogue, torch.zeros(8, dtype=torch.float64), sums[-3:-2], True
            )
        assert copied.shapes == [(2, 3, 4, 7)] * (copies + (x is turned))
        for result in (y, dx, dresidual):
            assert result is not None
            assert result.stride() == torch.empty_like(x).stride()


def _version(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@contextmanager
def device_of(sms: int, long_rows: bool = False) -> Iterator[None]:
    """Plans as for a device with that many SMs: few make a program's run of tiles long, many make it one tile.

    long_rows: rows of any size are cut as those of tens of megabytes are.
    """
    from syncbn.backends import gpu, gpu_efforts, gpu_launch
    from syncbn.backends.recent import Recent

    before = gpu_launch.SMS_WITHOUT_DEVICE, gpu._plans, gpu_efforts.LONG
    gpu_launch.SMS_WITHOUT_DEVICE, gpu._plans = sms, Recent(gpu_launch.MOST_PLANS)
    gpu_efforts.LONG = 0 if long_rows else gpu_efforts.LONG
    try:
        yield
    finally:
        gpu_launch.SMS_WITHOUT_DEVICE, gpu._plans, gpu_efforts.LONG = before


def check_ranks(case: Case, sms: int, steps: int = 1, long_rows: bool = False) -> None:
    """The exchange of all ranks in this process, held to the oracle."""
    with device_of(sms, long_rows):
        calls = make_calls(case)
        outcomes = exchange(case, calls, steps)
    compare(case, outcomes, steps)
    for call, outcome in zip(calls, outcomes, strict=True):
        for name in ("y", "dx"):
            assert outcome.strides[name] == torch.empty_like(call.x).stride(), name
        if case.track:
            assert torch.equal(outcome.running_mean, outcomes[0].running_mean), "running_mean differs between ranks"
            assert torch.equal(outcome.running_var, outcomes[0].running_var), "running_var differs between ranks"


def exchange(case: Case, calls: list[Call], steps: int) -> list[Outcome]:
    """What autograd.py and an all-reduce do on every rank."""
    runnings = [_running(case) for _ in calls]
    for _ in range(steps):
        outcomes = exchange_once(case, calls, runnings)
    return outcomes


def exchange_once(case: Case, calls: list[Call], runnings: list[Running | None]) -> list[Outcome]:
    from syncbn.backends import gpu

    epilogues = [Epilogue(c.weight, c.bias, c.residual, c.mask, case.activation) for c in calls]
    sums = _all_sum([gpu.batch_sums(c.x, c.mask) for c in calls])
    forward = [
        gpu.normalize(c.x, sums, epilogue, 1e-5, running)
        for c, epilogue, running in zip(calls, epilogues, runnings, strict=True)
    ]
    local = [
        gpu.grad_sums(c.dy, c.x, mean, invstd, epilogue)
        for c, epilogue, (_, mean, invstd) in zip(calls, epilogues, forward, strict=True)
    ]
    dsums = _all_sum([each[0] for each in local])
    outcomes = []
    for c, epilogue, (y, mean, invstd), (_, dweight, dbias), running in zip(
        calls, epilogues, forward, local, runnings, strict=True
    ):
        dx, dresidual = gpu.grad_input(c.dy, c.x, mean, invstd, epilogue, dsums, sums[-3:-2], case.residual)
        assert dx is not None, "dsums were given"
        buffers = running[:3] if running is not None else (None, None, None)
        strides = {"y": y.stride(), "dx": dx.stride()}
        outcomes.append(Outcome(y, dx, dweight, dbias, dresidual, *buffers, strides))
    return outcomes


def _all_sum(sums: list[Tensor]) -> Tensor:
    return torch.stack(sums).sum(0)


def _running(case: Case) -> Running | None:
    if not case.track:
        return None
    dtype = case.parameter_dtype or case.dtype
    mean, var = torch.zeros(case.channels, dtype=dtype), torch.ones(case.channels, dtype=dtype)
    return Running(mean, var, torch.tensor(0), case.momentum)
