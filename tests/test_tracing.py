"""Whoever traces a training step without running it: export, AOTAutograd, fake tensors, meta tensors."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch._functorch.aot_autograd import aot_module, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

import syncbn
from tests.support.layer_runs import let_torch_warn_of_itself
from tests.support.nets import Net, assert_same_state, assert_step, batch
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool


def reductions(graph: fx.Graph) -> list[tuple[torch.dtype, int]]:
    """dtype and length of what each node of a graph reduces over the ranks."""
    names = ("syncbn.all_sum.default", "_c10d_functional.all_reduce.default")
    nodes = [node.args[0].meta["val"] for node in graph.nodes if str(node.target) in names]
    return [(val.dtype, val.numel()) for val in nodes]


SUMS = [(torch.float64, 2 * 8 + 1)] * Net.LAYERS
"""As an exported call; taken apart, two more numbers go over the wire, the fingerprint's."""
WIRE = [(torch.float64, 2 * 8 + 3)] * Net.LAYERS


def _export(strict: bool, last: bool) -> None:
    let_torch_warn_of_itself()
    net = Net()
    right = copy.deepcopy(net)
    layout = torch.channels_last if last else torch.contiguous_format
    x = batch(4)[0].detach().contiguous(memory_format=layout)
    shapes = ({0: torch.export.Dim("samples", min=2)},)
    program = torch.export.export(net, (x,), dynamic_shapes=shapes, strict=strict)
    assert reductions(program.graph) == SUMS
    decomposed = program.run_decompositions()
    assert reductions(decomposed.graph) == WIRE
    moved = set(decomposed.graph_signature.buffers_to_mutate.values())
    assert moved == {name for name, _ in net.named_buffers()}
    module = program.module()
    x = batch(3 + dist.get_rank())[0].detach().contiguous(memory_format=layout)
    y, y_right = module(x), right(x)
    assert y.stride() == y_right.stride()
    assert error(y, y_right.double()) <= 4 * UNIT[torch.float32]
    moved_to = dict(module.named_buffers())
    for name, buffer in right.named_buffers():
        assert error(moved_to[name], buffer.double()) <= 2 * UNIT[torch.float32]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_training_step(ranks: RankPool, strict: bool, last: bool) -> None:
    """An exported training forward runs for any batch size on the ranks, moves its buffers, and keeps the layout."""
    ranks.run(2, _export, strict, last)


def _aot() -> None:
    net = Net()
    right = copy.deepcopy(net)
    graphs: list[fx.Graph] = []

    def noted(module: fx.GraphModule, _: list[Tensor]) -> Callable[[list[Tensor]], Any]:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    traced = aot_module(net, fw_compiler=noted, bw_compiler=noted)
    x, dy = batch(3)
    assert_step(traced, x, dy, right)
    assert_same_state(net, right)
    forward, backward = graphs
    assert reductions(forward) == WIRE
    assert reductions(backward) == [(torch.float64, 2 * 8 + 2)] * Net.LAYERS


def test_aot_autograd(ranks: RankPool) -> None:
    """The joint graph has eager's collectives, 2C + 3 float64 numbers forward and 2C + 2 backward, and its numbers."""
    ranks.run(2, _aot)


def _fake(last: bool) -> None:
    for mode in (FakeTensorMode(), torch.device("meta")):
        with mode:
            layer = syncbn.SyncBatchNorm(4, activation="relu", dtype=torch.bfloat16)
            x = torch.randn(2, 4, 6, 5, dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_()
            with Collectives() as collectives:
                y = layer(x, torch.randn(2, 4, 6, 5), torch.ones(2, 6, 5, dtype=torch.bool))
                y.backward(torch.ones_like(y))
        assert collectives.count == 0
        assert (y.shape, y.dtype, y.stride()) == (x.shape, x.dtype, x.stride())
        assert x.grad.stride() == x.stride()
        assert (layer.weight.grad.shape, layer.weight.grad.dtype) == ((4,), torch.bfloat16)


@pytest.mark.parametrize("last", [False, True])
def test_tensors_without_values(ranks: RankPool, last: bool) -> None:
    """Fake and meta tensors pass forward and backward with the right shapes, dtypes and strides, and no collective."""
    ranks.run(2, _fake, last)


def test_sequential_models_on_meta() -> None:
    """A converted model can be built and run on meta, and then made real."""
    with torch.device("meta"):
        model = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
        assert model(torch.randn(2, 3, 5, 5)).shape == (2, 4, 3, 3)
    model.to_empty(device="cpu")
    for layer in model:
        layer.reset_parameters()
    right = syncbn.SyncBatchNorm(4)
    for name, value in right.state_dict().items():
        assert torch.equal(model[1].state_dict()[name], value)
    assert model(torch.randn(2, 3, 5, 5)).isfinite().all()
