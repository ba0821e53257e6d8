"""torch.compile: one graph, the oracle's numbers, one collective each way, no graph anew for every batch size."""

import copy
import re

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.distributed as dist
from torch._inductor.utils import run_fw_bw_and_get_code

import syncbn
from tests.support.layer_runs import check, compiled, generates, let_torch_warn_of_itself
from tests.support.nets import Net, assert_same_state, assert_step, batch
from tests.support.oracle import UNIT, Case, error, in_layout
from tests.support.ranks import Collectives, RankPool

EVEN, UNEVEN, EMPTY = ((4, 5, 6, 7),) * 2, ((4, 5, 6, 7), (1, 5, 3, 9)), ((4, 5, 6, 7), (0, 5, 6, 7))
SEQUENCE, VOLUME, VECTOR = ((3, 5, 8), (2, 5, 8)), ((2, 5, 3, 4, 2), (3, 5, 3, 4, 2)), ((6, 5), (9, 5))
LAST = {"layout": "channels_last", "dy_layout": "channels_last"}

TRACED = [
    Case(EVEN[:1]),
    Case(UNEVEN, torch.float64, residual=True, activation="silu"),
    Case(UNEVEN, torch.float32, momentum=None, activation="leaky_relu"),
    Case(EMPTY, torch.float32, residual=True, activation="relu"),
    Case(((0, 5, 6, 7),) * 2),
    Case(((1, 5), (2, 5))),
    Case(VECTOR, torch.float16, torch.float32),
    Case(VOLUME, torch.bfloat16, torch.float32, **LAST),
    Case(SEQUENCE, torch.float32, masked=True, residual=True, activation="silu"),
    Case(SEQUENCE, torch.bfloat16, masked=True),
    Case(UNEVEN, torch.float32, layout="sliced", dy_layout="expanded"),
    Case(UNEVEN, torch.float32, affine=False, track=False),
    Case(UNEVEN, torch.float32, bias=False, residual=True),
]
GENERATED = [
    Case(UNEVEN, torch.float32, residual=True, activation="relu"),
    Case(VOLUME, torch.bfloat16, torch.float32, activation="silu", **LAST),
    Case(SEQUENCE, torch.float32, masked=True, momentum=None),
    Case(EMPTY, torch.float64),
]


def param_cases(cases: list[Case], compiler: str) -> pytest.MarkDecorator:
    cases = [Case(**{**vars(case), "compiler": compiler}) for case in cases]
    return pytest.mark.parametrize("case", [pytest.param(case, id=str(case)) for case in cases])


@param_cases(TRACED, "aot_eager")
def test_traced(ranks: RankPool, case: Case) -> None:
    """Written down and differentiated by the compiler, but run by ATen, the layer is the oracle's, for two steps."""
    check(ranks, case, steps=2)


@generates
@param_cases(GENERATED, "inductor")
def test_generated(ranks: RankPool, case: Case) -> None:
    """So it is as the code that Inductor generates."""
    check(ranks, case, steps=2)


def _sizes(compiler: str) -> None:
    net = Net()
    right = copy.deepcopy(net)
    compilations = torch._dynamo.testing.CompileCounterWithBackend(compiler)
    called = compiled(net, compilations)
    rank = dist.get_rank()
    for samples in (4, 3, 5, 7, 6):
        assert_step(called, *batch(samples + rank, samples), right)
        if samples == 3:
            after_two = compilations.frame_count
    assert compilations.frame_count == after_two == 2
    assert_same_state(net, right)
    net.eval()
    x, _ = batch(2)
    with Collectives() as evaluation:
        y = torch.compile(net, fullgraph=True, backend=compiler)(x)
    assert evaluation.count == 0
    assert error(y, right.eval()(x).double()) <= 2 * UNIT[torch.float32]


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=generates)])
def test_five_batch_sizes_are_two_graphs(ranks: RankPool, compiler: str) -> None:
    """One graph for the first batch size and one for all others; parameters, buffers and counter end as in eager.

    With inductor it also holds Inductor to not changing one layer's count when it reduces another's in place.
    """
    ranks.run(2, _sizes, compiler)


def test_there_is_no_graph_break() -> None:
    """torch._dynamo.explain finds one graph and nothing that breaks it."""
    torch.compiler.reset()
    found = torch._dynamo.explain(Net())(torch.randn(2, 3, 6, 5))
    assert (found.graph_count, found.graph_break_count, found.break_reasons) == (1, 0, [])


