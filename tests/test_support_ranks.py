"""The rank pool itself: results in order, failures with tracebacks, recovery."""

import os

import pytest
import torch.distributed as dist

from tests.support.ranks import RankError, RankPool


def _identity(offset: int) -> int:
    return dist.get_rank() + offset


def _fail_on_one() -> None:
    if dist.get_rank() == 1:
        raise KeyError("the reason")


def _die() -> None:
    os._exit(3)


def test_results_come_in_rank_order_at_any_world_size(ranks: RankPool) -> None:
    """Jobs of changing world sizes run in groups of exactly that size."""
    for world_size in (1, 4, 2, 3):
        assert ranks.run(world_size, _identity, 10) == [10 + rank for rank in range(world_size)]
        assert ranks.run(world_size, dist.get_world_size) == [world_size] * world_size


def test_a_failing_rank_is_the_failure() -> None:
    """The exception holds the failing rank's traceback, and the pool works again afterwards."""
    pool = RankPool()
    try:
        with pytest.raises(RankError, match=r"rank 1:[\s\S]*KeyError: 'the reason'"):
            pool.run(2, _fail_on_one)
        with pytest.raises(RankError, match="the process died"):
            pool.run(1, _die)
        assert pool.run(2, _identity, 0) == [0, 1]
    finally:
        pool.close()
