"""Fixtures shared by all test files."""

from collections.abc import Iterator

import pytest
import torch

from tests.support.ranks import RankPool

torch.set_num_threads(1)

LONG = (
    *("gpu_interpreter", "benchmarks_gpu_sh", "compile_training", "restarts", "gpu_compile", "launch", "train"),
    *("compile", "watch", "benchmarks_scripts", "gpu_budget", "integrations", "double_backward", "bad_inputs"),
    *("tracing", "examples", "torch_private", "faults", "support_ranks", "eps_and_momentum"),
    *("benchmarks_resilience", "selfcheck"),
)
"""Files that take longest, in that order."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those first: a worker takes whole files, and one that came last would be waited for by all."""
    turns = {f"test_{name}": turn for turn, name in enumerate(LONG)}
    items.sort(key=lambda item: turns.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """This worker's pool of gloo ranks."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
