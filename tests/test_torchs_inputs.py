"""The inputs on which torch tests its own batch norm: the function and the layers give what torch's give."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.functional import sync_batch_norm
from tests.support import torchs_inputs
from tests.support.oracle import UNIT, error

EXACT = UNIT[torch.float64]
FIRST = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, list[tuple[Any, ...]]]:
    """What torch.testing's databases hold of batch norms."""
    file = tmp_path_factory.mktemp("torchs") / "inputs.pt"
    command = [sys.executable, "-m", "tests.support.torchs_inputs", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode == torchs_inputs.MISSING:
        pytest.skip(f"torch.testing's databases cannot be imported: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return torch.load(file, weights_only=False)


def outcome(function: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor | None]:
    """y, the gradients of what requires one, and the running statistics afterwards."""
    x, *args = (t.detach().clone().requires_grad_(t.requires_grad) if isinstance(t, Tensor) else t for t in (x, *args))
    y = function(x, *args, **kwargs)
    leaves = [t for t in (x, *args) if isinstance(t, Tensor) and t.requires_grad]
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, dtype=y.dtype, generator=generator)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy, allow_unused=True), *args[:2]]


def same(ours: list[Tensor | None], right: list[Tensor | None]) -> None:
    """To EXACT of the largest value, or of 1: with two values a channel, dx is what terms of order 1 leave of 0."""
    for mine, theirs in zip(ours, right, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert mine.shape == theirs.shape
            limit = EXACT * max([1.0, *theirs.abs().flatten().tolist()])
            assert ((mine - theirs).abs() <= limit).all()


def test_what_torch_gives_its_function(inputs: dict[Any, list[tuple[Any, ...]]]) -> None:
    """Every sample of torch's database gives F.batch_norm's y, gradients and statistics; a 1-d input is refused."""
    given = inputs["function"]
    assert len(given) >= 10
    for x, args, kwargs in given:
        if x.ndim < 2:
            with pytest.raises(ValueError, match="at least 2 dimensions"):
                sync_batch_norm(x, *args, **kwargs)
            continue
        same(outcome(sync_batch_norm, x, args, kwargs), outcome(F.batch_norm, x, args, kwargs))


@pytest.mark.parametrize("positional", range(len(FIRST) + 1))
@pytest.mark.parametrize("training", [True, False])
def test_an_argument_is_one_by_place_or_by_name(positional: int, training: bool) -> None:
    """However many of F.batch_norm's arguments are given by their place, the others by their name, y is the same."""
    x, (mean, weight, bias) = torch.randn(4, 3, 5).double(), torch.randn(3, 3).double()
    given = dict(zip(FIRST, (mean, mean.exp(), weight, bias, training, 0.3, 1e-2), strict=True))
    args = tuple(given[name] for name in FIRST[:positional])
    kwargs = {name: given[name] for name in FIRST[positional:]}
    right = F.batch_norm(x, *(t.clone() if isinstance(t, Tensor) else t for t in given.values()))
    assert error(sync_batch_norm(x, *args, **kwargs), right) <= EXACT


def test_arguments_may_be_left_out() -> None:
    """F.batch_norm's defaults are ours: whatever is left out from the end or by name means the same."""
    x, mean = torch.randn(4, 3, 5).double(), torch.randn(3).double()
    given = dict(zip(FIRST, (mean, mean.exp(), mean + 1, mean - 1, True, 0.3, 1e-2), strict=True))
    left_out = [{name} for name in FIRST[2:]] + [set(FIRST[2 + k :]) for k in range(5)]
    for names in left_out:
        kwargs = {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items() if k not in names}
        assert error(sync_batch_norm(x, **kwargs), F.batch_norm(x, **copy.deepcopy(kwargs))) <= EXACT


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("training", [True, False])
def test_what_torch_gives_its_layers(inputs: dict[Any, list[tuple[Any, ...]]], rank: int, training: bool) -> None:
    """Every input of torch's database for BatchNorm1d, 2d and 3d gives theirs, from the layer of that rank and after
    conversion.
    """
    given = inputs[rank, training]
    assert len(given) >= 3
    for args, kwargs, (x, *rest), options in given:
        torch.manual_seed(3)
        right = getattr(nn, f"BatchNorm{rank}d")(*args, **kwargs).double().train(training)
        built = getattr(syncbn, f"SyncBatchNorm{rank}d")(*args, **kwargs).double()
        built.load_state_dict(right.state_dict())
        converted = syncbn.convert_sync_batchnorm(copy.deepcopy(right))
        expected = outcome(right, x, rest, options)
        for ours in (built.train(training), converted):
            same(outcome(ours, x, rest, options), expected)
            for mine, other in zip(ours.buffers(), right.buffers(), strict=True):
                assert error(mine, other.double()) <= EXACT
