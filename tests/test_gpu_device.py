"""The Triton kernels on a device: against the oracle, in graphs, without a wait of the host, over 2³¹ elements."""

import copy

import pytest
import torch

import syncbn
from syncbn import backends
from syncbn.formulas import moments
from tests.support.gpu_device import no_synchronization, run_on_cuda
from tests.support.oracle import ACTIVATIONS, Case, compare
from tests.support.ranks import RankPool

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SHAPES = [
    (8, 64, 56, 56),
    (8, 256, 14, 14),
    (8, 512, 7, 7),
    (8, 3, 33, 31),
    (8, 16, 32, 32),
    (2, 24, 5, 6, 7),
    (4096, 256),
    (512, 1001),
    (16, 48, 129),
]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_layouts(dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    """The layer on a device gives the oracle's values in every dtype and layout."""
    case = Case((shape,), dtype, torch.float32 if dtype != torch.float64 else None, layout, layout, residual=True)
    compare(case, [run_on_cuda(case)])


@pytest.mark.parametrize("layout", ["sliced", "channels_first", "channels_last"])
@pytest.mark.parametrize("dy_layout", ["contiguous", "channels_last", "expanded", "sliced"])
def test_any_strides(layout: str, dy_layout: str) -> None:
    """dy of another layout than x, and layouts that no main path serves."""
    case = Case(((6, 20, 9, 10),), layout=layout, dy_layout=dy_layout, activation="relu")
    compare(case, [run_on_cuda(case)])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogues(activation: str | None, residual: bool, masked: bool) -> None:
    """Every activation, with and without residual and mask."""
    case = Case(((6, 20, 9, 16),), activation=activation, residual=residual, masked=masked)
    compare(case, [run_on_cuda(case)])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics(momentum: float | None) -> None:
    """Five steps of many groups of channels move the buffers and the counter as on the CPU."""
    case = Case(((4, 1000, 6, 6),), momentum=momentum)
    compare(case, [run_on_cuda(case, 5)], 5)


def test_a_large_mean_costs_no_precision() -> None:
    """mean/std of 1e4 leaves the variance right to 1e-6."""
    x = torch.randn(16, 8, 64, 64) + 1e4
    sums = backends.select(x.cuda()).batch_sums(x.cuda(), None).cpu()
    _, var, _ = moments(sums, 8)
    assert (var / x.double().var((0, 2, 3), correction=0) - 1).abs().max() <= 1e-6


def test_bits_repeat() -> None:
    """Ten runs give the same bits, although programs end in any order."""
    layer = syncbn.SyncBatchNorm(64, activation="relu").cuda()
    x = torch.randn(32, 64, 56, 56, device="cuda", requires_grad=True)
    dy = torch.randn_like(x)
    runs = []
    for _ in range(10):
        x.grad = layer.weight.grad = None
        y = layer(x)
        y.backward(dy)
        runs.append((y.detach(), x.grad, layer.weight.grad))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_streams_do_not_share_workspaces() -> None:
    """Two streams at once give what one gives."""
    gpu = backends._load("gpu")
    xs = [torch.randn(32, 256, 28, 28, device="cuda") for _ in range(2)]
    right = [gpu.batch_sums(x, None) for x in xs]
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    for _ in range(50):
        results = []
        for x, stream in zip(xs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(gpu.batch_sums(x, None))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, right, strict=True))


