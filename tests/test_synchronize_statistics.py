"""synchronize_statistics: the mixture of the ranks' distributions, on all ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from tests.support.oracle import UNIT, error
from tests.support.ranks import Collectives, RankPool


def net_of(rank: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Statistics of its own on each rank."""
    generator = torch.Generator().manual_seed(rank)
    net = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm1d(3)).to(dtype)
    for layer in (net[0], net[2]):
        layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator) * 3)
        layer.running_var.copy_(torch.rand(layer.num_features, generator=generator) + 0.1)
    return net


def _synchronized(dtype: torch.dtype) -> tuple[dict[str, Tensor], dict[str, int], int]:
    net = net_of(dist.get_rank(), dtype)
    with Collectives() as collectives:
        said = syncbn.synchronize_statistics(net)
    return net.state_dict(), said.counts, collectives.count


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_it_is_the_mixture(ranks: RankPool, world: int, dtype: torch.dtype) -> None:
    """Mean of means, and mean of variances plus variance of means; the same bits everywhere; one sum."""
    outcomes = ranks.run(world, _synchronized, dtype)
    states = [net_of(rank, dtype).state_dict() for rank in range(world)]
    for name in ("0", "2"):
        means = torch.stack([state[f"{name}.running_mean"] for state in states]).double()
        variances = torch.stack([state[f"{name}.running_var"] for state in states]).double()
        right = variances.mean(0) + means.var(0, correction=0)
        for state, counts, collectives in outcomes:
            bound = 4 * UNIT[dtype] if dtype == torch.float32 else 1e-14
            assert error(state[f"{name}.running_mean"], means.mean(0)) <= bound
            assert error(state[f"{name}.running_var"], right) <= bound
            assert torch.equal(state[f"{name}.running_var"], outcomes[0][0][f"{name}.running_var"])
            assert counts == {"0": world, "2": world}
            assert collectives == (2 if world > 1 else 0)


def _agreeing() -> bool:
    net = net_of(7, torch.float32)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    syncbn.synchronize_statistics(net)
    return all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_ranks_that_agree_keep_their_bits(ranks: RankPool) -> None:
    """Once more changes nothing."""
    assert all(ranks.run(3, _agreeing))


def _with_nan() -> str:
    net = net_of(dist.get_rank())
    if dist.get_rank() == 1:
        net[2].running_var[1] = float("inf")
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(ValueError, match="Statistics must be finite") as caught:
        syncbn.synchronize_statistics(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    return str(caught.value)


def test_what_is_not_finite_is_refused(ranks: RankPool) -> None:
    """On all ranks, with the layer and the channel; no layer has changed."""
    for text in ranks.run(2, _with_nan):
        assert "in channel 1 for '2'" in text


def test_wrong_arguments() -> None:
    """No module, no layer, a lazy one."""
    with pytest.raises(TypeError, match="model must be a module; got int"):
        syncbn.synchronize_statistics(3)
    with pytest.raises(ValueError, match="batch norms are synchronized; got a model with none"):
        syncbn.synchronize_statistics(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="which is lazy"):
        syncbn.synchronize_statistics(nn.LazyBatchNorm2d())
