"""Wrong arguments: which error, that nothing moved, that no collective was started."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

import syncbn
from tests.support.ranks import RankPool

X = (2, 3, 4, 4)
WRONG: dict[str, tuple[type[Exception], str, tuple[int, ...], torch.dtype, dict[str, Any]]] = {
    "channels": (ValueError, "num_features=4", (2, 4, 5), torch.float32, {}),
    "one dimension": (ValueError, "at least 2 dimensions", (3,), torch.float32, {}),
    "no channels": (ValueError, "at least one channel", (2, 0, 4), torch.float32, {}),
    "integers": (TypeError, "got torch.int64", X, torch.int64, {}),
    "complex": (TypeError, "real and imaginary", X, torch.complex64, {}),
    "residual shape": (
        ValueError,
        "residual must have the shape",
        X,
        torch.float32,
        {"residual": torch.ones(2, 3, 1, 1)},
    ),
    "residual dtype": (TypeError, "residual must be float16", X, torch.float32, {"residual": torch.ones(X).int()}),
    "residual type": (TypeError, "residual must be a Tensor", X, torch.float32, {"residual": 1.0}),
    "residual device": (
        ValueError,
        "residual must be on",
        X,
        torch.float32,
        {"residual": torch.ones(X, device="meta")},
    ),
    "mask shape": (
        ValueError,
        r"broadcast to (N, *S) = (2, 4, 4)",
        X,
        torch.float32,
        {"mask": torch.ones(2, 3, 4, 4).bool()},
    ),
    "mask with channels": (ValueError, "Drop the channel", X, torch.float32, {"mask": torch.ones(2, 1, 4, 4).bool()}),
    "mask dtype": (TypeError, "mask must be a bool", X, torch.float32, {"mask": torch.ones(2, 4, 4)}),
    "mask type": (TypeError, "mask must be a bool", X, torch.float32, {"mask": [True]}),
}
wrong = pytest.mark.parametrize(("kind", "text", "shape", "dtype", "arguments"), WRONG.values(), ids=WRONG)


def _refused(
    kind: type[Exception], text: str, shape: tuple[int, ...], dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    layer = syncbn.SyncBatchNorm(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    with pytest.raises(kind, match=re.escape(text)):
        layer(torch.ones(shape).to(dtype), **arguments)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    if dist.is_initialized():  # had any rank entered the layer's collective, this one would not add up
        assert float(syncbn.comm.all_sum(torch.ones(1), dist.group.WORLD)) == dist.get_world_size()


@wrong
def test_a_wrong_argument_is_an_error_that_moves_nothing(
    kind: type[Exception], text: str, shape: tuple[int, ...], dtype: torch.dtype, arguments: dict[str, Any]
) -> None:
    """In training, alone: the named error and untouched buffers."""
    _refused(kind, text, shape, dtype, arguments)


@wrong
def test_a_wrong_argument_is_an_error_on_every_rank(
    ranks: RankPool,
    kind: type[Exception],
    text: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    arguments: dict[str, Any],
) -> None:
    """On two ranks: the same error on both, before any collective."""
    ranks.run(2, _refused, kind, text, shape, dtype, arguments)


def test_unknown_activation_is_refused_when_the_layer_is_built() -> None:
    """The constructor and the function name the activations there are."""
    with pytest.raises(ValueError, match="'relu', 'leaky_relu', 'silu'; got 'gelu'"):
        syncbn.SyncBatchNorm(3, activation="gelu")
    with pytest.raises(ValueError, match="got 'gelu'"):
        syncbn.functional.sync_batch_norm(torch.ones(X), None, None, training=True, activation="gelu")
    with pytest.raises(ValueError, match="activation must be one of"):
        syncbn.functional.sync_batch_norm(torch.ones(X), None, None, training=True, activation=["relu"])


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1)])
@pytest.mark.parametrize("eval_without_buffers", [False, True])
def test_one_value_per_channel_alone_is_torchs_error(shape: tuple[int, ...], eval_without_buffers: bool) -> None:
    """A lone value has no variance; torch's text and type."""
    layer = syncbn.SyncBatchNorm(3, track_running_stats=not eval_without_buffers).train(not eval_without_buffers)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.ones(shape))
    if not eval_without_buffers:
        assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("missing", ["running_mean", "running_var"])