def step(layer: syncbn.SyncBatchNorm, x: torch.Tensor, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    y = layer(x)
    (dx,) = torch.autograd.grad(y, x, dy)
    return y, dx


@pytest.mark.parametrize("samples", [8, 0])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_graph_replay(samples: int, momentum: float | None) -> None:
    """A replayed forward and backward gives eager's values and moves the buffers and the counter as eager does."""
    eager, captured = (syncbn.SyncBatchNorm(40, momentum=momentum).cuda() for _ in range(2))
    xs = [torch.randn(samples, 40, 9, 9, device="cuda") for _ in range(4)]
    x, dy = torch.zeros_like(xs[0]).requires_grad_(), torch.randn_like(xs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        (dx,) = torch.autograd.grad(captured(x), x, dy)
    torch.cuda.current_stream().wait_stream(stream)
    captured.reset_running_stats()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = captured(x)
        (dx,) = torch.autograd.grad(y, x, dy)
    captured.reset_running_stats()
    for each in xs:
        with torch.no_grad():
            x.copy_(each)
        graph.replay()
        leaf = each.clone().requires_grad_()
        right = eager(leaf)
        (right_dx,) = torch.autograd.grad(right, leaf, dy)
        assert torch.equal(y, right)
        assert torch.equal(dx, right_dx)
    for name, buffer in captured.named_buffers():
        assert torch.equal(buffer, dict(eager.named_buffers())[name]), name
    assert captured.num_batches_tracked == len(xs)


def test_the_host_never_waits() -> None:
    """A training step with a mask, a residual and momentum None has no synchronisation."""
    layer = syncbn.SyncBatchNorm(32, momentum=None, activation="relu").cuda()
    x = torch.randn(8, 32, 20, 20, device="cuda", requires_grad=True)
    residual, dy = torch.randn(2, 8, 32, 20, 20, device="cuda")
    mask = torch.rand(8, 20, 20, device="cuda") > 0.5
    layer(x, residual, mask).backward(dy)  # compiles, and makes the workspace
    with no_synchronization():
        layer(x, residual, mask).backward(dy)
        layer(x[:6], residual[:6], mask[:6]).backward(dy[:6])


def test_two_kernels_a_direction() -> None:
    """Forward and backward of a step launch two kernels each, and nothing else runs on the device."""
    layer = syncbn.SyncBatchNorm(64, activation="relu", dtype=torch.bfloat16).cuda()
    x = torch.randn(8, 64, 56, 56, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    residual = torch.randn_like(x)
    dy = torch.randn_like(x)
    torch.autograd.grad(layer(x, residual), (x, layer.weight, layer.bias), dy)
    torch.cuda.synchronize()
    # acc_events: without it the profiler of torch 2.11 warns that it forgets
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        torch.autograd.grad(layer(x, residual), (x, layer.weight, layer.bias), dy)
        torch.cuda.synchronize()
    ran = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert ran == ["batch_sums_kernel", "normalize_kernel", "grad_sums_kernel", "grad_input_kernel"]


@pytest.mark.parametrize(("channels", "rows"), [(16, False), (16, True), (1, False)])
def test_more_than_2_31_elements(channels: int, rows: bool) -> None:
    """The last elements of a tensor of 2³¹ + 2²² count, and are written; also where they are all one plane."""
    need = 5 * 2 * (2**31 + 2**22)
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need / 2**30:.0f} GiB of free device memory")
    x = torch.zeros(513 * 16 // channels, channels, 512, 512, dtype=torch.float16, device="cuda")
    if rows:
        x = x.view(-1, 512, 512, channels).permute(0, 3, 1, 2)
    x[-1, :, -1, -1] = 1.0
    gpu = backends._load("gpu")
    sums = gpu.batch_sums(x, None)
    assert sums.tolist() == [1.0] * (2 * channels) + [float(x.numel() // channels), 0.0, 0.0]
    y, mean, invstd = gpu.normalize(x, sums, backends.Epilogue(), 1e-5, None)
    torch.testing.assert_close(y[-1, :, -1, -1].float(), (1 - mean) * invstd, rtol=2**-10, atol=0)
    assert torch.equal(y[0, :, 0, 0], y[-1, :, -1, -2])
    del y
    dsums, _, _ = gpu.grad_sums(x, x, mean, invstd, backends.Epilogue())
    torch.testing.assert_close(dsums[channels:-2], ((1 - mean) * invstd).double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shapes", [((5, 24, 9, 9), (3, 24, 9, 9)), ((4, 24, 9, 9), (0, 24, 9, 9))], ids=str)
def test_two_ranks_share_a_device(ranks: RankPool, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Two gloo processes on one device agree with the oracle, one of them with an empty batch too."""
    case = Case(shapes, activation="relu", residual=True)
    compare(case, ranks.run(2, run_on_cuda, case, 2), 2)


def test_recomputed_statistics() -> None:
    """Of all batches on a device, as on the CPU to float32's rounding."""
    net = torch.nn.Sequential(torch.nn.BatchNorm2d(8), syncbn.SyncBatchNorm(8, activation="relu"))
    right = copy.deepcopy(net)
    batches = torch.randn(3, 4, 8, 9, 9) * 2 + 1
    said = syncbn.recompute_statistics(net.cuda(), batches.cuda())
    assert said.counts == syncbn.recompute_statistics(right, batches).counts
    for name, buffer in net.named_buffers():
        torch.testing.assert_close(buffer.cpu(), dict(right.named_buffers())[name], rtol=1e-5, atol=1e-6)
