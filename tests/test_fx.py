"""torch.fx: a layer is one node of a symbolic trace, as torch's own layers are."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import syncbn
from tests.support.fake_torchvision import timm
from tests.support.layers import Tagged
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool

EXACT = UNIT[torch.float64]


class Doubling(syncbn.SyncBatchNorm):
    """A user's subclass with a forward of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def hooked() -> nn.Module:
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3))
    layer.register_forward_pre_hook(lambda m, args: (args[0] * 2,))
    layer.register_forward_hook(lambda m, args, y: y + 1)
    return layer


def wrapped() -> nn.Module:
    layer = syncbn.SyncBatchNorm2d(3)
    forward = layer.forward
    layer.forward = lambda x: 3 * forward(x)
    return layer


def timm_act() -> nn.Module:
    return syncbn.convert_sync_batchnorm(timm("timm.layers").BatchNormAct2d(3))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)),
    "converted subclass": lambda: syncbn.convert_sync_batchnorm(Tagged(3)),
    "built": lambda: syncbn.SyncBatchNorm(3, activation="silu"),
    "built for 2d": lambda: syncbn.SyncBatchNorm2d(3),
    "taken over": lambda: syncbn.convert_sync_batchnorm(nn.SyncBatchNorm(3)),
    "frozen": lambda: syncbn.freeze(nn.BatchNorm2d(3), train_affine=True),
    "frozen and converted": lambda: syncbn.freeze(syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)), train_affine=True),
    "reverted": lambda: syncbn.revert_sync_batchnorm(syncbn.SyncBatchNorm(3, activation="relu")),
    "reverted for 2d": lambda: syncbn.revert_sync_batchnorm(syncbn.SyncBatchNorm2d(3, activation="relu")),
    "with hooks": hooked,
    "with a forward of its own": wrapped,
    "of a user's class": lambda: Doubling(3),
    "timm's with its activation": timm_act,
}


class Net(nn.Module):
    """A layer between convolutions, called twice."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
        self.head = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x) + self.body(2 * x))


def net(name: str) -> Net:
    return Net(LAYERS[name]()).double()


def batch(seed: int = 0) -> Tensor:
    return torch.randn(4, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def nodes(graph: fx.GraphModule) -> list[str]:
    """The nodes of modules, and all others that no other net would have."""
    ours = [n for n in graph.graph.nodes if n.op in ("call_module", "get_attr") or n.op == "call_method"]
    return [str(n.target) for n in ours]


def assert_same_step(graph: nn.Module, right: nn.Module) -> None:
    """y, parameter gradients and buffers after a step in training, then y in eval."""
    x, dy = batch(), torch.randn(4, 2, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for module in (graph, right):
        module.train().zero_grad()
    y, y_right = graph(x), right(x)
    y.backward(dy)
    y_right.backward(dy)
    assert error(y, y_right.detach()) <= EXACT
    gradients = {name: p.grad for name, p in right.named_parameters()}
    assert all(error(p.grad, gradients[name]) <= EXACT for name, p in graph.named_parameters())
    assert graph.state_dict().keys() == right.state_dict().keys()
    assert all(error(a, b.double()) <= EXACT for a, b in zip(graph.buffers(), right.buffers(), strict=True))
    assert error(graph.eval()(x), right.eval()(x).detach()) <= EXACT


COPIES: dict[str, Callable[[fx.GraphModule], nn.Module]] = {
    "itself": lambda graph: graph,
    "traced again": fx.symbolic_trace,
    "deepcopied": copy.deepcopy,
    "pickled": lambda graph: pickle.loads(pickle.dumps(graph)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("how", COPIES)
def test_a_layer_is_one_node(name: str, how: str) -> None:
    """A trace and its copies call the layer as a module, once a call, and train and evaluate as the net does.

    Tracing runs nothing: no buffer moves and no hook is called.
    """
    if how == "pickled" and name in ("with hooks", "with a forward of its own"):
        how = "deepcopied" if name == "with hooks" else "itself"  # a lambda has no pickle; a bound one no copy
    if how == "deepcopied" and name == "with a forward of its own":
        how = "itself"
    made = net(name)
    before = copy.deepcopy(made.state_dict())
    right = net(name)
    graph = fx.symbolic_trace(made)
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    graph = COPIES[how](graph)
    assert nodes(graph) == ["body.0", "body.1", "body.0", "body.1", "head"]
    assert_same_step(graph, right)


class PathTracer(fx.Tracer):
    """As feature extractors do it: a node is named by the module that is being called, leaves are chosen by class."""

    def __init__(self, leaves: tuple[type, ...] = ()) -> None:
        super().__init__()
        self.leaves, self.path, self.paths = leaves, "", {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        outer, self.path = self.path, self.path_of_module(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self.path = outer

    def create_proxy(self, kind: str, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, *args, **kwargs)
        self.paths.setdefault(self.path, proxy.node)
        return proxy


@pytest.mark.parametrize("leaves", [(), (syncbn.SyncBatchNorm,), (nn.modules.batchnorm._BatchNorm,)], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_features_can_be_extracted_at_a_layer(name: str, leaves: tuple[type, ...]) -> None:
    """A feature extractor finds the layer's output by its path, whether or not it knows the layer for a leaf."""
    made, right = net(name), net(name)
    tracer = PathTracer(leaves)
    graph = tracer.trace(made)
    node = tracer.paths["body.1"]
    graph.erase_node(next(n for n in graph.nodes if n.op == "output"))
    graph.output(node)
    extractor = fx.GraphModule(made, graph)
    graph.eliminate_dead_code()
    extractor.recompile()
    assert nodes(extractor) == ["body.0", "body.1"]
    assert error(extractor(batch()), right.body(batch()).detach()) <= EXACT


def _on_two_ranks() -> None:
    """A traced net is synchronized: its statistics are those of both ranks, by one collective a call."""
    rank = torch.distributed.get_rank()
    made, whole = net("converted"), Net(nn.BatchNorm2d(3)).double()
    graph = fx.symbolic_trace(made)
    x = torch.cat([batch(1), batch(2)])
    with Collectives() as collectives:
        y = graph(x[4 * rank : 4 * rank + 4])
    assert collectives.count == 2
    assert error(y, whole(x)[4 * rank : 4 * rank + 4].detach()) <= EXACT
    assert error(graph.body.get_submodule("1").running_var, whole.body[1].running_var) <= EXACT


def test_a_traced_net_is_synchronized(ranks: RankPool) -> None:
    """On two ranks a symbolic trace trains as one process with the whole batch."""
    ranks.run(2, _on_two_ranks)
