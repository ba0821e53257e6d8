"""Running a `Case` through the real layer; the rank side of the oracle."""

import shutil
import sysconfig
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn import backends
from tests.support.oracle import Call, Case, Outcome, compare, make_calls
from tests.support.ranks import Collectives, RankPool


def layer_for(case: Case, call: Call) -> syncbn.SyncBatchNorm:
    """A layer with the case's settings and the call's parameter values."""
    layer = syncbn.SyncBatchNorm(
        case.channels,
        momentum=case.momentum,
        affine=case.affine,
        track_running_stats=case.track,
        dtype=case.parameter_dtype or case.dtype,
        bias=case.bias,
        activation=case.activation,
    )
    with torch.no_grad():
        for parameter, value in ((layer.weight, call.weight), (layer.bias, call.bias)):
            if parameter is not None and value is not None:
                parameter.copy_(value)
    return layer


CAN_GENERATE = any(map(shutil.which, ("g++", "clang++"))) and Path(sysconfig.get_path("include"), "Python.h").exists()
generates = pytest.mark.skipif(not CAN_GENERATE, reason="Inductor needs a C++ compiler and Python's headers")
TORCH_OF_ITSELF = (
    "No CUDA runtime is found",
    "`torch.jit.script",
    "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)
"""Beginnings of the warnings by which torch's compilers and exporters complain of torch."""


def compiled(module: nn.Module | Callable, compiler: str | Callable) -> Any:
    """torch.compile of the whole module, none of it left to Python; afresh, as in a process of its own."""
    torch.compiler.reset()
    let_torch_warn_of_itself()
    return torch.compile(module, fullgraph=True, backend=compiler)


def let_torch_warn_of_itself() -> None:
    """Where warnings are errors, but for these."""
    for text in TORCH_OF_ITSELF:
        warnings.filterwarnings("ignore", text)


def run_case(case: Case, steps: int = 1) -> Outcome:
    """This rank's part, forward and backward; the gradients are those of the last step."""
    call = make_calls(case)[dist.get_rank() if dist.is_initialized() else 0]
    with backends.force(case.backend):
        layer = layer_for(case, call)
        called = layer if case.compiler is None else compiled(layer, case.compiler)
        for _ in range(steps):
            layer.zero_grad()
            x = call.x.detach().requires_grad_()
            residual = None if call.residual is None else call.residual.detach().requires_grad_()
            with Collectives() as forward:
                y = called(x, residual, call.mask)
            with Collectives() as backward:
                y.backward(call.dy)
    return Outcome(
        y.detach(),
        x.grad,
        None if layer.weight is None else layer.weight.grad,
        None if layer.bias is None else layer.bias.grad,
        None if residual is None else residual.grad,
        layer.running_mean,
        layer.running_var,
        layer.num_batches_tracked,
        {"x": x.stride(), "y": y.stride(), "dx": x.grad.stride()},
        (forward.count, backward.count),
    )


def check(pool: RankPool, case: Case, steps: int = 1) -> list[Outcome]:
    """Run the case on as many ranks as it has shapes; hold every rank to the oracle and to one collective each way."""
    outcomes = pool.run(len(case.shapes), run_case, case, steps)
    hold(case, outcomes, steps)
    return outcomes


def hold(case: Case, outcomes: list[Outcome], steps: int = 1) -> None:
    """Raise unless the ranks' outcomes are right, alike where they should be, and talked as little as they may."""
    compare(case, outcomes, steps)
    first, once = outcomes[0], int(len(outcomes) > 1)
    assert all(outcome.collectives == (once, once) for outcome in outcomes), [o.collectives for o in outcomes]
    for other in outcomes[1:]:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            a, b = getattr(first, name), getattr(other, name)
            assert a is None or torch.equal(a, b), f"{name} differs between ranks"
