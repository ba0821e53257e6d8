"""The inputs on which torch tests its own batch norm: the function and the layers give what torch's give."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.functional import sync_batch_norm
from tests.oracle import UNIT, error

EXACT = UNIT[torch.float64]
FIRST = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")


def database(module: str) -> Any:
    """One of torch.testing's, whose import needs expecttest, an extra of the tests."""
    return pytest.importorskip(f"torch.testing._internal.{module}", reason="torch.testing has no databases here")


def samples() -> Iterator[tuple[Tensor, tuple[Any, ...], dict[str, Any]]]:
    """The inputs and arguments with which torch tests F.batch_norm."""
    for info in database("common_methods_invocations").op_db:
        if info.name == "nn.functional.batch_norm" and torch.float64 in info.dtypes:
            for sample in info.sample_inputs("cpu", torch.float64, requires_grad=True):
                yield sample.input, sample.args, sample.kwargs


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


def test_what_torch_gives_its_function() -> None:
    """Every sample of torch's database gives F.batch_norm's y, gradients and statistics; a 1-d input is refused."""
    given = list(samples())
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
def test_what_torch_gives_its_layers(rank: int, training: bool) -> None:
    """Every input of torch's database for BatchNorm1d, 2d and 3d gives theirs, from the layer of that rank and after
    conversion; an unbatched input is the error that it is there.
    """
    theirs = getattr(nn, f"BatchNorm{rank}d")
    infos = [info for info in database("common_modules").module_db if info.module_cls is theirs]
    inputs = [
        given
        for info in infos
        for given in info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
    ]
    assert len(inputs) >= 3
    for given in inputs:
        torch.manual_seed(3)
        right = theirs(*given.constructor_input.args, **given.constructor_input.kwargs).double().train(training)
        built = getattr(syncbn, f"SyncBatchNorm{rank}d")(
            *given.constructor_input.args, **given.constructor_input.kwargs
        ).double()
        built.load_state_dict(right.state_dict())
        converted = syncbn.convert_sync_batchnorm(copy.deepcopy(right))
        x, args, kwargs = given.forward_input.args[0], given.forward_input.args[1:], given.forward_input.kwargs
        expected = outcome(right, x, args, kwargs)
        for ours in (built.train(training), converted):
            same(outcome(ours, x, args, kwargs), expected)
            for mine, other in zip(ours.buffers(), right.buffers(), strict=True):
                assert error(mine, other.double()) <= EXACT
