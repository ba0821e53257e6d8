"""What a rank can do wrong, for `faults.strike`: each function is called on every rank, and one goes astray."""

import os
import signal
import time

import torch
import torch.distributed as dist
from torch import nn

import syncbn
from tests.support.faults import Run


def skips(run: Run) -> None:
    run.call("second" if run.rank == 1 else "first")


def skips_another_size(run: Run) -> None:
    run.call("third" if run.rank == 1 else "first")
    time.sleep(10)


def calls_twice(run: Run) -> None:
    run.call("first")
    if run.rank == 1:
        run.call("first")
    run.call("second")


def one_goes_back(run: Run) -> None:
    y = run.call("first")
    if run.rank == 1:
        y.sum().backward()
    run.call("second")


def goes_back_in_another_order(run: Run) -> None:
    calls = [run.call("first"), run.call("first")]
    for y in calls if run.rank else reversed(calls):
        y.square().sum().backward()


def validates_in_train_mode(run: Run) -> None:
    if run.rank == 0:
        run.call("first")
    dist.barrier()


def is_stuck_in_its_loader(run: Run) -> None:
    if run.rank == 1:
        next(iter(torch.utils.data.DataLoader(_Stuck(), num_workers=1, multiprocessing_context="fork")))
    run.call("first")


class _Stuck(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        time.sleep(30)
        return torch.zeros(1)


def sleeps(run: Run) -> None:
    if run.rank == 1:
        time.sleep(3)
    run.call("first")


def raises(run: Run) -> None:
    if run.rank == 1:
        raise ValueError("a sample of another kind")
    run.call("first")


def is_killed_in_forward(run: Run) -> None:
    if run.rank == 1:
        run.net["first"].register_forward_pre_hook(_kill)
    run.call("first")


def is_killed_in_backward(run: Run) -> None:
    y = run.call("first")
    if run.rank == 1:
        y.register_hook(_kill)
    y.sum().backward()


def is_killed_between_steps(run: Run) -> None:
    if run.rank == 1:
        time.sleep(0.2)
        _kill()
    run.call("first")


def _kill(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stops(run: Run) -> None:
    if run.rank == int(os.environ.get("STOPS", 1)):
        os.kill(os.getpid(), signal.SIGSTOP)
    run.call("first")


def runs_out_of_data(run: Run) -> None:
    for _ in range(1 + run.rank):
        run.call("first")


def does_not_recompute(run: Run) -> None:
    if run.rank == 0:
        syncbn.recompute_statistics(run.net["first"], [run.x()])
    dist.barrier()


def has_more_channels(run: Run) -> None:
    syncbn.SyncBatchNorm(4 + run.rank)(run.x(4 + run.rank))
    time.sleep(10)


def has_another_activation(run: Run) -> None:
    syncbn.SyncBatchNorm(4, activation=("relu", None)[run.rank % 2])(run.x())


def has_another_dtype(run: Run) -> None:
    run.call("first", run.x().half() if run.rank else None)


def needs_no_gradient(run: Run) -> None:
    run.call("first", run.x().detach() if run.rank else None)


def joins(run: Run) -> None:
    ddp = nn.parallel.DistributedDataParallel(run.net["first"])
    with ddp.join():
        for _ in range(1 + run.rank):
            ddp(run.x()).sum().backward()
