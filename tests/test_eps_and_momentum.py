"""eps, momentum and num_features: which numbers they may be, in training and in eval, in the layer and the function."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import syncbn
from syncbn.functional import sync_batch_norm
from tests.support.layer_runs import compiled
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool

X = (4, 3, 5)
BOTH, TRAINING = (True, False), (True,)
WRONG: dict[str, tuple[type[Exception], str, dict[str, Any], tuple[bool, ...]]] = {
    "eps 0": (ValueError, "eps must be positive in training", {"eps": 0.0}, TRAINING),
    "eps an integer 0": (ValueError, "eps must be positive in training", {"eps": 0}, TRAINING),
    "eps -0": (ValueError, "eps must be positive in training", {"eps": -0.0}, TRAINING),
    "eps below 0": (ValueError, "eps cannot be negative; got -1e-05", {"eps": -1e-5}, BOTH),
    "eps infinite": (ValueError, "eps must be finite; got inf", {"eps": math.inf}, BOTH),
    "eps minus infinite": (ValueError, "eps must be finite; got -inf", {"eps": -math.inf}, BOTH),
    "eps nan": (ValueError, "eps must be finite; got nan", {"eps": math.nan}, BOTH),
    "eps None": (TypeError, "eps must be a number; got None", {"eps": None}, BOTH),
    "eps text": (TypeError, "eps must be a number; got '1e-5'", {"eps": "1e-5"}, BOTH),
    "eps complex": (TypeError, "eps must be a number; got 1j", {"eps": 1j}, BOTH),
    "eps a vector": (TypeError, "eps must be a number", {"eps": torch.ones(3)}, BOTH),
    "momentum nan": (ValueError, "momentum must be finite; got nan", {"momentum": math.nan}, BOTH),
    "momentum infinite": (ValueError, "momentum must be finite; got inf", {"momentum": math.inf}, BOTH),
    "momentum a numpy nan": (ValueError, "momentum must be finite", {"momentum": np.float32("nan")}, BOTH),
    "momentum text": (TypeError, "momentum must be a number or None; got '0.1'", {"momentum": "0.1"}, BOTH),
    "momentum a list": (TypeError, "momentum must be a number or None; got [0.1]", {"momentum": [0.1]}, BOTH),
    "momentum a vector": (TypeError, "momentum must be a number or None", {"momentum": torch.ones(1)}, BOTH),
}
CASES = {
    f"{name} in {'training' if training else 'eval'}": (*row, training)
    for name, (*row, modes) in WRONG.items()
    for training in modes
}
wrong = pytest.mark.parametrize(("kind", "text", "given", "training"), CASES.values(), ids=CASES)


def call_layer(x: Tensor, buffers: list[Tensor], training: bool, given: dict[str, Any]) -> Tensor:
    layer = syncbn.SyncBatchNorm(3)
    layer.running_mean, layer.running_var, layer.num_batches_tracked = buffers
    for name, value in given.items():
        setattr(layer, name, value)
    return layer.train(training)(x)


def call_function(x: Tensor, buffers: list[Tensor], training: bool, given: dict[str, Any]) -> Tensor:
    mean, var, tracked = buffers
    return sync_batch_norm(x, mean, var, training=training, num_batches_tracked=tracked, **given)


def _refused(call: Callable[..., Tensor], kind: type[Exception], text: str, given: dict[str, Any], train: bool) -> None:
    buffers = [torch.full((3,), 2.0), torch.full((3,), 3.0), torch.tensor(4)]
    with Collectives() as collectives, pytest.raises(kind) as raised:
        call(torch.randn(X), buffers, train, given)
    assert text in str(raised.value)
    assert collectives.count == 0
    assert [float(b.sum()) for b in buffers] == [6.0, 9.0, 4.0]
    if dist.is_initialized():
        call(torch.randn(X), buffers, True, {})  # every rank is still in step


@wrong
@pytest.mark.parametrize("call", [call_layer, call_function])
def test_a_wrong_number_is_refused_before_anything_moves(
    call: Callable[..., Tensor], kind: type[Exception], text: str, given: dict[str, Any], training: bool
) -> None:
    """In the layer, as an attribute that was set later, and in the function: the named error, nothing moved."""
    _refused(call, kind, text, given, training)


@wrong
def test_a_wrong_number_is_refused_on_every_rank(
    ranks: RankPool, kind: type[Exception], text: str, given: dict[str, Any], training: bool
) -> None:
    """On two ranks: the same error, before any collective."""
    ranks.run(2, _refused, call_layer, kind, text, given, training)


@pytest.mark.parametrize(("kind", "text", "given"), [row[:3] for row in WRONG.values()], ids=WRONG)
def test_a_layer_is_not_built_with_a_number_that_is_always_wrong(
    kind: type[Exception], text: str, given: dict[str, Any]
) -> None:
    """The constructor refuses what no call would take; an eps of 0 is fine in eval, and is built."""
    for cls in (syncbn.SyncBatchNorm, syncbn.SyncBatchNorm2d):
        if "must be positive" in text:
            assert cls(3, **given).eval()(torch.randn(2, 3, 4, 4)).isfinite().all()
        else:
            with pytest.raises(kind) as raised:
                cls(3, **given)
            assert text in str(raised.value)


def test_without_running_statistics_eval_needs_an_eps_too() -> None:
    """Where eval uses the statistics of its batch, an eps of 0 is refused, as by torch; with running ones it is not."""
    layer = syncbn.SyncBatchNorm(3, eps=0.0, track_running_stats=False).eval()
    with pytest.raises(ValueError, match="eps must be positive"):
        layer(torch.randn(X))
    with pytest.raises(ValueError, match="eps"):
        nn.BatchNorm1d(3, eps=0.0, track_running_stats=False).eval()(torch.randn(X))
    x, var = torch.randn(X), torch.tensor([1.0, 2.0, 0.5])
    right = x.double() / var.double().sqrt().view(1, 3, 1)
    assert error(sync_batch_norm(x, torch.zeros(3), var, eps=0.0), right) <= UNIT[torch.float32]


NUMBERS = [0, 1, 2.5, -1, -0.3, True, np.float32(0.25), np.float64(0.25), np.int64(1), Fraction(1, 4)]


@pytest.mark.parametrize("number", [*NUMBERS, torch.tensor(0.25)], ids=repr)
@pytest.mark.parametrize("training", [True, False])
def test_whatever_is_a_number_is_one(number: Any, training: bool) -> None:
    """A momentum of any size and type, and an eps of any type, mean what their values mean, as in torch."""
    x = torch.randn(X).double()
    buffers = [torch.zeros(3).double(), torch.ones(3).double()]
    right_buffers = [b.clone() for b in buffers]
    y = sync_batch_norm(x, *buffers, training=training, momentum=number)
    right = F.batch_norm(x, *right_buffers, training=training, momentum=float(number))
    assert error(y, right) <= UNIT[torch.float64]
    assert all(error(a, b) <= UNIT[torch.float64] for a, b in zip(buffers, right_buffers, strict=True))
    if float(number) > 0:
        y = sync_batch_norm(x, *buffers, training=training, eps=number)
        right = F.batch_norm(x, *right_buffers, training=training, eps=float(number))
        assert error(y, right) <= UNIT[torch.float64]


FEATURES: dict[str, tuple[type[Exception], Any]] = {
    "zero": (ValueError, 0),
    "negative": (ValueError, -3),
    "a fraction": (TypeError, 2.5),
    "a float": (TypeError, 3.0),
    "text": (TypeError, "3"),
    "nothing": (TypeError, None),
    "a truth value": (TypeError, True),
    "a shape": (TypeError, (3,)),
}


@pytest.mark.parametrize(("kind", "channels"), FEATURES.values(), ids=FEATURES)
@pytest.mark.parametrize("cls", [syncbn.SyncBatchNorm, syncbn.SyncBatchNorm1d, syncbn.SyncBatchNorm3d])
def test_features_are_a_positive_integer(kind: type[Exception], channels: Any, cls: type) -> None:
    """Anything else is an error of the constructor that says so."""
    with pytest.raises(kind, match="num_features must be a positive integer; got"):
        cls(channels)


@pytest.mark.parametrize("channels", [3, np.int64(3), torch.Size([3])[0]])
def test_any_integer_counts_features(channels: Any) -> None:
    """NumPy's integers are some."""
    assert syncbn.SyncBatchNorm(channels)(torch.randn(X)).shape == X


