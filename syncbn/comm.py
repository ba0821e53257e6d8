"""Everything that talks to other ranks: who they are, and one sum over them. The only user of torch.distributed.

No process group, an uninitialised one and a group of one are the same case: there are no peers.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


class NotAMember(Exception):
    """This rank does not belong to the process group it was asked to synchronise over."""


def peers(process_group: ProcessGroup | None) -> ProcessGroup | None:
    """The group to reduce over, None when this rank is alone; None as argument is WORLD, looked up now."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if process_group is None else process_group
    if group is None or dist.get_rank(group) < 0:
        raise NotAMember
    return group if dist.get_world_size(group) > 1 else None


def all_sum(sums: Tensor, group: ProcessGroup | None) -> Tensor:
    """The sum over the ranks of `peers`' answer, in place; every rank gets the same bits."""
    if group is not None:
        dist.all_reduce(sums, group=group)
    return sums


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
