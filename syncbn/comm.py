"""Everything that is sent to other ranks: one sum over them, above all. Who they are is in groups.py.

A layer needs two things of a transport, `all_sum` in place and `functional_sum`, which a compiler can write down.
"""

import contextlib
import datetime
import functools
import os
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from syncbn import torch_private

_sides: "weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup]" = weakref.WeakKeyDictionary()
"""What `side_group` made."""


def all_sum(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `peers`' answer, in place; every rank gets the same bits."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


def functional_sum(sums: Tensor, group_name: str, group: ProcessGroup | None = None) -> Tensor:
    """`all_sum` into a new tensor, by operations that can be traced; group is given where it is not being traced."""
    if not torch_private.can_trace_sums and group is not None:
        return all_sum(sums.clone(), group)
    return torch_private.wait_tensor(torch_private.all_reduce(sums.contiguous(), "sum", group_name))


def device_of(group: ProcessGroup, given: torch.device | None = None) -> torch.device:
    """Where what the group sums lies: as given, or on the CPU; where the transport takes none there, on this rank's."""
    transports = dist.get_backend_config(group)  # "cuda:nccl", "cpu:gloo,cuda:nccl"
    device = given or torch.device("cpu" if "cpu:" in transports else transports.split(":")[0])
    if device.type == "cpu" or device.index is not None:
        return device
    bound = group.bound_device_id  # by init_process_group(device_id=…)
    is_bound = bound is not None and bound.type == device.type
    return bound if is_bound else torch.device(device.type, torch.get_device_module(device).current_device())


def start_largest(numbers: Sequence[int], group: ProcessGroup, device: torch.device) -> Callable[[], list[int]]:
    """The largest of the ranks' numbers, place by place; started now, waited for by calling what is returned.

    On a GPU on a stream of its own, so that reading waits for no work but the group's earlier collectives.
    """
    ours = torch.tensor(numbers, device="cpu")  # whatever the default device
    if device.type == "cpu":
        work = dist.all_reduce(ours, dist.ReduceOp.MAX, group=group, async_op=True)
        return functools.partial(_read, work.wait, ours)
    runtime = torch.get_device_module(device)
    with runtime.stream(_side_stream(device)):
        theirs = ours.pin_memory().to(device, non_blocking=True)
        dist.all_reduce(theirs, dist.ReduceOp.MAX, group=group, async_op=True).wait()  # the stream waits, the host not
        answer = torch.empty_like(ours, pin_memory=True).copy_(theirs, non_blocking=True)
        arrived = runtime.Event()
        arrived.record()
    return functools.partial(_read, arrived.synchronize, answer)


def _read(wait: Callable[[], Any], answer: Tensor) -> list[int]:
    wait()
    return answer.tolist()


@functools.cache
def _side_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(device)


def from_rank(sent: Any, rank: int, group: ProcessGroup, device: torch.device) -> Any:
    """What the rank of that number in the group sends to all; it is pickled."""
    box = [sent]
    dist.broadcast_object_list(box, group=group, device=device, group_src=rank)
    return box[0]


def from_all(sent: Any, group: ProcessGroup) -> list[Any]:
    """What each rank of the group sends; it is pickled."""
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, sent, group=group)
    return box


@contextlib.contextmanager
def joined(device_type: str | None = None) -> Iterator[tuple[int, int, torch.device, str]]:
    """rank, world size, device and transport of the group that torchrun's environment describes; alone without one."""
    local_rank, local_size = (int(os.environ.get(k, d)) for k, d in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= local_size
    if device_type is None:
        device_type = "cuda" if enough else "cpu"
    device = torch.device("cpu")
    if device_type == "cuda":
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        yield 0, 1, device, "none, this process is alone"
        return
    transport = "nccl" if device_type == "cuda" and enough else "gloo"
    dist.init_process_group(transport)
    try:
        yield dist.get_rank(), dist.get_world_size(), device, transport
    finally:
        dist.destroy_process_group()


def progress_of(group: ProcessGroup) -> int:
    """How many collectives of any kind this rank has started on the group; 0 if its transport does not count."""
    return torch_private.collectives_started(group)


def own_store(prefix: str) -> Any:
    """A connection to the default group's store that is nobody else's."""
    store: Any = torch_private.default_store()
    store = store.clone()
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # torch exports it


def side_group(group: ProcessGroup, seconds: float) -> ProcessGroup:
    """A gloo group of the same ranks, made once, by its members alone, for messages between hosts."""
    side = _sides.get(group)
    if side is None:
        timeout = datetime.timedelta(seconds=seconds) if seconds else None
        ranks = dist.get_process_group_ranks(group)
        side = _sides[group] = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
    return side
