"""Which rank this process is, on which device, what ranks do together, and how they end when something is wrong."""

import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

T = TypeVar("T")


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
    store, rank, world = next(rendezvous("env://"))
    if "STORE_PER_ATTEMPT" in os.environ:  # torchrun.py's: a restarted rank must not meet the addresses of the dead
        store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, device_id=device if cuda else None)
    return Rank(dist.get_rank(), dist.get_world_size(), backend, device)


def leave() -> NoReturn:
    """End the group and the process, without the interpreter's own farewell.

    Threads of gloo outlive the group where DistributedDataParallel was used, and one that needs the interpreter while
    that goes down aborts the process after all work is done: seen once in 30 runs (see pytorch/pytorch#179291).
    """
    dist.destroy_process_group()
    end(0)


def end(code: int) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def fail(message: str) -> NoReturn:
    """Exit code 2 and one message per node: what is wrong is wrong on all its ranks, so the first one speaks.

    The launcher ends all ranks as soon as one has ended, so the silent ones wait for that.
    """
    if int(os.environ.get("LOCAL_RANK", 0)):
        time.sleep(20)
    else:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    if dist.is_initialized():
        end(2)
    sys.exit(2)


def distributed(model: nn.Module, me: Rank) -> nn.Module:
    """The model as it is trained: its gradients averaged over the ranks, where there is a group."""
    if me.backend is None:
        return model
    return DistributedDataParallel(model, device_ids=[me.device] if me.device.type == "cuda" else None)


def as_rank_0(model: nn.Module, me: Rank) -> None:
    """Give all ranks the buffers of rank 0, as a checkpoint has them, to evaluate with.

    Unsynchronized batch norm leaves every rank its own running statistics.
    """
    if me.backend is not None:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def summed(totals: Tensor, me: Rank) -> Tensor:
    """The totals of all ranks, in place."""
    if me.backend is not None:
        dist.all_reduce(totals)
    return totals


def progress(steps: int, me: Rank, done: int = 0) -> "tqdm[Any]":
    """A bar over all steps, on rank 0 of a terminal."""
    return tqdm(total=steps, initial=done, unit="step", disable=me.rank > 0 or None)


def save(model: nn.Module, path: Path | None, me: Rank) -> None:
    """The state_dict, by rank 0, whole or not at all; without a path nothing."""
    if me.rank == 0 and path:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        torch.save(model.state_dict(), part)
        part.replace(path)


def on_rank_0(me: Rank, action: Callable[[], T]) -> T:
    """What action returns on rank 0, which alone does it, on every rank; its ValueError ends them all alike."""
    said: list[Any] = [None, None]
    if me.rank == 0:
        try:
            said[0] = action()
        except ValueError as error:
            said[1] = str(error)
    if me.backend is not None:
        dist.broadcast_object_list(said, 0)
    if said[1] is not None:
        fail(said[1])
    return said[0]


def require_alike(me: Rank, settings: dict[str, Any]) -> None:
    """End all ranks if they were started with different settings: else they would wait for one another for ever."""
    everyones = [settings] * me.world
    if me.backend is not None:
        dist.all_gather_object(everyones, settings)
    for rank, theirs in enumerate(everyones):
        for name in settings:
            if theirs[name] != everyones[0][name]:
                fail(
                    f"All ranks train with the same settings; rank 0 has {name} {everyones[0][name]!r} "
                    f"and rank {rank} {theirs[name]!r}. Give the same options to every node."
                )


def machine_name(device: torch.device) -> str:
    """What a results row names: the GPU, or the processor and its number of cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"
