"""torch.jit.trace of a training step: the numbers of torch's own batch norm traced, across ranks too."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool

SHAPES = [(4, 3, 5, 5), (4, 3, 5, 5), (7, 3, 2, 6), (1, 3, 1, 9), (2, 3, 8, 8)]
"""Of the calls of a traced net, the first that of the trace; others more than once, for what TorchScript optimizes."""


AGAINST_ITSELF = "`torch.jit"
"""How the warnings begin by which torch advises against TorchScript."""


@pytest.fixture(autouse=True)
def _trace_may_warn_of_itself() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", AGAINST_ITSELF)
        yield


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv, self.norm = nn.Conv2d(3, 3, 1, bias=False), layer

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).sin()


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "converted": (lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)), lambda: nn.BatchNorm2d(3)),
    "built": (lambda: syncbn.SyncBatchNorm(3), lambda: nn.BatchNorm2d(3)),
    "built for 2d": (lambda: syncbn.SyncBatchNorm2d(3, momentum=0.5), lambda: nn.BatchNorm2d(3, momentum=0.5)),
    "without parameters": (lambda: syncbn.SyncBatchNorm(3, affine=False), lambda: nn.BatchNorm2d(3, affine=False)),
    "without statistics": (
        lambda: syncbn.SyncBatchNorm(3, track_running_stats=False),
        lambda: nn.BatchNorm2d(3, track_running_stats=False),
    ),
    "with an activation": (
        lambda: syncbn.SyncBatchNorm(3, activation="silu"),
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.SiLU()),
    ),
}


def traced(net: nn.Module, x: Tensor, **kwargs: Any) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", AGAINST_ITSELF)
        return torch.jit.trace(net, x, **kwargs)


def inputs(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """The whole batch and its cotangent, of each call."""
    generator = torch.Generator().manual_seed(3)
    for n, *rest in SHAPES:
        x, dy = torch.randn(2, 2 * n, *rest, dtype=torch.float64, generator=generator)
        yield x.add_(1).to(dtype), dy.to(dtype)


def assert_same_training(net: nn.Module, right: nn.Module, dtype: torch.dtype) -> None:
    """This rank's part of the training that `right` does with whole batches: y, all gradients, running statistics."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    limit = 8 * UNIT[dtype]  # a convolution, a normalization and a sine, each to UNIT, on both sides
    for x, dy in inputs(dtype):
        mine = slice(rank * len(x) // size, (rank + 1) * len(x) // size)
        x_mine, x_right = x[mine].clone().requires_grad_(), x.double().requires_grad_()
        with Collectives() as forward:
            y = net(x_mine)
        with Collectives() as backward:
            y.backward(dy[mine])
        assert (forward.count, backward.count) == ((1, 1) if size > 1 else (0, 0))
        y_right = right(x_right)
        y_right.backward(dy.double())
        assert error(y, y_right[mine]) <= limit
        assert error(x_mine.grad, x_right.grad[mine]) <= limit
    for p, q in zip(net.parameters(), right.parameters(), strict=True):
        if size > 1:
            dist.all_reduce(p.grad)
        assert error(p.grad, q.grad) <= limit
    for a, b in zip(net.buffers(), right.buffers(), strict=True):
        assert error(a, b.double()) <= limit


def _trains(name: str, dtype: torch.dtype, saved: bool) -> None:
    ours, theirs = (Net(make()) for make in LAYERS[name])
    right = theirs.double()
    x = next(inputs(dtype))[0][: SHAPES[0][0]]
    script = traced(ours.to(dtype), x, check_trace=False)
    if saved:
        file = io.BytesIO()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", AGAINST_ITSELF)
            torch.jit.save(script, file)
            file.seek(0)
            script = torch.jit.load(file)
    for a, b in zip(script.buffers(), right.buffers(), strict=True):
        b.copy_(a)  # a trace runs the net
    script.zero_grad()
    assert_same_training(script, right, dtype)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("saved", [False, True], ids=["", "saved"])
def test_a_traced_net_trains(ranks: RankPool, name: str, dtype: torch.dtype, saved: bool) -> None:
    """A trace, and one that was saved and loaded, trains as one process does with the whole batch: on one rank and on
    two, with batches of other sizes than that of the trace, by one collective each way.
    """
    _trains(name, dtype, saved)
    ranks.run(2, _trains, name, dtype, saved)


@pytest.mark.parametrize("name", ["converted", "built for 2d", "without statistics"])
@pytest.mark.parametrize("check", [False, True])
def test_tracing_moves_the_statistics_as_often_as_torchs(name: str, check: bool) -> None:
    """A trace moves the running statistics once for each time it runs the net, as a trace of torch's layer does."""
    ours, theirs = (Net(make()) for make in LAYERS[name])
    x = torch.randn(4, 3, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own layer compares sizes
        right = traced(theirs, x, check_trace=check)
    script = traced(ours, x, check_trace=check)
    for net, expected in ((ours, theirs), (script, right)):
        for a, b in zip(net.buffers(), expected.buffers(), strict=True):
            assert error(a, b.double()) <= 8 * UNIT[torch.float32]


def test_a_cumulative_average_stays_one() -> None:
    """With momentum=None the weight of a batch in a trace follows the counter; torch's layer writes down the first."""
    net, eager = (Net(syncbn.SyncBatchNorm(3, momentum=None)) for _ in range(2))
    script = traced(net, torch.randn(4, 3, 5, 5), check_trace=False)
    eager.load_state_dict(script.state_dict())
    for _ in range(3):
        x = torch.randn(4, 3, 5, 5)
        script(x)
        eager(x)
    assert eager.norm.num_batches_tracked == script.norm.num_batches_tracked == 4
    assert error(script.norm.running_var, eager.norm.running_var.double()) <= 8 * UNIT[torch.float32]


class Inputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm(3, activation="relu")

    def forward(self, x: Tensor, residual: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x, residual, mask)


def test_a_residual_and_a_mask_are_inputs_of_the_graph() -> None:
    """In a trace the residual and the mask are those of the call, of whatever size."""
    net = Inputs().double()
    eager = copy.deepcopy(net)
    for step, n in enumerate((3, 5, 2)):
        x, residual = torch.randn(2, n, 3, 4, dtype=torch.float64)
        mask = torch.rand(n, 4) > 0.3
        if step == 0:
            script = traced(net, (x, residual, mask), check_trace=False)
            eager.load_state_dict(script.state_dict())
        assert error(script(x, residual, mask), eager(x, residual, mask).detach()) <= UNIT[torch.float64]


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5), (4, 3, 2, 5, 5), (1, 3, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_trace_warns_of_nothing(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """No comparison of a traced size is left in a call: it would be a TracerWarning, an error here."""
    traced(syncbn.SyncBatchNorm(3, activation="relu"), torch.randn(shape).to(dtype), check_trace=False)


def test_a_wrong_input_is_refused_while_it_is_traced() -> None:
    """A trace checks its arguments, before anything moves."""
    layer = syncbn.SyncBatchNorm(3)
    with pytest.raises(ValueError, match="num_features=4"):
        traced(layer, torch.randn(2, 4, 5))
    assert layer.num_batches_tracked == 0


def test_eval_is_traced_to_one_operation() -> None:
    """In eval a trace holds aten::batch_norm, which TorchScript folds and exporters know."""
    script = traced(syncbn.SyncBatchNorm(3).eval(), torch.randn(4, 3, 5))
    assert [n.kind() for n in script.inlined_graph.nodes() if n.kind().startswith("aten::")] == ["aten::batch_norm"]


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_scripts_within_plain(training: bool) -> None:
    """torch.jit.script takes a converted model where its layers are ordinary for a while."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).train(training)
    right = copy.deepcopy(net)
    syncbn.convert_sync_batchnorm(net)
    with warnings.catch_warnings(), syncbn.plain(net):
        warnings.filterwarnings("ignore", AGAINST_ITSELF)
        script = torch.jit.script(net)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(script(x), right(x))
    assert type(net[1]) is syncbn.SyncBatchNorm2d


def test_operations_of_a_step_can_be_counted() -> None:
    """What counts the operations of a traced graph, as flop counters do, finds the convolution beside the layer."""
    net = Net(syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", AGAINST_ITSELF)
        graph = torch.jit._get_trace_graph(net, torch.randn(4, 3, 5, 5))[0]
    kinds = [n.kind() for n in graph.nodes()]
    assert kinds.count("aten::_convolution") == 1
    assert not any(kind.startswith("prim::Python") for kind in kinds)


def test_a_checkpointed_net_is_traced() -> None:
    """A region inside of what is traced is written down as what it does, and moves the statistics once a call."""
    net, eager = (Net(syncbn.SyncBatchNorm(3)).double() for _ in range(2))

    class Region(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.net, x, use_reentrant=False)

    x = torch.randn(4, 3, 5, 5).double()
    script = traced(Region(), x, check_trace=False)
    eager.load_state_dict(net.state_dict())
    assert error(script(x), eager(x).detach()) <= UNIT[torch.float64]
    assert error(net.norm.running_var, eager.norm.running_var) <= UNIT[torch.float64]
