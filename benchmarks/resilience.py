"""What fails costs its own rows only: an exception its implementation, a lost or hanging device its comparison."""

import argparse
import os
import sys
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.harness import Budget

PATIENCE = 45
"""Seconds after which a comparison on a device counts as hanging."""
COMPILER_PATIENCE = 240
START_SECONDS = 15
"""A new process is not worth while with less left: it would import torch and end."""
MOST_SHOWN = 20

Job = TypeVar("Job")


class DeviceLost(Exception):
    """A CUDA error after which every later call of this process fails."""


def parsed(parser: argparse.ArgumentParser, argv: list[str] | None, script: str) -> argparse.Namespace:
    """The options of a script that goes `through` its comparisons."""
    parser.add_argument("--skip", type=int, default=0, help="comparisons left out at the beginning")
    args = parser.parse_args(argv)
    args.script, args.given = script, list(sys.argv[1:] if argv is None else argv)
    return args


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
    lines = str(problem).strip().splitlines() or [""]
    kind = "" if isinstance(problem, AssertionError) else f"{type(problem).__name__}: "
    text = f"{what}: {kind}{' '.join(lines[:3])}"
    print(f"NOT TIMED: {text}", file=sys.stderr, flush=True)
    if not works(device):
        raise DeviceLost(text) from problem
    return text


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
        if budget.spent():
            print(f"out of time: {len(jobs) - at} of {len(jobs)} comparisons skipped", file=sys.stderr, flush=True)
            break
        go_on = partial(_go_on, args, at + 1, budget)
        watch = _watch(partial(go_on, f"{job}: no end in {patience} s"), patience, device)
        try:
            failures += [new for new in _attempt(job, work, budget, device) if new not in failures]
        except DeviceLost as lost:
            go_on(str(lost))
        finally:
            watch.cancel()
        print(f"{job}: done", file=sys.stderr, flush=True)
    if failures or args.skip:
        more = [f"and {len(failures) - MOST_SHOWN} more"] if len(failures) > MOST_SHOWN else []
        raise SystemExit("\n".join([*failures[:MOST_SHOWN], *more]) or "An earlier process lost the device: see above.")


def _attempt(job: Job, work: Callable[[Job, Budget], list[str]], budget: Budget, device: torch.device) -> list[str]:
    try:
        return work(job, budget)
    except DeviceLost:
        raise
    except Exception as problem:  # out of memory, say: the next job is another
        return [report(str(job), problem, device)]


def _watch(act: Callable[[], Any], patience: float, device: torch.device) -> threading.Timer:
    """A clock that acts unless it is cancelled; on CPU, where nothing hangs, after a day."""
    watch = threading.Timer(patience if device.type == "cuda" else 86400, act)
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
