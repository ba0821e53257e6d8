"""Ranks that are interrupted or killed: it costs the time since the last checkpoint, and nothing else."""

import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.support.launching import (
    LAUNCH,
    ROOT,
    TORCHRUN,
    TRAIN,
    content,
    environment,
    epochs_of,
    files,
    run,
    write_cifar10,
)

EPOCHS = 6


def options(folder: Path, images: Path) -> list[str]:
    """A training of 6 short epochs whose files are all in folder."""
    given = ["--data", "cifar10", "--data-dir", str(images), "--epochs", str(EPOCHS), "--batch-size", "4"]
    return [*given, "--checkpoint", f"{folder}/run", "--log-file", f"{folder}/log", "--save", f"{folder}/saved.pt"]


def ranks_of(launcher: int) -> dict[int, int]:
    """The ranks that the launcher started: rank -> process."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (path / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except OSError:  # it has ended
            continue
        found |= {int(v.removeprefix(b"RANK=")): int(path.name) for v in variables if v.startswith(b"RANK=")}
    return found


def kill_one(launcher: "subprocess.Popen[str]", folder: Path, chosen: random.Random) -> bool:
    """Send SIGKILL to a random rank, up to half a second after the checkpoint of a random epoch, or after the start."""
    epoch, rank, more = chosen.randint(0, EPOCHS - 2), chosen.randint(0, 1), chosen.random() / 2
    print(f"to kill rank {rank}, {more:.3f} s after epoch {epoch}")
    end = time.monotonic() + 60
    while time.monotonic() < end and launcher.poll() is None:
        if len(ranks_of(launcher.pid)) == 2 and (epoch == 0 or list(folder.glob(f"run/epoch-{epoch:04}-*"))):
            break
        time.sleep(0.005)
    time.sleep(more)
    victim = ranks_of(launcher.pid).get(rank)
    if victim is not None:
        os.kill(victim, signal.SIGKILL)
    return victim is not None


@pytest.mark.parametrize("ranks", ["2", "3"])
def test_interrupted_ranks_end_the_same(tmp_path: Path, ranks: str) -> None:
    """Interrupted after any epoch and resumed, gloo ranks end the same; 3 also see the order of their sums."""
    write_cifar10(tmp_path / "images", images=8)
    job = [ROOT / "tests" / "support" / "interrupted_training.py", tmp_path / "images", tmp_path, "3"]
    done = run(*TORCHRUN[:-1], ranks, *job)
    expected = content(files(tmp_path / "0")[-1])
    for epoch in range(1, 4):
        said = "complete already, all 3 epochs" if epoch == 3 else f"resuming after epoch {epoch} of 3"
        assert done.stdout.count(said) == 1
        assert content(files(tmp_path / str(epoch))[-1]) == expected
        assert epochs_of(tmp_path / f"{epoch}.jsonl") == [1, 2, 3]


def test_a_killed_rank_changes_no_bit(tmp_path: Path) -> None:
    """kill -9 of a random rank at a random moment: the launcher goes on, to the bits and the log of a whole run."""
    write_cifar10(tmp_path / "images", images=40)
    run(*TORCHRUN, TRAIN, *options(tmp_path / "whole", tmp_path / "images"))
    command = ["bash", str(LAUNCH / "single_node.sh"), *options(tmp_path / "killed", tmp_path / "images")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, env=environment(NPROC="2", MAX_RESTARTS="3"), **pipes) as launcher:
        try:
            killed = kill_one(launcher, tmp_path / "killed", random.Random())
            said, _ = launcher.communicate(timeout=300)
        finally:
            launcher.terminate()
    assert launcher.returncode == 0, said
    assert not killed or "exitcode: -9" in said, said
    saved, whole = (torch.load(tmp_path / name / "saved.pt") for name in ("killed", "whole"))
    assert all(torch.equal(saved[name], whole[name]) for name in whole)
    assert content(files(tmp_path / "killed" / "run")[-1]) == content(files(tmp_path / "whole" / "run")[-1])
    assert epochs_of(tmp_path / "killed" / "log") == list(range(1, EPOCHS + 1))
    kept = [path.name[:11] for path in files(tmp_path / "killed" / "run")]
    assert kept == [f"epoch-{EPOCHS - 1:04}-", f"epoch-{EPOCHS:04}-"]
