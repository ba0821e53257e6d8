"""A process of its own with its own Triton: how Triton runs is decided by the environment when it is imported."""

import multiprocessing
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

JOB_TIMEOUT = 120.0


class TritonProcess:
    """`run(fn, *args)` is fn(*args) in that process; what it raises is raised here, with its traceback.

    begin, if any, runs there first.
    """

    def __init__(self, environment: dict[str, str], begin: Callable[[], None] | None = None) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        self._process = spawn.Process(target=_serve, args=(theirs, begin), daemon=True)
        before = {name: os.environ.get(name) for name in environment}
        os.environ.update(environment)
        try:
            self._process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value
        theirs.close()

    def run(self, fn: Callable[..., Any], *args: Any) -> Any:
        self._connection.send_bytes(pickle.dumps((fn, args)))
        if not self._connection.poll(JOB_TIMEOUT):
            raise AssertionError(f"no answer within {JOB_TIMEOUT:.0f} s")
        ok, answer = pickle.loads(self._connection.recv_bytes())
        if not ok:
            raise AssertionError(answer)
        return answer

    def close(self) -> None:
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection, begin: Callable[[], None] | None) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    if begin is not None:
        begin()
    while True:
        try:
            fn, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        torch.manual_seed(0)
        try:
            answer: tuple[bool, Any] = (True, fn(*args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(pickle.dumps(answer))
