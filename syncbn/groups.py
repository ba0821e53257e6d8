"""Who the other ranks are: process groups by scope, by their ranks, and after their end.

No process group, an uninitialised one and a group of one are the same case: there are no peers.
torch forgets the ranks of a group that `dist.destroy_process_group` ends. Those of groups that layers were given are
remembered here, so that such a layer can be saved and reported on still, and an error can say which group it was.
"""

import os
import weakref

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from syncbn import torch_private

Group = ProcessGroup | DeviceMesh
"""What a process_group argument may be; a mesh must have one dimension."""

_made: dict[tuple[ProcessGroup, int], ProcessGroup] = {}
"""What `new_group` made, by default group and size."""
_ranks: dict[int, tuple[weakref.ref[Group], tuple[int, ...]]] = {}
"""Those that `ranks_of` gave, by the id of a group or mesh: meshes of one process group are equal to those of the next.
"""


class Unusual(Exception):
    """A process group that may not be synchronised over, or not now."""


class NotAMember(Unusual):
    """This rank is not in the group; if torch gave only a sign of that, ranks are those of the newest without it."""

    def __init__(self, rank: int, ranks: tuple[int, ...], is_sure: bool) -> None:
        self.rank, self.ranks, self.is_sure = rank, ranks, is_sure


class Destroyed(Unusual):
    """A group that torch does not know any more, or never did; ranks may be empty, not known."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        self.ranks = ranks


def peers(process_group: Group | None) -> ProcessGroup | None:
    """The group to reduce over, None when this rank is alone; None as argument is WORLD, looked up now."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    if isinstance(process_group, DeviceMesh):
        if process_group.get_coordinate() is None:
            raise NotAMember(dist.get_rank(), _ranks_of_mesh(process_group), is_sure=True)
        process_group = _group_of_mesh(process_group)
    group = dist.group.WORLD if process_group is None else process_group
    assert group is not None, "initialised"
    try:
        rank_in_group = dist.get_rank(group)
    except (TypeError, ValueError):  # torch has no such group
        rank_in_group = None
    if rank_in_group is None:  # not raised above, since the compiler of torch 2.11 cannot trace `from None`
        raise Destroyed(() if torch.compiler.is_compiling() else ranks_of(group) or ())
    if rank_in_group < 0:
        raise NotAMember(dist.get_rank(), _registered(group) or (), is_sure=False)
    return group if dist.get_world_size(group) > 1 else None


def _group_of_mesh(mesh: DeviceMesh) -> ProcessGroup:
    """Looked up by name, which a group of other ranks may have after a new init_process_group."""
    ranks = () if torch.compiler.is_compiling() else _ranks_of_mesh(mesh)
    try:
        group = mesh.get_group()
    except RuntimeError:
        raise Destroyed(ranks) from None
    if ranks and sorted(_registered(group) or ()) != sorted(ranks):
        raise Destroyed(ranks)
    return group


def _registered(group: ProcessGroup) -> tuple[int, ...] | None:
    """The ranks that torch has for a group, in order; None if it does not know it."""
    try:
        return tuple(dist.get_process_group_ranks(group))
    except (KeyError, TypeError, ValueError):
        return None


def usual_peers(process_group: Group | None) -> ProcessGroup | None:
    """`peers`, or Unusual where `checks.check_group` has something to say."""
    if process_group is not None and not (is_group(process_group) and dimensions_of(process_group) == 1):
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


def is_group(given: object) -> bool:
    """A process group, a mesh, or what torch gives a rank outside of the group in its place."""
    return isinstance(given, Group) or _is_of_others(given)


def _is_of_others(given: object) -> bool:
    return isinstance(given, int) and given == dist.GroupMember.NON_GROUP_MEMBER


def ranks_of(process_group: Group | None) -> tuple[int, ...] | None:
    """The global ranks of a group, which can be saved; None for None. Once asked for, they outlive the group.

    () for what torch gives a rank that is in none of the ranks' groups, which says no more.
    """
    if process_group is None:
        return None
    if isinstance(process_group, DeviceMesh):
        return _ranks_of_mesh(process_group)
    if _is_of_others(process_group):
        return ()
    known = _remembered(process_group)
    if known is None and (ranks := _registered(process_group)) is not None:
        known = _remember(process_group, ranks)
    return known or ()


def is_destroyed(process_group: Group | None) -> bool:
    """Whether torch has no such group any more."""
    if process_group is None or _is_of_others(process_group):
        return False
    if isinstance(process_group, ProcessGroup):
        return _registered(process_group) is None
    try:
        if process_group.get_coordinate() is not None:
            _group_of_mesh(process_group)
    except Destroyed:
        return True
    return False


def _ranks_of_mesh(mesh: DeviceMesh) -> tuple[int, ...]:
    """Known on ranks outside of it, too, which have no group of it. As first asked for: torch tells a part of a mesh by
    the rank that this process has now.
    """
    return _remembered(mesh) or _remember(mesh, tuple(sorted(mesh.mesh.flatten().tolist())))


def _remember(given: Group, ranks: tuple[int, ...]) -> tuple[int, ...]:
    key = id(given)
    _ranks[key] = weakref.ref(given, lambda _: _ranks.pop(key, None)), ranks
    return ranks


def _remembered(given: Group) -> tuple[int, ...] | None:
    kept = _ranks.get(id(given))
    return None if kept is None or kept[0]() is not given else kept[1]


def group_of(ranks: tuple[int, ...] | None) -> ProcessGroup | None:
    """The group of exactly these ranks, if this process has made it by `new_group` or it is the default one."""
    if ranks is None or not (dist.is_available() and dist.is_initialized()):
        return None
    world = dist.group.WORLD
    known = [world, *(group for (of, _), group in _made.items() if of is world)]
    found = next((group for group in known if group is not None and _registered(group) == ranks), None)
    ranks_of(found)
    return found


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

    With groups smaller than the world, running statistics are a group's own. DistributedDataParallel, unless
    ``broadcast_buffers=False``, gives all ranks those of rank 0 before each step, and ``torch.distributed.checkpoint``
    saves each tensor as one of the ranks has it, which all ranks load. `syncbn.synchronize_statistics` before saving
    or evaluating gives all ranks the mixture; to go on exactly, save each group's state under a key of its own.

    The first call with a size is a collective of all ranks; the same call later returns the same group, until
    dist.destroy_process_group has ended it, which all ranks must do alike.
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
    if (world, size) not in _made or is_destroyed(_made[world, size]):
        for start in range(0, world_size, size):
            group = dist.new_group(list(range(start, start + size)))
            if start <= dist.get_rank() < start + size:
                _made[world, size] = group
    return _made[world, size]


def world() -> ProcessGroup | None:
    """The default group, if there is one."""
    return dist.group.WORLD if dist.is_available() and dist.is_initialized() else None


def rank(group: ProcessGroup | None = None) -> int:
    """Of this process in the group, or the default one."""
    return dist.get_rank(group)


def size_of(group: ProcessGroup | None) -> int:
    """How many ranks; alone, one."""
    return 1 if group is None else dist.get_world_size(group)


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
