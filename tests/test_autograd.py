"""How often ranks talk, and that every rank's gradient is that of the sum of all losses."""

import torch
import torch.distributed as dist
from torch.distributed.tensor.debug import CommDebugMode

import syncbn
from tests.support.ranks import RankPool


def _collectives(fn) -> int:
    with CommDebugMode() as mode:
        fn()
    return mode.get_total_counts()


def _counts() -> None:
    layer = syncbn.SyncBatchNorm(3, activation="relu")
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    residual = torch.randn(4, 3, 5, 5, requires_grad=True)
    out = []
    assert _collectives(lambda: out.append(layer(x, residual))) == 1
    assert _collectives(lambda: out[0].sum().backward()) == 1
    assert x.grad is not None
    without_dx = layer(x.detach(), residual)
    assert _collectives(lambda: without_dx.sum().backward()) == 0
    with torch.no_grad():
        assert _collectives(lambda: layer(x)) == 1
    layer.eval()
    assert _collectives(lambda: layer(x).sum().backward()) == 0
    untracked = syncbn.SyncBatchNorm(3, track_running_stats=False).eval()
    assert _collectives(lambda: untracked(x).sum().backward()) == 0


def test_one_collective_each_way(ranks: RankPool) -> None:
    """One in a training forward, one in a backward iff the input needs a gradient, none in eval."""
    ranks.run(2, _counts)


def _alone() -> None:
    layer = syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    assert _collectives(lambda: layer(x).sum().backward()) == 0


def test_a_group_of_one_does_not_communicate(ranks: RankPool) -> None:
    """World size 1 starts no collective."""
    ranks.run(1, _alone)


def _eval_on_rank_0() -> torch.Tensor:
    layer = syncbn.SyncBatchNorm(3)
    torch.manual_seed(1)
    x = torch.randn(4, 3)
    layer(x)
    if dist.get_rank() == 0:
        layer.eval()
        layer(x)
        layer.train()
    return layer(x)


def test_one_rank_may_evaluate_alone(ranks: RankPool) -> None:
    """Evaluation on one rank between training steps neither hangs nor disturbs."""
    first, second = ranks.run(2, _eval_on_rank_0)
    assert torch.equal(first, second)


def _payloads() -> list[tuple[torch.dtype, int]]:
    seen = []
    original = dist.all_reduce

    def recorded(tensor, *args, **kwargs):
        seen.append((tensor.dtype, tensor.numel()))
        return original(tensor, *args, **kwargs)

    dist.all_reduce = recorded
    try:
        x = torch.randn(4, 7, 3).half().requires_grad_()
        syncbn.SyncBatchNorm(7)(x).sum().backward()
    finally:
        dist.all_reduce = original
    return seen


def test_the_wire(ranks: RankPool) -> None:
    """2C + 3 float64 forward and 2C + 2 backward, whatever the input's dtype."""
    assert ranks.run(2, _payloads) == [[(torch.float64, 17), (torch.float64, 16)]] * 2