def test_running_statistics_come_in_pairs(missing: str) -> None:
    """One of the two buffers without the other is refused."""
    buffers = {"running_mean": torch.zeros(3), "running_var": torch.ones(3), missing: None}
    with pytest.raises(ValueError, match=f"got no {missing}"):
        syncbn.functional.sync_batch_norm(torch.ones(X), **buffers, training=True)


def test_cumulative_average_needs_a_counter() -> None:
    """momentum None without num_batches_tracked is refused."""
    with pytest.raises(ValueError, match="needs num_batches_tracked"):
        syncbn.functional.sync_batch_norm(torch.ones(X), torch.zeros(3), torch.ones(3), training=True, momentum=None)


COUNTERS: dict[str, tuple[type[Exception], str, torch.Tensor]] = {
    "device": (ValueError, "num_batches_tracked must be on the device of input, meta; got cpu", torch.tensor(0)),
    "dtype": (TypeError, "one integer in a Tensor; got shape () of torch.float32", torch.tensor(0.0, device="meta")),
    "size": (TypeError, "got shape (2,) of torch.int64", torch.zeros(2, dtype=torch.int64, device="meta")),
}


@pytest.mark.parametrize(("kind", "text", "counter"), COUNTERS.values(), ids=COUNTERS)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_that_no_kernel_can_count_is_refused(
    kind: type[Exception], text: str, counter: torch.Tensor, momentum: float | None
) -> None:
    """num_batches_tracked is one integer on the input's device, whatever that is."""
    x, mean, var = (torch.ones(size, device="meta") for size in (X, X[1:2], X[1:2]))
    with pytest.raises(kind, match=re.escape(text)):
        syncbn.functional.sync_batch_norm(x, mean, var, training=True, momentum=momentum, num_batches_tracked=counter)


STRANGERS = {
    "a group of others": (lambda: dist.new_group([0, 2]), "the newest group without this rank has ranks [0, 2]"),
    "a mesh of others": (lambda: DeviceMesh("cpu", [0, 2]), "outside of it: it has ranks [0, 2]"),
    "a row of a mesh": (
        lambda: DeviceMesh("cpu", [[0, 2]], mesh_dim_names=("a", "b"))["b"],
        "outside of it: it has ranks [0, 2]",
    ),
    "the second of two groups": (
        lambda: [dist.new_group([1]), dist.new_group([0, 2])][1],
        "the newest group without this rank has ranks [0, 2]",
    ),
}


def _stranger(name: str) -> None:
    make, text = STRANGERS[name]
    group = make()
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match=re.escape(f"got rank 1 {text}" if "outside" in text else text)) as raised:
            layer(torch.randn(X))
        assert "got rank 1 outside of it" in str(raised.value)
        with pytest.raises(ValueError, match="got rank 1 outside of it"):
            syncbn.functional.sync_batch_norm(torch.randn(X), None, None, training=True, process_group=group)
        assert layer.num_batches_tracked == 0
        layer.eval()(torch.randn(X))
    else:
        assert layer(torch.randn(X)).isfinite().all()


@pytest.mark.parametrize("name", STRANGERS)
def test_a_group_this_rank_is_not_in_is_refused(ranks: RankPool, name: str) -> None:
    """A rank outside the group gets an error with its rank and the group's, the ranks inside their result.

    Where torch says no more to a rank than that it is outside, the ranks are those of the newest such group.
    """
    ranks.run(3, _stranger, name)


def _one_rank_is_wrong() -> torch.Tensor:
    layer = syncbn.SyncBatchNorm(3)
    if dist.get_rank() == 1:
        with pytest.raises(ValueError, match="num_features=4"):
            layer(torch.randn(2, 4, 4))
    layer(torch.randn(X))
    return layer.running_mean


def test_a_rank_that_was_wrong_can_go_on(ranks: RankPool) -> None:
    """A rank whose call was refused has left the others nothing half-done: its next call meets theirs."""
    first, second = ranks.run(2, _one_rank_is_wrong)
    assert torch.equal(first, second)
