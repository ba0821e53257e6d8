"""The CPU library in threads and in processes that fork: right numbers, and nobody waits for ever."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import syncbn
from syncbn.backends import cpu_library
from tests.support.cpu_backends import needs_library

pytestmark = needs_library
SHAPE = (8, 64, 40, 40)
"""Worth three threads."""


def step(seed: int) -> list[Tensor]:
    """A training call of its own layer; the sums are the same bits in any process and thread."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = torch.randn(2, *SHAPE, generator=generator)
    layer = syncbn.SyncBatchNorm(64)
    y = layer(x.requires_grad_())
    return [y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], dy), layer.running_var]


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(map(torch.equal, some, others))


def digest(tensors: list[Tensor]) -> bytes:
    """Of all bits, without an operation of torch: those hang on threads in a fork's child, as torch says of itself."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).digest()


def in_child(right: bytes, connection: Connection) -> None:
    connection.send(digest(step(0)) == right and digest(step(1)) == digest(step(1)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_process_that_forks_after_a_call() -> None:
    """A team of four threads has been at work; the child of a fork has none of them, computes alone, and ends."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        right = step(0)
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(digest(right), there))
        child.start()
        assert here.poll(60), "the child is waiting for threads that it does not have"
        assert here.recv()
        child.join(60)
        assert child.exitcode == 0
        assert same(step(0), right)
    finally:
        torch.set_num_threads(before)


class Steps(Dataset):
    """What a layer gives in a worker of a loader."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> list[Tensor]:
        return step(index)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_workers_of_a_loader() -> None:
    """Forked workers that use a layer, as some datasets do, after the main process did."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        right = [step(index) for index in range(4)]
        loader = DataLoader(Steps(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
        assert all(map(same, loader, right))
    finally:
        torch.set_num_threads(before)


def test_threads_at_once() -> None:
    """Python threads with layers of their own and different numbers of threads: each gets its own, right numbers."""
    right, before = [step(seed) for seed in range(4)], torch.get_num_threads()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(5):
            torch.set_num_threads(1 + (seed + turn) % 4)
            if not same(step(seed), right[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        assert wrong == []
    finally:
        torch.set_num_threads(before)


OPENMP = """
import re, sys, torch, syncbn
torch.set_num_threads({})
x = torch.randn(8, 64, 64, 64)
tasks = lambda: len(__import__("os").listdir("/proc/self/task"))
before = tasks()
syncbn.SyncBatchNorm(64)(x)
after = tasks()
torch.nn.functional.relu(x)  # torch's own threads
maps = open("/proc/self/maps").read()
print(after - before, tasks() - before, len(set(re.findall(r"\\S*/lib(?:g|i)?omp\\S*", maps))))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="there is no /proc to read")
@pytest.mark.parametrize("threads", [1, 3])
def test_the_threads_are_torchs(threads: int) -> None:
    """As many as torch.set_num_threads says, in the one OpenMP library that torch has loaded, with its team."""
    found = cpu_library.library()
    command = [sys.executable, "-c", OPENMP.format(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": "8"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=120)
    ours = threads if found is not None and found.has_threads else 1
    assert done.stdout.split() == [str(ours - 1), str(threads - 1), "1"]


def allocated(layer: torch.nn.Module, x: Tensor) -> int:
    """The most that torch's allocator held at a time in a forward and backward, in bytes."""
    y = None
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        y = layer(x)
        y.backward(torch.ones_like(y))
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events:UserWarning")  # torch 2.11, whatever is recorded
def test_no_more_memory_than_torchs_layer() -> None:
    """A forward and backward hold what nn.BatchNorm2d's does at most, and some numbers for each channel."""
    x = torch.randn(SHAPE, requires_grad=True)
    ours, right = syncbn.SyncBatchNorm(64), torch.nn.BatchNorm2d(64)
    for layer in (ours, right):  # what the first call makes
        layer(x).sum().backward()
        x.grad = None
    most = allocated(right, x)
    x.grad = None
    assert most >= 3 * x.numel() * 4, "y, its gradient and that of x"
    assert allocated(ours, x) <= most + 64 * 100
