"""Tensors that no layer can take: every argument, every kind, in words, and nothing sent or moved."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

import syncbn
from tests.support.ranks import Collectives, RankPool

SHAPE = (2, 3, 4, 4)
ACTIVATIONS, VECTORS, RUNNING = ("input", "residual"), ("weight", "bias"), ("running_mean", "running_var")


def right() -> dict[str, Any]:
    return {
        "input": torch.randn(SHAPE),
        "residual": torch.randn(SHAPE),
        "mask": torch.ones(2, 4, 4, dtype=torch.bool),
        "weight": torch.ones(3),
        "bias": torch.zeros(3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(0),
    }


def _nested(t: Tensor, layout: torch.layout) -> Tensor:
    return torch.nested.nested_tensor([t.flatten(), t.flatten()[:1]], layout=layout)


def _with_gradient(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


TENSORS = (*ACTIVATIONS, *VECTORS, *RUNNING)
ALL = (*TENSORS, "mask", "num_batches_tracked")
WRONG: dict[str, tuple[tuple[str, ...], Callable[[Tensor], Any], type[Exception], str]] = {
    "sparse": (
        ALL,
        lambda t: t.to_sparse(),
        TypeError,
        "{0} must be a dense tensor; got layout torch.sparse_coo. Pass {0}.to_dense().",
    ),
    "sparse rows": (
        ("input", "residual", "mask"),
        lambda t: t.flatten(1).to_sparse_csr(),
        TypeError,
        "{0} must be a dense tensor; got layout torch.sparse_csr. Pass {0}.to_dense().",
    ),
    "of oneDNN": (
        TENSORS,
        lambda t: t.to_mkldnn(),
        TypeError,
        "{0} must be a dense tensor; got layout torch._mkldnn. Pass {0}.to_dense().",
    ),
    "quantized": (
        TENSORS,
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
        TypeError,
        "{0} must be float16, bfloat16, float32 or float64; got torch.quint8. Convert it, e.g. {0}.dequantize().",
    ),
    "nested": (
        (*TENSORS, "mask"),
        lambda t: _nested(t, torch.strided),
        TypeError,
        "{0} must be a dense tensor; got a nested one. Pad it, torch.nested.to_padded_tensor({0}, 0.0), and pass",
    ),
    "jagged": (
        TENSORS,
        lambda t: _nested(t, torch.jagged),
        TypeError,
        "{0} must be a dense tensor; got a nested one. Pad it, torch.nested.to_padded_tensor({0}, 0.0), and pass",
    ),
    "without a shape yet": (
        TENSORS,
        lambda t: nn.UninitializedParameter(),
        ValueError,
        "{0} must have a shape; got an UninitializedParameter, which has none. Call the lazy layer it belongs to.",
    ),
    "a list": ((*VECTORS, *RUNNING), lambda t: t.tolist(), TypeError, "{0} must be a Tensor or None; got list. Pass"),
    "an array": (("input",), lambda t: t.numpy(), TypeError, "input must be a Tensor; got ndarray. Pass a tensor"),
    "a number": (
        ("num_batches_tracked",),
        lambda t: 3,
        TypeError,
        "num_batches_tracked must be one integer in a Tensor; got int. Use torch.tensor(0).",
    ),
    "with a gradient": (
        RUNNING,
        _with_gradient,
        ValueError,
        "{0} must be a buffer, in which nothing is differentiated; got one that requires a gradient. "
        "Pass {0}.detach(), or give a module its buffers by register_buffer.",
    ),
    "a result": (
        RUNNING,
        lambda t: _with_gradient(t) * 1,
        ValueError,
        "{0} must be a buffer, in which nothing is differentiated; got one that requires a gradient.",
    ),
}
CASES = [(name, argument) for name, (arguments, *_) in WRONG.items() for argument in arguments]


def _refused(name: str, argument: str, training: bool) -> None:
    _, make, kind, text = WRONG[name]
    given = right()
    given[argument] = make(given[argument])
    kept = {key: t.clone() for key, t in given.items() if key != argument and key in (*RUNNING, "num_batches_tracked")}
    with pytest.raises(kind, match=re.escape(text.format(argument))):
        syncbn.functional.sync_batch_norm(**given, training=training)
    assert all(torch.equal(given[key], t) for key, t in kept.items())


@pytest.mark.filterwarnings(
    "ignore:Sparse CSR tensor support", "ignore:The PyTorch API of nested tensors", "ignore:torch.quantize"
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "argument"), CASES)
def test_a_tensor_that_is_none(name: str, argument: str, training: bool) -> None:
    """The argument, the rule, what was given and what to pass, in training and eval; the buffers stay as they were."""
    _refused(name, argument, training)


@pytest.mark.parametrize("argument", RUNNING)
def test_memory_that_channels_share(argument: str) -> None:
    """A running statistic that is one number, expanded, cannot be moved; it can be read."""
    given = right() | {argument: torch.ones(1).expand(3)}
    with pytest.raises(ValueError, match=rf"{argument} must have memory for each channel.* Pass {argument}.clone\(\)"):
        syncbn.functional.sync_batch_norm(**given, training=True)
    assert given["num_batches_tracked"] == 0
    syncbn.functional.sync_batch_norm(**given, training=False)
    one = {key: t[..., :1] if key in (*VECTORS, *RUNNING) else t for key, t in right().items()}
    one |= {"input": torch.randn(2, 1, 4, 4), "residual": None, argument: torch.ones(1).expand(1)}
    syncbn.functional.sync_batch_norm(**one, training=True)


def _distributed() -> None:
    mesh = init_device_mesh("cpu", (2,))
    whole = torch.arange(48.0).view(4, 3, 2, 2)
    x, layer = distribute_tensor(whole, mesh, [Shard(0)]), syncbn.SyncBatchNorm2d(3)
    layers = {"input": layer, "weight": distribute_module(syncbn.SyncBatchNorm(3), mesh)}
    syncbn.SyncBatchNorm(3)(x.to_local())  # from here on, calls like it are known
    with Collectives() as collectives:
        for name, wrong in layers.items():
            with pytest.raises(
                TypeError, match=rf"{name} must be a local tensor .* got a DTensor\. Pass {name}\.to_lo"
            ):
                wrong(x if name == "input" else x.to_local())
    assert collectives.count == 0
    layer.process_group = mesh
    right = nn.BatchNorm2d(3)(whole)[2 * dist.get_rank() :][:2]
    torch.testing.assert_close(layer(x.to_local()), right)


def test_a_distributed_tensor(ranks: RankPool) -> None:
    """A DTensor, as input or parameter, is refused in training; its local part and its mesh give the right numbers."""
    ranks.run(2, _distributed)


@pytest.mark.parametrize(
    "given", [(torch.ones(SHAPE),), [1.0], torch.ones(SHAPE).numpy(), None], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("convert", [True, False])
def test_a_layer_is_given_no_tensor(given: Any, convert: bool) -> None:
    """A tuple of outputs, a list, an array, nothing: an error in words of a converted layer, too, in either mode."""
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)) if convert else syncbn.SyncBatchNorm(3)
    for training in (True, False):
        with pytest.raises(TypeError, match=f"input must be a Tensor; got {type(given).__name__}. Pass a tensor of"):
            layer.train(training)(given)


def _on_every_rank() -> None:
    layer = syncbn.SyncBatchNorm2d(3)
    layer(torch.randn(SHAPE))  # from here on, calls like it are known
    with Collectives() as collectives:
        for name, argument in CASES:
            if name in ("sparse", "with a gradient", "without a shape yet"):
                _refused(name, argument, True)
        layer.running_mean.requires_grad_()
        before = layer.running_var.clone()
        with pytest.raises(ValueError, match="running_mean must be a buffer"):
            layer(torch.randn(SHAPE))
        assert torch.equal(layer.running_var, before)
    assert collectives.count == 0
    assert dist.get_world_size() == 2


def test_no_rank_sends_anything(ranks: RankPool) -> None:
    """On two ranks nothing is sent by then, not even by a layer whose calls were checked before."""
    ranks.run(2, _on_every_rank)


@pytest.mark.parametrize("training", [True, False])
def test_without_autograd_a_statistic_may_be_a_parameter(training: bool) -> None:
    """Under no_grad it is moved and read, as torch's are; a Parameter that requires no gradient always is."""
    ours, torchs = syncbn.SyncBatchNorm2d(3), nn.BatchNorm2d(3)
    x = torch.randn(SHAPE)
    for layer in (ours, torchs):
        layer.train(training).running_mean = nn.Parameter(torch.full((3,), 0.5))
    with torch.no_grad():
        torch.testing.assert_close(ours(x), torchs(x))
        torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.running_mean, torchs.running_mean)
    ours.running_mean.requires_grad_(False)
    ours(x.requires_grad_()).sum().backward()


