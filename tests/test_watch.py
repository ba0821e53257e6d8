"""The watch: what it says, what it costs, and that it gets in nobody's way."""

import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn import watch, whereabouts
from syncbn.whereabouts import Where
from tests.support import wrong_ranks
from tests.support.faults import PATIENCE, WITHIN, Run, named, strike
from tests.support.launching import environment
from tests.support.ranks import RankPool

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("given", ["soon", "-1", "inf", "nan"])
def test_a_patience_that_is_none_is_refused(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule, what was given, what to do."""
    monkeypatch.setenv("SYNCBN_WATCH", given)
    with pytest.raises(ValueError, match=r"must be the seconds .*; got '.*'\. Leave it away for 60"):
        watch.patience()


def test_the_patience_is_a_minute_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unset or empty; 0 is no watch."""
    for given, seconds in (("", 60.0), ("0", 0.0), ("2.5", 2.5)):
        monkeypatch.setenv("SYNCBN_WATCH", given)
        assert watch.patience() == seconds
    monkeypatch.delenv("SYNCBN_WATCH")
    assert watch.patience() == 60.0


def test_where_a_rank_is_goes_through_a_store() -> None:
    """What is written is what is read."""
    where = Where(
        3, "waiting", "layer1.bn", "forward", 12, "64 channels", 61.5, "at train.py:3 in <module>", 7, "node1"
    )
    assert Where.decoded(where.encoded()) == where
    assert Where.decoded(where.encoded().encode()) == where


WAITING = [
    Where(rank, "waiting", "layer 'bn1'", "forward", 4, "8 channels", 60, "at a.py:1 in f", 10) for rank in (0, 2)
]
PICTURES = {
    "ended": (Where(1, "ended", at="ValueError: bad"), "rank 1 ended before the others"),
    "silent": (Where(1, "silent"), "rank 1: killed (out of memory?)"),
    "loading": (
        Where(1, "outside", at="at a.py:1 in f, inside torch/utils/data/dataloader.py:9 in g"),
        "slow or stuck loader",
    ),
    "collective": (
        Where(1, "outside", at="at a.py:1 in f, inside torch/distributed/c.py:1 in barrier"),
        "model.eval()",
    ),
    "elsewhere": (Where(1, "outside", at="at a.py:1 in save"), "rank 1 at other work"),
    "another layer": (Where(1, "waiting", "layer 'bn2'", "forward", 4), "in different layers"),
    "backward": (Where(1, "waiting", "layer 'bn1'", "backward", 3), "some in a backward pass"),
    "all": (Where(1, "waiting", "layer 'bn1'", "forward", 4), "All are in the same call"),
}


@pytest.mark.parametrize("picture", PICTURES)
def test_a_picture_has_its_usual_cause(picture: str) -> None:
    """The table names every rank, that one first, and says what usually causes it."""
    odd, cause = PICTURES[picture]
    text = whereabouts.table("title", [WAITING[0], odd, WAITING[1]])
    lines = text.splitlines()
    assert lines[0] == "title"
    assert cause in text
    assert sorted(line.split()[1].strip(":") for line in lines[1:4]) == ["0", "1", "2"]
    if odd.state != "waiting":
        assert lines[1].startswith("  rank 1")


def test_the_most_advanced_come_first() -> None:
    """Among those that wait, by how many collectives they have started."""
    rows = [Where(rank, "waiting", "bn", "forward", 1, progress=progress) for rank, progress in enumerate((5, 9, 7))]
    assert [line.split()[1] for line in whereabouts.table("", rows).splitlines()[1:4]] == ["1:", "2:", "0:"]


def test_ranks_are_told_in_spans() -> None:
    """A thousand ranks fit in a line."""
    assert whereabouts.spans([*range(1000), 1003]) == "0-999, 1003"


def test_the_users_line_is_told_apart_from_the_libraries() -> None:
    """The innermost frame of neither torch, Python nor this package, and the library's function that it called."""
    seen: list[str] = []
    timer = threading.Timer(0.3, lambda: seen.append(whereabouts.stack_of_main(inside=True)))
    timer.start()
    next(iter(torch.utils.data.DataLoader(_Slow())))
    timer.join()
    assert "tests/test_watch.py" in seen[0].replace(os.sep, "/")
    assert "in __getitem__" in seen[0]


class _Slow(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        time.sleep(0.6)
        return index


@pytest.mark.parametrize("world", [3, 4])
@pytest.mark.parametrize("store", ["tcp", "file"])
def test_every_waiting_rank_logs_the_same_table_once(world: int, store: str) -> None:
    """Whichever store the group has; the table names all ranks."""
    faulty = strike(wrong_ranks.sleeps, world, store=store)
    tables = {said.log[0][1] for rank, said in enumerate(faulty) if rank != 1}
    assert len(tables) == 1
    for rank, said in enumerate(faulty):
        assert len(said.log) == (rank != 1)
        if rank != 1:
            named(said, *(f"rank {other}" for other in range(world)), "in sleeps")


def two_hangs(run: Run) -> None:
    for _ in range(2):
        if run.rank == 1:
            time.sleep(PATIENCE + 1)
        run.call("first")


def test_each_hang_is_reported() -> None:
    """Once each."""
    first, _ = strike(two_hangs)
    assert [text.split("call ")[1][0] for _, text in first.log] == ["2", "3"]


def is_slow(run: Run) -> None:
    for _ in range(3):
        if run.rank == 1:
            time.sleep(PATIENCE / 2)
        run.step()


def evaluates_for_long(run: Run) -> None:
    run.step()
    run.net.eval()
    time.sleep(2 * PATIENCE)
    run.call("first")
    run.net.train()
    run.step()


def joins_a_new_group(run: Run) -> None:
    dist.destroy_process_group()
    time.sleep(PATIENCE)
    address = os.environ["NEW_GROUP"]
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=run.rank, world_size=run.world)
    run.step()
    if run.rank == 0:
        time.sleep(PATIENCE + 1)
    run.step()


@pytest.mark.parametrize("fault", [is_slow, evaluates_for_long])
def test_what_is_only_slow_is_not_reported(fault: object) -> None:
    """Ranks below the patience; an evaluation, of all, above it."""
    for said in strike(fault, 3):
        assert said.log == []
        assert said.error is None


def test_a_new_group_is_watched(tmp_path: Path) -> None:
    """After destroy_process_group, a group with another store; nothing is said of the old one."""
    first, second = strike(joins_a_new_group, NEW_GROUP=str(tmp_path / "store"))
    assert first.error is second.error is None
    assert first.log == []
    named(second, "in joins_a_new_group")


def test_a_store_that_is_gone_is_said() -> None:
    """Rank 0 hosts it and ends: the other's error comes all the same, in time."""
    _, second = strike(the_host_ends, within=WITHIN)
    named(second, "on rank 1 in layer 'first' (forward, call 2, 4 channels)", "could not be asked")


def has_an_even_loader_that_is_stuck(run: Run) -> None:
    for _ in syncbn.EvenLoader(_stuck_batches(run.rank)):
        run.step()


def _stuck_batches(rank: int) -> Iterator[torch.Tensor]:
    time.sleep(30 * rank)
    yield torch.zeros(1)


def test_a_loader_that_waits_for_another_is_watched() -> None:
    """EvenLoader says so as a layer would."""
    first, _ = strike(has_an_even_loader_that_is_stuck, until=[0], within=WITHIN)
    named(first, "EvenLoader (forward, call", "rank 1", "in _stuck_batches")


def the_host_ends(run: Run) -> None:
    if run.rank == 0:
        os._exit(0)
    run.call("first")


SCRIPT = """
import os, sys, threading, time
import torch, torch.distributed as dist
import syncbn
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
layer = syncbn.SyncBatchNorm(3)
layer(torch.randn(2, 3))
{}
"""


def scripts(body: str, store: Path, **more: str) -> list[subprocess.CompletedProcess[str]]:
    """Two ranks of this script, as a user's."""
    code = SCRIPT.format(textwrap.dedent(body))
    given = environment(SYNCBN_WATCH="2", **more)
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [
        subprocess.Popen([sys.executable, "-c", code, str(rank), str(store)], env=given, cwd=ROOT, **pipe)
        for rank in (0, 1)
    ]
    done = []
    for process in running:
        out, err = process.communicate(timeout=60)
        done.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    return done


@pytest.mark.parametrize("end", ["", "dist.destroy_process_group()", "sys.exit(0)"])
def test_a_process_ends_as_if_there_were_no_watch(end: str, tmp_path: Path) -> None:
    """Without a word, at once, with the group destroyed or not."""
    for done in scripts(end, tmp_path / "store"):
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert "syncbn" not in done.stderr


def test_an_error_reaches_the_others(tmp_path: Path) -> None:
    """A rank that ends with an exception leaves it in the store: the others' errors say which."""
    first, second = scripts("if rank: raise ValueError('a bad sample')\nlayer(torch.randn(2, 3))", tmp_path / "store")
    assert "a bad sample" in second.stderr
    assert "has ended: ValueError: a bad sample" in first.stderr
    assert first.returncode == 1


def test_no_synchronized_call_no_thread() -> None:
    """Eval, and training alone, start none; nor does the import."""
    code = (
        "import syncbn, threading, torch; syncbn.SyncBatchNorm(3)(torch.randn(2, 3)); print(threading.active_count())"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "1"


def _forked() -> tuple[bool, int]:
    syncbn.SyncBatchNorm(3)(torch.randn(2, 3))
    mine = watch._watch is not None
    child = os.fork()
    if child == 0:
        os._exit(watch._watch is None and not watch.is_started and not watch.now)
    return mine, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_worker_has_no_watch(ranks: RankPool) -> None:
    """It starts one if it ever makes a synchronized call; its parent's goes on."""
    assert ranks.run(2, _forked) == [(True, 1)] * 2
