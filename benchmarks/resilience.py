"""What fails costs its own rows only: an exception its implementation, a lost or hanging device its comparison."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

PATIENCE = 45
"""Seconds after which a comparison on a device counts as hanging."""
COMPILER_PATIENCE = 240
DAY = 86400
START_SECONDS = 15
"""A new process is not worth while with less left: it would import torch and end."""
MOST_SHOWN = 20

Job = TypeVar("Job")
T = TypeVar("T")


class DeviceLost(Exception):
    """A CUDA error after which every later call of this process fails."""


class Budget:
    """Wall-clock seconds that a script may use; 0 is no limit."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds if seconds > 0 else float("inf")

    def left(self) -> float:
        return self.end - time.monotonic()

    def spent(self) -> bool:
        return self.left() <= 0


def ranks() -> int:
    """Processes that wait for one another."""
    return dist.get_world_size() if dist.is_initialized() else 1


def agreed(flag: bool) -> bool:
    """Whether it holds on any rank."""
    if ranks() == 1:
        return flag
    t = torch.tensor(float(flag))
    dist.all_reduce(t, dist.ReduceOp.MAX)
    return bool(t)


def say(text: str) -> None:
    """On standard error, by the first rank for all."""
    if ranks() == 1 or dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def works(device: torch.device) -> bool:
    """Whether the device takes work, also after an error: an illegal access spoils the whole process."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return bool(torch.ones(1, device=device).add_(1).item() == 2)
    except Exception:  # of whatever kind: that is the answer
        return False


def report(what: str, problem: BaseException, device: torch.device) -> str:
    """What went wrong, printed at once; raises DeviceLost if nothing can be right or timed any more."""
    kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
    text = f"{what}: {kind}{' '.join(str(problem).strip().splitlines()[:3])}"
    print(f"NOT TIMED: {text}", file=sys.stderr, flush=True)
    if not works(device):
        raise DeviceLost(text) from problem
    return text


def attempt(what: str, work: Callable[[], T], device: torch.device, failures: list[str]) -> T | None:
    """work's result; None, and one more of the failures, if it raises, unless other ranks wait for this one."""
    try:
        return work()
    except DeviceLost:
        raise
    except Exception as problem:  # whatever it is, out of memory, say: the others are still to be timed
        if ranks() > 1:
            raise
        failures.append(report(what, problem, device))
        return None


def through(
    jobs: Sequence[Job],
    work: Callable[[Job, Budget], list[str]],
    args: argparse.Namespace,
    device: torch.device,
    patience: float = PATIENCE,
) -> None:
    """work(job, budget) for each job while the budget lasts; exits with 1 and what failed if anything did.

    After a job that lost the device, or that hangs there, a new process goes on with the next.
    """
    patience = COMPILER_PATIENCE if getattr(args, "compiled", False) else patience
    budget, failures = Budget(args.budget), []
    if args.skip and not works(device):
        raise SystemExit("The device is lost for a new process, too.")
    for at, job in enumerate(jobs[args.skip :], args.skip):
        if agreed(budget.spent()):
            say(f"out of time: {len(jobs) - at} of {len(jobs)} comparisons skipped")
            break
        go_on = partial(_go_on, args, at + 1, budget)
        watch = _watch(partial(go_on, f"{job}: no end in {patience} s"), patience, device)
        try:
            found: list[str] = []
            found += attempt(str(job), partial(work, job, budget), device, found) or []
            failures += [new for new in found if new not in failures]
        except DeviceLost as lost:
            go_on(str(lost))
        finally:
            watch.cancel()
        say(f"{job}: done")
    if failures or args.skip:
        more = [f"and {len(failures) - MOST_SHOWN} more"] if len(failures) > MOST_SHOWN else []
        raise SystemExit("\n".join([*failures[:MOST_SHOWN], *more]) or "An earlier process lost the device: see above.")


def _watch(act: Callable[[], Any], patience: float, device: torch.device) -> threading.Timer:
    """A clock that acts unless it is cancelled; on CPU, where nothing hangs, after a day."""
    watch = threading.Timer(patience if device.type == "cuda" else DAY, act)
    watch.daemon = True
    watch.start()
    return watch


def _go_on(args: argparse.Namespace, done: int, budget: Budget, why: str) -> None:
    """Become a new process of the same script that skips what is done; its rows are added to those there are."""
    print(f"THE DEVICE IS LOST to this process: {why}", file=sys.stderr, flush=True)
    if budget.left() < START_SECONDS:
        os._exit(1)  # at once: what is left of this process may hang, too
    options = [*args.given, "--append", "--skip", str(done)]
    if args.budget > 0:
        options += ["--budget", f"{budget.left() - START_SECONDS / 2:.0f}"]
    os.closerange(3, 1 << 12)  # else what the driver has open outlives this process's context
    os.execv(sys.executable, [sys.executable, "-m", f"benchmarks.{args.script}", *options])