def test_a_cumulative_average_needs_no_counter_in_eval() -> None:
    """momentum=None without a counter is fine in eval, in the layer and the function, and refused in training."""
    layer, torchs = syncbn.SyncBatchNorm(3, momentum=None), nn.BatchNorm1d(3, momentum=None)
    x = torch.randn(X)
    for each in (layer, torchs):
        each.num_batches_tracked = None
        each.running_mean += 1
    right = torchs.eval()(x)
    assert torch.equal(layer.eval()(x), right)
    assert torch.equal(sync_batch_norm(x, layer.running_mean, layer.running_var, momentum=None), right)
    with pytest.raises(ValueError, match="needs num_batches_tracked"):
        layer.train()(x)


def test_numbers_may_change_between_compiled_calls() -> None:
    """A compiled layer follows an eps and a momentum that change, whole numbers too, without a graph break."""
    layer, eager = syncbn.SyncBatchNorm(3), nn.BatchNorm1d(3)
    step = compiled(layer, "aot_eager")
    for eps, momentum in [(1e-5, 0.1), (1e-5, 0.3), (1e-5, 1), (0.5, 0), (1, np.float64(0.7)), (1e-3, 0.25)]:
        for each in (layer, eager):
            each.eps, each.momentum = eps, momentum
        x = torch.randn(X)
        assert error(step(x), eager(x).detach().double()) <= 2 * UNIT[torch.float32]
        assert error(layer.running_var, eager.running_var.double()) <= 2 * UNIT[torch.float32]
