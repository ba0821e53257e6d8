"""Everything that talks to other ranks: who they are, and one sum over them. The only user of torch.distributed.

No process group, an uninitialised one and a group of one are the same case: there are no peers.
"""

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
