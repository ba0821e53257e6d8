"""Who the peers are, and that their sum is everybody's."""

import pytest
import torch
import torch.distributed as dist

from syncbn import comm
from tests.ranks import RankPool


def test_alone_means_no_peers() -> None:
    """Without an initialised process group there are no peers and a sum is the identity."""
    sums = torch.randn(3)
    assert comm.peers(None) is None
    assert comm.all_sum(sums, None) is sums


def _one() -> None:
    assert comm.peers(None) is None
    assert comm.peers(dist.group.WORLD) is None


def test_a_group_of_one_has_no_peers(ranks: RankPool) -> None:
    """World size 1 is the same case as no group."""
    ranks.run(1, _one)


def _sum() -> None:
    group = comm.peers(None)
    assert group is dist.group.WORLD
    sums = torch.full((5,), dist.get_rank() + 1.0, dtype=torch.float64)
    assert torch.equal(comm.all_sum(sums, group), torch.full((5,), 6.0, dtype=torch.float64))
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        with pytest.raises(comm.NotAMember):
            comm.peers(pair)
    else:
        assert torch.equal(comm.all_sum(torch.tensor([dist.get_rank()]), comm.peers(pair)), torch.tensor([2]))


def test_the_sum_is_over_the_group(ranks: RankPool) -> None:
    """WORLD is the default; a sub-group sums its members; an outsider is told."""
    ranks.run(3, _sum)