WRONG_GROUPS = {"a name": "node", "ranks": [0, 1], "a size": 2, "a class": dist.ProcessGroup}


@pytest.mark.parametrize("group", WRONG_GROUPS.values(), ids=WRONG_GROUPS)
def test_what_is_no_group(group: Any) -> None:
    """It is refused where it is given, to a layer, a converter, a function or a loader, with or without ranks."""
    text = (
        rf"process_group must be a ProcessGroup, .* got {type(group).__name__}\. Pass the group that syncbn.new_group"
    )
    layer, net = syncbn.SyncBatchNorm(3), nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(4, 3)
    with pytest.raises(TypeError, match=text):
        syncbn.SyncBatchNorm(3, process_group=group)
    with pytest.raises(TypeError, match=text):
        layer.process_group = group
    with pytest.raises(TypeError, match=text):
        syncbn.convert_sync_batchnorm(net, group)
    with pytest.raises(TypeError, match=text):
        syncbn.functional.sync_batch_norm(x, None, None, training=True, process_group=group)
    with pytest.raises(TypeError, match=text):
        syncbn.EvenLoader([x], group)
    with pytest.raises(TypeError, match=text):
        syncbn.synchronize_statistics(net, process_group=group)
    syncbn.functional.sync_batch_norm(x, None, None, training=True)  # from here on, calls like it are known
    with pytest.raises(TypeError, match=text):
        syncbn.functional.sync_batch_norm(x, None, None, training=True, process_group=group)
    assert layer.process_group is None
    assert type(net[0]) is nn.BatchNorm1d
