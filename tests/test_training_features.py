"""What a training step may use besides: autocast, a scaler, parametrizations, hooks, averaging, determinism."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, update_bn

import syncbn
from tests.support.gpu_device import run_on_cuda
from tests.support.layer_runs import hold, run_case
from tests.support.nets import Net, batch, sums_taken
from tests.support.oracle import UNIT, Case, Outcome, compare, error
from tests.support.ranks import Collectives, RankPool

UNEVEN, EMPTY = ((4, 5, 6, 7), (1, 5, 3, 9)), ((4, 5, 6, 7), (0, 5, 6, 7))
EXACT = 1e-12


def _in_autocast(case: Case, autocast: torch.dtype, device: str) -> Outcome:
    with torch.autocast(device, autocast):
        return run_case(case) if device == "cpu" else run_on_cuda(case)


MIXES = [
    (torch.bfloat16, Case(UNEVEN, torch.bfloat16, torch.float32, residual=True, activation="relu")),
    (torch.bfloat16, Case(UNEVEN, torch.float32, activation="silu")),
    (torch.float16, Case(UNEVEN, torch.float16, torch.float32, activation="leaky_relu")),
    (torch.bfloat16, Case(EMPTY, torch.bfloat16, torch.float32)),
]


@pytest.mark.parametrize(("autocast", "case"), MIXES, ids=str)
def test_autocast(ranks: RankPool, autocast: torch.dtype, case: Case) -> None:
    """Autocast changes nothing in the layer: it computes in float32 or more from whatever the convolution gives."""
    hold(case, ranks.run(2, _in_autocast, case, autocast, "cpu"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("autocast", "case"), MIXES[:3], ids=str)
def test_autocast_on_a_device(ranks: RankPool, autocast: torch.dtype, case: Case) -> None:
    """So it is on a device."""
    compare(case, ranks.run(2, _in_autocast, case, autocast, "cuda"))


def _scaled() -> None:
    net = Net()
    right = copy.deepcopy(net)
    model, plain = DistributedDataParallel(net), DistributedDataParallel(right)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, plain)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for seed in range(3):
        overflow = seed == 1
        x, dy = batch(2 + dist.get_rank(), seed)
        before = [p.detach().clone() for p in net.parameters()]
        if overflow and dist.get_rank() == 1:
            dy[0, 0] = float("inf")
        with sums_taken() as taken:
            scaler.scale((model(x) * dy).sum()).backward()
        assert taken == [2 * 8 + 3] * Net.LAYERS + [2 * 8 + 2] * Net.LAYERS
        scaler.step(optimizers[0])
        scaler.update()
        if overflow:  # on one rank, but its gradients reached all of them
            plain(x.detach())
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        else:
            (plain(x.detach()) * dy).sum().backward()
            optimizers[1].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert scaler.get_scale() == 2.0**9
    for name, value in right.state_dict().items():
        assert error(net.state_dict()[name], value.double()) <= 4 * UNIT[torch.float32], name


def test_grad_scaler(ranks: RankPool) -> None:
    """A scaled loss trains as an unscaled one; a gradient that overflows on one rank skips the step on all."""
    ranks.run(2, _scaled)


class Exponential(nn.Module):
    def forward(self, t: Tensor) -> Tensor:
        return t.exp()


def samples() -> Tensor:
    return torch.randn(6, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def part(t: Tensor) -> Tensor:
    """This rank's samples: 4 and 2 of two ranks, all when alone."""
    return t.split([4, 2])[dist.get_rank()] if dist.is_initialized() else t


def parametrized(layer: nn.Module) -> dict[str, Tensor]:
    """A step of a layer whose weight is the exponential of what is learnt; gradients are summed over the ranks."""
    parametrize.register_parametrization(layer, "weight", Exponential())
    parametrize.register_parametrization(layer, "bias", Exponential())
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.linspace(-1, 1, 3))
    x = part(samples()).requires_grad_()
    with Collectives() as collectives:
        layer(x).backward(part(samples().cos()))
    assert collectives.count == 2 * dist.is_initialized()
    found = {name: p.grad for name, p in layer.named_parameters()}
    if dist.is_initialized():
        for grad in found.values():
            dist.all_reduce(grad)
    return found | dict(layer.named_buffers())


def _ours(how: str) -> dict[str, Tensor]:
    if how == "converted":
        return parametrized(syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3).double()))
    return parametrized(syncbn.SyncBatchNorm(3).double())


@pytest.mark.parametrize("how", ["built", "converted"])
def test_parametrize(ranks: RankPool, how: str) -> None:
    """A parametrized weight and bias learn what they learn in one process with all samples."""
    right = parametrized(nn.BatchNorm1d(3).double())
    for ours in ranks.run(2, _ours, how):
        assert list(ours) == list(right)
        assert all(error(ours[name], value.double()) <= EXACT for name, value in right.items())


