"""Everything that talks to other ranks: who they are, and one sum over them. The only user of torch.distributed.

A layer needs two things of a transport, `all_sum` in place and `functional_sum`, which a compiler can write down.
No process group, an uninitialised one and a group of one are the same case: there are no peers.
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
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from syncbn import torch_private

Group = ProcessGroup | DeviceMesh
"""What a process_group argument may be; a mesh must have one dimension."""

_made: dict[tuple[ProcessGroup, int], ProcessGroup] = {}
"""What `new_group` made, by default group and size."""
_sides: "weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup]" = weakref.WeakKeyDictionary()
"""What `side_group` made."""


class Unusual(Exception):
    """A process group that may not be synchronised over, or not now."""


class NotAMember(Unusual):
    """This rank is not in the group; if torch gave only a sign of that, ranks are those of the newest without it."""

    def __init__(self, rank: int, ranks: list[int], is_sure: bool) -> None:
        self.rank, self.ranks, self.is_sure = rank, ranks, is_sure


def peers(process_group: Group | None) -> ProcessGroup | None:
    """The group to reduce over, None when this rank is alone; None as argument is WORLD, looked up now."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(process_group, DeviceMesh):
        if process_group.get_coordinate() is None:
            raise NotAMember(dist.get_rank(), _ranks_of_mesh(process_group), is_sure=True)
        process_group = process_group.get_group()
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None, "initialised"
    if dist.get_rank(group) < 0:
        raise NotAMember(dist.get_rank(), dist.get_process_group_ranks(group), is_sure=False)
    return group if dist.get_world_size(group) > 1 else None


def usual_peers(process_group: Group | None) -> ProcessGroup | None:
    """`peers`, or Unusual where `checks.check_group` has something to say."""
    if dimensions_of(process_group) != 1:
        raise Unusual
    group = peers(process_group)
    if group is not None and is_joining():
        raise Unusual
    return group


def dimensions_of(process_group: Group | None) -> int:
    """Of a mesh; a group is a line."""
    return process_group.ndim if isinstance(process_group, DeviceMesh) else 1


def name_of(group: ProcessGroup | None) -> str | None:
    """The group as a tracer can hold it."""
    return None if group is None else group.group_name


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


def is_group(given: object) -> bool:
    """A process group, a mesh, or what torch gives a rank outside of the group in its place."""
    return isinstance(given, Group) or (isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER)


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


def new_group(scope: int | str) -> ProcessGroup | None:
    """The process group of this rank among groups of consecutive ranks, for `process_group`.

    Args:
        scope: k for every k ranks, "node" for the ranks of each machine, "world" for all. In statistics, about 128
            samples in a group are enough; within a node they travel fastest.

    Returns:
        The group this rank belongs to; None, which a layer takes as all there is, if no process group is initialised.

    Raises:
        ValueError: if k does not divide the number of ranks, on every rank alike.
        RuntimeError: for "node" without torchrun's LOCAL_WORLD_SIZE.

    The first call with a size is a collective of all ranks; the same call later returns the same group.
    """
    if not (isinstance(scope, int) and not isinstance(scope, bool) and scope > 0) and scope not in ("node", "world"):
        raise ValueError(f"A scope is a positive number of ranks, 'node' or 'world'; got {scope!r}. Pass e.g. 4.")
    if not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    assert world is not None, "initialised"
    world_size = dist.get_world_size()
    if scope == "node" and "LOCAL_WORLD_SIZE" not in os.environ:
        raise RuntimeError(
            "The number of ranks on a node is taken from LOCAL_WORLD_SIZE; it is not set. "
            "Start with torchrun, or pass that number as the scope."
        )
    size = {"world": world_size, "node": int(os.environ.get("LOCAL_WORLD_SIZE", 1))}.get(str(scope)) or int(scope)
    if world_size % size:
        raise ValueError(
            f"Groups of equal size must divide the ranks; got groups of {size} for {world_size} ranks. "
            f"Take a divisor of {world_size}."
        )
    if size == world_size:
        return world
    if (world, size) not in _made:
        for start in range(0, world_size, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= dist.get_rank() < start + size:
                _made[world, size] = group
    return _made[world, size]


def ranks_of(process_group: Group | None) -> tuple[int, ...] | None:
    """The global ranks of a group, which can be saved; None for None.

    () for what torch gives a rank that is in none of the ranks' groups, which says no more.
    """
    if process_group is None:
        return None
    if isinstance(process_group, DeviceMesh) and process_group.get_coordinate() is None:
        return tuple(_ranks_of_mesh(process_group))
    if process_group == dist.GroupMember.NON_GROUP_MEMBER:
        return ()
    group = process_group.get_group() if isinstance(process_group, DeviceMesh) else process_group
    return tuple(dist.get_process_group_ranks(group))


def _ranks_of_mesh(mesh: DeviceMesh) -> list[int]:
    """Known on ranks outside of it, too, which have no group of it."""
    ranks: list[int] = mesh.mesh.flatten().tolist()
    return ranks


def group_of(ranks: tuple[int, ...] | None) -> ProcessGroup | None:
    """The group of exactly these ranks, if this process has made it by `new_group` or it is the default one."""
    if ranks is None or not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    known = [world, *(group for (of, _), group in _made.items() if of is world)]
    return next((group for group in known if ranks_of(group) == ranks), None)


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


def world() -> ProcessGroup | None:
    """The default group, if there is one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def rank(group: ProcessGroup | None = None) -> int:
    """Of this process in the group, or the default one."""
    return dist.get_rank(group)


def progress_of(group: ProcessGroup) -> int:
    """How many collectives of any kind this rank has started on the group; 0 if its transport does not count."""
    return torch_private.collectives_started(group)


def own_store(prefix: str) -> Any:
    """A connection to the default group's store that is nobody else's."""
    store: Any = torch_private.default_store()
    store = store.clone()
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # torch exports it


def without_ddp(module: nn.Module) -> nn.Module:
    """The model in a DistributedDataParallel, compiled or not, whose own forward sends buffers to the other ranks."""
    inner = torch_private.uncompiled(module)
    return inner.module if isinstance(inner, DistributedDataParallel) else module


def active_ddp() -> DistributedDataParallel | None:
    """Whose forward is running."""
    active: DistributedDataParallel | None = torch_private.active_ddp(DistributedDataParallel)
    return active


def is_joining() -> bool:
    """Whether this call is within a DistributedDataParallel whose `join()` is in force."""
    ddp = active_ddp()
    return ddp is not None and torch_private.is_joining(ddp)


def size_of(group: ProcessGroup | None) -> int:
    """How many ranks; alone, one."""
    return 1 if group is None else dist.get_world_size(group)


def side_group(group: ProcessGroup, seconds: float) -> ProcessGroup:
    """A gloo group of the same ranks, made once, by its members alone, for messages between hosts."""
    side = _sides.get(group)
    if side is None:
        timeout = datetime.timedelta(seconds=seconds) if seconds else None
        ranks = dist.get_process_group_ranks(group)
        side = _sides[group] = dist.new_group(ranks, timeout, "gloo", use_local_synchronization=True)
    return side
