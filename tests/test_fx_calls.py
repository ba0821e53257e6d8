"""torch.fx: what a node holds, of a layer's other inputs, of the function, and of calls on a model's own tensors."""

import copy

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental import meta_tracer
from torch.fx.experimental.proxy_tensor import make_fx

import syncbn
from syncbn.functional import sync_batch_norm
from tests.support.oracle import error
from tests.support.ranks import Collectives, RankPool
from tests.test_fx import COPIES, EXACT, batch


class Inputs(nn.Module):
    """A layer given its other inputs by place and by name."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(3, activation="relu")

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x, residual) + self.norm(input=x, mask=mask) + self.norm(x, residual=residual, mask=mask)


def test_a_residual_and_a_mask_are_inputs_of_the_node() -> None:
    """Symbolic inputs by place and by name end up in the node."""
    made = Inputs().double()
    right = copy.deepcopy(made)
    x, residual = batch(1), batch(2)
    mask = torch.rand(4, 5, 5) > 0.3
    assert error(fx.symbolic_trace(made)(x, residual, mask), right(x, residual, mask).detach()) <= EXACT


class Functional(nn.Module):
    """The function on a module's own tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2, 3]))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return sync_batch_norm(x, self.mean, self.var, self.weight, training=self.training, activation="relu").square()


@pytest.mark.parametrize("how", COPIES)
def test_a_call_of_the_function_is_one_node(how: str) -> None:
    """functional.sync_batch_norm is a call_function node, as F.batch_norm is, and computes the same afterwards."""
    made = Functional().double()
    right = copy.deepcopy(made)
    graph = COPIES[how](fx.symbolic_trace(made))
    assert [n.target for n in graph.graph.nodes if n.op == "call_function"] == [sync_batch_norm]
    assert error(graph(batch()), right(batch()).detach()) <= EXACT
    assert error(graph.mean, right.mean) <= EXACT


class Elsewhere(nn.Module):
    """The function with a symbolic argument anywhere but first."""

    def __init__(self, which: str) -> None:
        super().__init__()
        self.which = which

    def forward(self, t: Tensor) -> Tensor:
        x = torch.arange(12.0).view(4, 3).double() ** 2
        others = dict.fromkeys(("running_mean", "running_var"))
        return sync_batch_norm(x, **{**others, self.which: t}, training=True)


ELSEWHERE = {"weight": torch.randn(3), "bias": torch.randn(3), "residual": torch.randn(4, 3)}
ELSEWHERE["mask"] = torch.tensor([True, True, False, True])


@pytest.mark.parametrize("which", ELSEWHERE)
def test_a_symbolic_argument_may_be_any(which: str) -> None:
    """The function is one node, too, if what is symbolic is not its input."""
    made = Elsewhere(which)
    given = ELSEWHERE[which] if which == "mask" else ELSEWHERE[which].double()
    assert error(fx.symbolic_trace(made)(given), made(given)) <= EXACT


def _a_group_in_a_call() -> None:
    class Call(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return sync_batch_norm(x, None, None, training=True, process_group=torch.distributed.group.WORLD)

    with pytest.raises(TypeError, match=r"no process group into a graph.*Trace a layer"):
        fx.symbolic_trace(Call())


def test_a_group_is_no_argument_of_a_node(ranks: RankPool) -> None:
    """A process group given to the function cannot be written into a graph, which is said in words."""
    ranks.run(1, _a_group_in_a_call)


class Prompt(nn.Module):
    """A layer on a tensor of the model's own, which is not symbolic."""

    def __init__(self, norm: nn.Module, constant: bool) -> None:
        super().__init__()
        self.norm, self.constant = norm, constant
        self.register_buffer("anchors", torch.linspace(-1, 2, 24).view(8, 3) ** 2)

    def forward(self, x: Tensor) -> Tensor:
        anchors = torch.linspace(0, 1, 24).view(8, 3) if self.constant else self.anchors
        return x @ self.norm(anchors.to(x.dtype)).T


def _on_its_own(constant: bool) -> None:
    made, right = (Prompt(norm, constant).double() for norm in (syncbn.SyncBatchNorm1d(3), nn.BatchNorm1d(3)))
    x = torch.randn(2, 3).double()
    with Collectives() as collectives:
        graph = fx.symbolic_trace(made)
    assert collectives.count == 0
    assert made.norm.num_batches_tracked == 0
    for _ in range(2):
        graph(x).square().sum().backward()
        right(x).square().sum().backward()
    assert made.norm.num_batches_tracked == 2
    assert error(made.norm.running_mean, right.norm.running_mean) <= EXACT
    assert error(made.norm.weight.grad, right.norm.weight.grad) <= EXACT


@pytest.mark.parametrize("constant", [False, True], ids=["buffer", "constant"])
def test_a_call_without_a_symbolic_input_is_a_node_too(ranks: RankPool, constant: bool) -> None:
    """What is called on a buffer or a constant is not run by tracing, on two ranks neither, and runs in each call."""
    _on_its_own(constant)
    ranks.run(2, _on_its_own, constant)


def test_a_trace_of_operations_looks_inside() -> None:
    """make_fx takes down a layer's operations, as it does of any layer."""
    layer = syncbn.SyncBatchNorm(3).eval()
    graph = make_fx(layer)(torch.randn(4, 3))
    assert [n for n in graph.graph.nodes if n.op == "call_function"]
    assert not [n for n in graph.graph.nodes if n.op == "call_module"]


@pytest.mark.filterwarnings("ignore:Could not compute metadata")  # of a CPU layer and a meta input
@pytest.mark.parametrize("training", [True, False])
def test_a_tracer_that_runs_modules_for_their_shapes(training: bool) -> None:
    """A tracer which, to write a node down, runs the module on meta tensors writes down one node."""
    net = nn.Sequential(syncbn.SyncBatchNorm2d(3), nn.ReLU(), syncbn.SyncBatchNorm(3)).train(training)
    graph = meta_tracer.symbolic_trace(net, meta_args={"input": torch.empty(2, 3, 4, 4, device="meta")})
    assert [n.target for n in graph.graph.nodes if n.op == "call_module"] == ["0", "1", "2"]
    assert graph(torch.randn(2, 3, 4, 4)).isfinite().all()
