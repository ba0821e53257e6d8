"""Real gloo ranks, kept alive for the whole test session.

A pool is `LIMIT` processes; a job runs one function on the first `world_size` of them, in a default process group of
exactly that size.
A rank's exception is the test's failure, with its traceback; after one the processes are replaced.
"""

import datetime
import multiprocessing
import pickle
import shutil
import tempfile
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIMIT = 4
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=20)
JOB_TIMEOUT = 120.0
"""Seconds; above the collective's, so that a hang is reported by the rank that knows where it hangs."""


class RankError(AssertionError):
    """One or more ranks raised; the text holds their tracebacks."""


class RankPool:
    """`run(world_size, fn, *args)` is fn(*args) on ranks 0 … world_size − 1; the results, in rank order."""

    def __init__(self) -> None:
        self._ranks: list[tuple[Any, Connection]] = []
        self._folder = Path()
        self._groups = self._world_size = 0

    def run(self, world_size: int, fn: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._ranks:
            self._ranks = [_start(rank) for rank in range(LIMIT)]
            self._folder = Path(tempfile.mkdtemp(prefix="syncbn-ranks-"))
            self._world_size = 0
        if world_size != self._world_size:
            self._groups += 1
            self._world_size = world_size
        store = str(self._folder / f"store-{self._groups}")
        job = pickle.dumps((world_size, store, fn, args))
        for _, connection in self._ranks[:world_size]:
            connection.send_bytes(job)
        outcomes = [_receive(rank, connection) for rank, (_, connection) in enumerate(self._ranks[:world_size])]
        failures = [f"rank {rank}:\n{text}" for rank, (ok, text) in enumerate(outcomes) if not ok]
        if failures:
            self.close()
            raise RankError("\n".join(failures))
        return [result for _, result in outcomes]

    def close(self) -> None:
        """Stop the processes; the next job starts new ones."""
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        if self._ranks:
            shutil.rmtree(self._folder)
        self._ranks = []


class Collectives:
    """Within it, the collectives that this rank starts on the default group; the group counts them itself, so that
    none escapes, whether Python, a compiled graph or the autograd engine starts it.
    """

    def __enter__(self) -> "Collectives":
        self._before = _started()
        return self

    def __exit__(self, *_: object) -> None:
        self.count = _started() - self._before


def _started() -> int:
    return dist.group.WORLD._get_sequence_number_for_group() if dist.is_initialized() else 0


def _start(rank: int) -> tuple[Any, Connection]:
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(rank, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _receive(rank: int, connection: Connection) -> tuple[bool, Any]:
    try:
        if connection.poll(JOB_TIMEOUT):
            ok, result = pickle.loads(connection.recv_bytes())
            return bool(ok), result
        return False, f"no answer within {JOB_TIMEOUT:.0f} s"
    except EOFError:
        return False, "the process died"


def _serve(rank: int, connection: Connection) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    joined = ""
    while True:
        try:
            world_size, store, fn, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            if joined != store:
                if dist.is_initialized():
                    dist.destroy_process_group()
                dist.init_process_group(
                    "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT
                )
                joined = store
            answer: tuple[bool, Any] = (True, fn(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
