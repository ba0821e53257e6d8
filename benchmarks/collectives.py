"""Counting the collectives of one rank of a process group that moves nothing."""

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = dict.fromkeys(("allreduce_", "all_reduce", "all_reduce_"), "all_reduce")
KINDS |= dict.fromkeys(("_allgather_base_", "all_gather_into_tensor"), "all_gather")
"""Operations of the c10d and _c10d_functional namespaces that these schemes may issue."""
SILENT = ("wait_tensor",)


class Collective(NamedTuple):
    """One collective as this rank issued it; payload in bytes."""

    kind: str
    payload: int

    def ring_received(self, world_size: int) -> float:
        """Bytes arriving at one rank."""
        steps = world_size - 1
        return steps * self.payload * (2 / world_size if self.kind == "all_reduce" else 1)


class Recorder(TorchDispatchMode):
    """Every collective issued inside the block, whichever way it was called; an unknown one is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            name = func._schema.name.rpartition("::")[2]
            if name not in SILENT:
                self.collectives.append(Collective(KINDS[name], _payload(name, args)))
            if name == "_allgather_base_":  # torch's output is (1, n·size), which the fake group fails to split
                args = (args[0].view(-1), *args[1:])
        return func(*args, **(kwargs or {}))


def _payload(name: str, args: Any) -> int:
    """Bytes of the rank's own contribution: c10d's all_gather names its output first."""
    given = args[1] if name == "_allgather_base_" else args[0]
    tensors = given if isinstance(given, list | tuple) else [given]
    return sum(t.numel() * t.element_size() for t in tensors)


@contextlib.contextmanager
def fake_world(world_size: int) -> Iterator[None]:
    """Be rank 0 of a default process group of this size."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()