def _generated() -> list[list[int]]:
    layer = syncbn.SyncBatchNorm(8)
    x, residual = torch.randn(2, 4, 8, 6, 5)
    x.requires_grad_()
    calls = []
    for function in (lambda: torch.relu(layer(x.bfloat16()).float() + residual), lambda: layer(x)):
        called = compiled(function, "inductor")
        _, passes = run_fw_bw_and_get_code(called)
        calls.append([re.findall(r"^ +(cpp_fused|torch.ops._c10d_functional.all_reduce)", p, re.M) for p in passes])
    return calls


@generates
def test_neighbours_are_fused(ranks: RankPool) -> None:
    """Casts, a residual and a ReLU around the layer need no kernel of their own: one before the sum, one after it."""
    kernel, reduce = "cpp_fused", "torch.ops._c10d_functional.all_reduce"
    for with_neighbours, alone in ranks.run(2, _generated):
        assert with_neighbours == alone == [[kernel, reduce, kernel]] * 2


def test_eval_is_a_plain_batch_norm() -> None:
    """What a compiler is given in eval is F.batch_norm, as of nn.BatchNorm2d, and no operator of ours."""
    torch.compiler.reset()
    backend = torch._dynamo.testing.EagerAndRecordGraphs()
    torch.compile(Net().eval(), fullgraph=True, backend=backend)(torch.randn(2, 3, 6, 5))
    targets = [node.target for graph in backend.graphs for node in graph.graph.nodes]
    assert targets.count(torch.nn.functional.batch_norm) == Net.LAYERS
    assert not any("syncbn" in str(target) for target in targets)


def _generated_statistics(last: bool) -> None:
    layer = syncbn.SyncBatchNorm(4, momentum=1.0, dtype=torch.float64)
    called = compiled(layer, "inductor")
    for ratio, limit in ((0, 1e-6), (1e3, 1e-6), (1e4, 1e-5)):
        x = in_layout(torch.randn(8, 4, 300, 200) + ratio, "channels_last" if last else "contiguous")
        called(x)
        var = x.double().var((0, 2, 3))
        assert ((layer.running_var - var) / var).abs().max() <= limit, ratio


@generates
@pytest.mark.parametrize("last", [False, True])
def test_generated_statistics_are_exact_far_from_zero(ranks: RankPool, last: bool) -> None:
    """As generated by Inductor, the variance of half a million values of mean/std up to 1e4 is right to 1e-6 (1e-5)."""
    ranks.run(1, _generated_statistics, last)


def _wrong_channels() -> None:
    layer = syncbn.SyncBatchNorm(3)
    for fullgraph, error_type in ((False, ValueError), (True, torch._dynamo.exc.Unsupported)):  # torch's wrapping of it
        torch.compiler.reset()
        with Collectives() as collectives, pytest.raises(error_type, match="num_features=4"):
            torch.compile(layer, backend="aot_eager", fullgraph=fullgraph)(torch.randn(2, 4, 5))
        assert collectives.count == 0
    assert layer.num_batches_tracked == 0


def test_a_wrong_argument_is_the_same_error(ranks: RankPool) -> None:
    """Compiled, a wrong argument is eager's error, or torch's with eager's text in it, before any collective."""
    ranks.run(2, _wrong_channels)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_on_a_device(mode: str) -> None:
    """Generated for a GPU, and replayed as a CUDA graph, steps are eager's; buffers move once a step."""
    let_torch_warn_of_itself()
    torch.compiler.reset()
    layer = syncbn.SyncBatchNorm(16, activation="relu").cuda()
    right = copy.deepcopy(layer)
    called = torch.compile(layer, fullgraph=True, mode=mode)
    for _ in range(5):  # a graph is captured in the second or third call and replayed after that
        x, dy = torch.randn(2, 8, 16, 9, 9, device="cuda")
        x_right = x.clone().requires_grad_()
        torch.compiler.cudagraph_mark_step_begin()
        layer.zero_grad()  # a replay would overwrite the last step's gradients, and torch refuses to add to them
        right.zero_grad()
        y = called(x.requires_grad_())
        y.backward(dy)
        y_right = right(x_right)
        y_right.backward(dy)
        assert error(y.cpu(), y_right.cpu().double()) <= 2 * UNIT[torch.float32]
        for mine, rightly in ((x.grad, x_right.grad), (layer.weight.grad, right.weight.grad)):
            assert error(mine.cpu(), rightly.cpu().double()) <= 2 * UNIT[torch.float32]
    assert_same_state(layer.cpu(), right.cpu())
