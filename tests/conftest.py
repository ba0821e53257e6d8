"""Fixtures shared by all test files."""

from collections.abc import Iterator

import pytest
import torch

from tests.ranks import RankPool

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """This worker's pool of gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
