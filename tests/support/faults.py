"""Ranks with a fault: fresh processes that may hang, raise, abort or be killed, and what each of them said.

A fault is a function of this file or of a test's, called on every rank with its `Run`. Processes are forked from a
server that has loaded torch, and nothing of a run outlives it.
"""

import datetime
import logging
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

PATIENCE = 1.5
WITHIN = PATIENCE + 5
"""What a fault may take until every living rank has an error or a report."""
TIMEOUT = datetime.timedelta(seconds=60)
CHANNELS = {"first": 4, "second": 4, "third": 6}
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["torch", "torch.distributed", "syncbn", "tests.support.faults"])


class Run(NamedTuple):
    """What a fault is given: this rank among world, and a net of three layers, two of one size."""

    rank: int
    world: int
    net: nn.Module

    def x(self, channels: int = 4) -> Tensor:
        generator = torch.Generator().manual_seed(self.rank)
        return torch.randn(3, channels, 2, 2, generator=generator, requires_grad=True)

    def call(self, name: str, x: Tensor | None = None) -> Tensor:
        """A training call of one layer."""
        layer = self.net.get_submodule(name)
        return layer(self.x(CHANNELS[name]) if x is None else x)

    def step(self) -> None:
        """Forward and backward through all three layers."""
        sum(self.call(name).square().sum() for name in CHANNELS).backward()


class Said(NamedTuple):
    """What a rank left: its error or None, its log with times, its exit, when it was done, and its buffers."""

    error: str | None
    log: list[tuple[float, str]]
    exit: int | None
    seconds: float
    before: dict[str, Tensor]
    buffers: dict[str, Tensor]
    is_done: bool

    def text(self) -> str:
        """All its words."""
        return "\n".join([*(line for _, line in self.log), self.error or ""])

    def spoke_within(self, seconds: float) -> bool:
        """Whether its error or first report came so early."""
        times = [at for at, _ in self.log] + ([self.seconds] if self.error else [])
        return bool(times) and min(times) <= seconds


def named(said: Said, *words: str) -> None:
    """The rank spoke in time and in these words."""
    assert said.spoke_within(WITHIN), said
    for word in words:
        assert word in said.text(), said.text()


def unmoved(faulty: list[Said]) -> None:
    """Nobody's buffers have moved."""
    for said in faulty:
        assert said.before
        assert all(buffer.equal(said.before[name]) for name, buffer in said.buffers.items())


def net() -> nn.Module:
    layers = {name: nn.BatchNorm2d(channels) for name, channels in CHANNELS.items()}
    return syncbn.convert_sync_batchnorm(nn.ModuleDict(layers))


def strike(
    fault: Callable[[Run], None],
    world: int = 2,
    *,
    until: Sequence[int] | None = None,
    store: str = "tcp",
    within: float = 20.0,
    timeout: datetime.timedelta = TIMEOUT,
    **environment: str,
) -> list[Said]:
    """fault on every rank of a group, until all are done, or the ranks of `until` have said something, or `within`
    seconds are over; then what lives is killed.
    """
    with tempfile.TemporaryDirectory(prefix="syncbn-faults-") as folder:
        address = f"file://{folder}/store" if store == "file" else f"tcp://127.0.0.1:{_free_port()}"
        given = {"SYNCBN_WATCH": str(PATIENCE), **environment}
        ranks = [_start(fault, rank, world, address, timeout, given) for rank in range(world)]
        unended = {connection: rank for rank, (_, connection) in enumerate(ranks)}
        said = _listen(unended, until, within)
        for rank, (process, connection) in enumerate(ranks):
            is_ending = said[rank].is_done or connection not in unended  # an abort closes it before the exit is known
            process.join(10 if is_ending else 0)
            said[rank] = said[rank]._replace(exit=process.exitcode)
            process.kill()
            process.join()
        return said


def _listen(connections: dict[Connection, int], until: Sequence[int] | None, within: float) -> list[Said]:
    """What the ranks say; of the connections those stay that are still open."""
    said = [Said(None, [], None, 0.0, {}, {}, False) for _ in connections]
    end = time.monotonic() + within
    while connections and (left := end - time.monotonic()) > 0:
        for connection in wait(list(connections), left):
            rank = connections[connection]
            try:
                kind, at, what = pickle.loads(connection.recv_bytes())
            except (EOFError, OSError):
                del connections[connection]
                continue
            if kind == "log":
                said[rank].log.append((at, what))
            else:
                said[rank] = said[rank]._replace(
                    seconds=at, error=what[0], before=what[1], buffers=what[2], is_done=True
                )
        if until is not None and all(said[rank].log or said[rank].is_done for rank in until):
            break
    return said


def _start(fault: Any, rank: int, world: int, address: str, timeout: Any, given: dict[str, str]) -> Any:
    ours, theirs = _server.Pipe(duplex=False)
    process = _server.Process(target=_live, args=(fault, rank, world, address, timeout, given, theirs))
    process.start()
    theirs.close()
    return process, ours


def _send(connection: Connection, kind: str, began: float, what: Any) -> None:
    connection.send_bytes(pickle.dumps((kind, time.monotonic() - began, what)))


class _Sender(logging.Handler):
    def __init__(self, connection: Connection, began: float) -> None:
        super().__init__(logging.WARNING)
        self.connection, self.began = connection, began

    def emit(self, record: logging.LogRecord) -> None:
        _send(self.connection, "log", self.began, record.getMessage())


def _live(
    fault: Any, rank: int, world: int, address: str, timeout: Any, given: dict[str, str], connection: Connection
) -> None:
    os.environ.update(given)
    torch.set_num_threads(1)
    model = net()
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world, timeout=timeout)
    run = Run(rank, world, model)
    run.step()  # one that is well: all have met
    dist.barrier()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    began = time.monotonic()
    logging.getLogger("syncbn").addHandler(_Sender(connection, began))
    error = None
    try:
        fault(run)
    except BaseException:
        error = traceback.format_exc()
    _send(connection, "done", began, (error, before, dict(model.named_buffers())))
    connection.close()
    if error is not None:
        raise SystemExit(1)
    if dist.is_initialized():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
