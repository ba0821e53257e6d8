"""Who the peers are, and that their sum is everybody's."""

import pytest
import torch
import torch.distributed as dist

from syncbn import comm, groups
from tests.support.ranks import RankPool


def test_alone_means_no_peers() -> None:
    """Without an initialised process group there are no peers and a sum is the identity."""
    sums = torch.randn(3)
    assert groups.peers(None) is None
    assert comm.all_sum(sums, None) is sums


def _one() -> None:
    assert groups.peers(None) is None
    assert groups.peers(dist.group.WORLD) is None


def test_a_group_of_one_has_no_peers(ranks: RankPool) -> None:
    """World size 1 is the same case as no group."""
    ranks.run(1, _one)


def _sum() -> None:
    group = groups.peers(None)
    assert group is dist.group.WORLD
    sums = torch.full((5,), dist.get_rank() + 1.0, dtype=torch.float64)
    assert torch.equal(comm.all_sum(sums, group), torch.full((5,), 6.0, dtype=torch.float64))
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        with pytest.raises(groups.NotAMember):
            groups.peers(pair)
    else:
        assert torch.equal(comm.all_sum(torch.tensor([dist.get_rank()]), groups.peers(pair)), torch.tensor([2]))


def test_the_sum_is_over_the_group(ranks: RankPool) -> None:
    """WORLD is the default; a sub-group sums its members; an outsider is told."""
    ranks.run(3, _sum)


def _largest() -> None:
    group, rank = groups.peers(None), dist.get_rank()
    with torch.device("meta"):  # the default device is not where flags lie
        answer = comm.start_largest((rank, 5 - rank, 0), group, comm.device_of(group))
    assert comm.all_sum(torch.ones(1), group).item() == 3  # while the other is on its way
    assert answer() == answer() == [2, 5, 0]
    assert comm.device_of(group, torch.device("cuda:1")) == torch.device("cuda:1")
    assert comm.from_rank({"a": rank}, 1, group, comm.device_of(group)) == {"a": 1}


def test_the_largest_of_all_ranks(ranks: RankPool) -> None:
    """What was started is read later, as often as one likes; a rank's object reaches all."""
    ranks.run(3, _largest)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_nobody_waits_for_the_main_stream() -> None:
    """Under NCCL the answer is read while work that was queued before it still runs."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        device = comm.device_of(group)
        assert device == torch.device("cuda", torch.cuda.current_device())
        assert comm.start_largest((1, 2, 3), group, device)() == [1, 2, 3]  # the communicator is made
        torch.cuda._sleep(2_000_000_000)  # about a second
        busy = torch.cuda.Event()
        busy.record()
        assert comm.start_largest((4, 5, 6), group, device)() == [4, 5, 6]
        assert not busy.query()
    finally:
        dist.destroy_process_group()
