"""Which rank this process is, on which device, and how it ends when something is wrong."""

import os
import platform
import sys
import time
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist


class Rank(NamedTuple):
    """This process among world others; backend is None when no launcher started it, and then there is no group."""

    rank: int
    world: int
    backend: str | None
    device: torch.device


def join() -> Rank:
    """Join the group that torchrun's variables describe: nccl when every rank of the node has a GPU, else gloo."""
    local_rank, local_world = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    launched = "RANK" in os.environ
    cuda = torch.cuda.device_count() >= local_world and (dist.is_nccl_available() or not launched)
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not launched:
        return Rank(0, 1, None, device)
    backend = "nccl" if cuda else "gloo"
    dist.init_process_group(backend, device_id=device if cuda else None)
    return Rank(dist.get_rank(), dist.get_world_size(), backend, device)


def leave() -> NoReturn:
    """End the group and the process, without the interpreter's own farewell.

    Threads of gloo outlive the group where DistributedDataParallel was used, and one that needs the interpreter while
    that goes down aborts the process after all work is done: seen once in 30 runs (see pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def fail(message: str) -> NoReturn:
    """Exit code 2 and one message per node: what is wrong is wrong on all its ranks, so the first one speaks.

    The launcher ends all ranks as soon as one has ended, so the silent ones wait for that.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(20)
    else:
        print(f"train.py: error: {message}", file=sys.stderr)
    sys.exit(2)


def machine_name(device: torch.device) -> str:
    """What a results row names: the GPU, or the processor and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