def _functional_call() -> None:
    layer = syncbn.SyncBatchNorm(3).double()
    given = syncbn.SyncBatchNorm(3).double()
    with torch.no_grad():
        given.weight.copy_(torch.arange(3))
    right = copy.deepcopy(given)
    x = part(samples())
    with Collectives() as collectives:
        y = functional_call(layer, {**dict(given.named_parameters()), **dict(given.named_buffers())}, (x,))
        y.square().sum().backward()
    assert collectives.count == 1  # x needs no gradient
    y_right = right(x)
    y_right.square().sum().backward()
    assert torch.equal(y, y_right)
    assert torch.equal(given.weight.grad, right.weight.grad)
    assert torch.equal(given.running_var, right.running_var)
    assert (layer.num_batches_tracked, given.num_batches_tracked, layer.weight.grad) == (0, 1, None)


def test_functional_call(ranks: RankPool) -> None:
    """Parameters and buffers that are given are the ones used and moved; the layer's own stay."""
    ranks.run(2, _functional_call)


def hooked(layer: nn.Module) -> dict[str, Tensor]:
    """A step of a layer with hooks of every kind, some of which change what passes."""
    seen: dict[str, Tensor] = {}
    layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    layer.register_forward_hook(lambda module, args, y: y + args[0])
    layer.register_full_backward_pre_hook(lambda module, dy: (dy[0] * 3,))
    layer.register_full_backward_hook(lambda module, dx, dy: seen.update(dx=dx[0], dy=dy[0]))
    layer.weight.register_hook(lambda grad: grad / 2)
    layer.weight.register_post_accumulate_grad_hook(lambda weight: seen.update(dweight=weight.grad))
    x = part(samples()).requires_grad_()
    with Collectives() as collectives:
        layer(x).backward(part(samples().cos()))
    assert collectives.count == 2 * dist.is_initialized()
    if dist.is_initialized():
        dist.all_reduce(seen["dweight"])
    return seen | {"x.grad": x.grad, "running_mean": layer.running_mean}


def test_hooks_on_the_layer(ranks: RankPool) -> None:
    """Hooks on the layer and its weight see and change what they do on a batch norm in one process."""
    right = hooked(nn.BatchNorm1d(3).double())
    everywhere = ranks.run(2, hooked, syncbn.SyncBatchNorm(3).double())
    for name, value in right.items():
        rows = value.split([4, 2]) if value.ndim > 1 else [value] * 2
        for ours, row in zip(everywhere, rows, strict=True):
            assert error(ours[name], row) <= EXACT, name


def averaged(norm: Callable[[int], nn.Module]) -> tuple[dict[str, Tensor], list[int]]:
    """An averaged model, its statistics taken anew over three batches."""
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv1d(3, 4, 1), norm(4), nn.SiLU(), nn.Conv1d(4, 4, 1), norm(4)).double()
    average = AveragedModel(net)
    average.update_parameters(net)
    net[1](torch.randn(2, 4, 5, dtype=torch.float64))  # statistics that are to be forgotten
    with sums_taken() as taken:
        update_bn([(part(samples() * scale),) for scale in (1, 2, 3)], average)
    assert [m.momentum for m in average.modules() if hasattr(m, "momentum")] == [0.1, 0.1]
    return dict(average.named_buffers()), taken


def test_update_bn(ranks: RankPool) -> None:
    """SWA's update_bn gives every rank the statistics of one process with all samples, by one sum a batch and layer."""
    right, _ = averaged(nn.BatchNorm1d)
    for ours, taken in ranks.run(2, averaged, syncbn.SyncBatchNorm):
        assert taken == [2 * 4 + 3] * 2 * 3
        assert list(ours) == list(right)
        assert all(error(ours[name], value.double()) <= EXACT for name, value in right.items())


def _deterministic(case: Case) -> tuple[Outcome, Outcome]:
    usual = run_case(case)
    torch.use_deterministic_algorithms(True)  # which also fills fresh memory with NaN
    try:
        return usual, run_case(case)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "case",
    [
        Case(UNEVEN, torch.float32, residual=True, activation="silu"),
        Case(UNEVEN, torch.bfloat16, layout="channels_last", masked=True),
        Case(EMPTY, torch.float64),
        Case(UNEVEN, torch.float32, backend="reference"),
    ],
    ids=str,
)
def test_deterministic_mode(ranks: RankPool, case: Case) -> None:
    """torch.use_deterministic_algorithms(True) is met, with the same bits as without."""
    results = ranks.run(2, _deterministic, case)
    hold(case, [strict for _, strict in results])
    for usual, strict in results:
        for name, value in vars(usual).items():
            if isinstance(value, Tensor):
                assert torch.equal(getattr(strict, name), value), name
