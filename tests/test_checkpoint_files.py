"""launch/checkpoint.py and launch/log.py: what is written, what is refused, and that an interrupted run is the same."""

import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.launching import FROM_A_LAUNCHER, content, epochs_of, files, forget_launched, launched, write_cifar10

EPOCHS = 3


@pytest.fixture(scope="module")
def launch() -> Iterator[Any]:
    """The folder's modules, by their plain names."""
    launched("train")
    yield sys.modules
    forget_launched()


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten training images, which are augmented: an epoch is 2 steps of 3 images."""
    write_cifar10(folder := tmp_path_factory.mktemp("images"), images=2)
    return folder


def call(launch: Any, folder: Path, images: Path, *options: str | Path, name: str = "run") -> None:
    """A run in this process, as no launcher would start it, that keeps its checkpoints in folder / name."""
    given = ["--data", "cifar10", "--data-dir", images, "--epochs", EPOCHS, "--batch-size", 5, "--norm", "batch"]
    given += ["--checkpoint", folder / name, "--log-file", folder / f"{name}.jsonl", "--save", folder / f"{name}.pt"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *map(str, [*given, *options])])
        for variable in FROM_A_LAUNCHER:
            patch.delenv(variable, raising=False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        launch["train"].main()


def stop_after(launch: Any, epoch: int, *arguments: Any) -> None:
    """The run, interrupted right after the checkpoint of epoch and before its log line."""
    real = launch["checkpoint"].Checkpoints.save

    def save(self: Any, finished: int) -> None:
        real(self, finished)
        if finished == epoch:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch["checkpoint"].Checkpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            call(launch, *arguments)


@pytest.fixture(scope="module")
def whole(launch: Any, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    call(launch, folder := tmp_path_factory.mktemp("whole"), images)
    return folder


@pytest.fixture
def two(whole: Path, tmp_path: Path) -> list[Path]:
    """Copies of its two checkpoints, of epochs 2 and 3, in tmp_path / 'run'."""
    shutil.copytree(whole / "run", tmp_path / "run")
    return files(tmp_path / "run")


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_an_interrupted_run_ends_the_same(
    launch: Any, whole: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], epoch: int
) -> None:
    """Interrupted between an epoch's checkpoint and its log line, and resumed: same bits, each epoch logged once."""
    stop_after(launch, epoch, tmp_path, images)
    log = tmp_path / "run.jsonl"
    assert (epochs_of(log) if log.exists() else []) == list(range(1, epoch))
    assert not (tmp_path / "run.pt").exists()
    capsys.readouterr()
    call(launch, tmp_path, images)
    said = "complete already, all 3 epochs" if epoch == EPOCHS else f"resuming after epoch {epoch} of 3"
    assert capsys.readouterr().out.count(said) == 1
    ours, expected = files(tmp_path / "run")[-1], files(whole / "run")[-1]
    assert content(ours) == content(expected)
    assert any("momentum_buffer" in name for name, _ in content(ours))
    assert epochs_of(log) == [1, 2, 3]
    saved, saved_whole = (torch.load(folder / "run.pt") for folder in (tmp_path, whole))
    assert all(torch.equal(saved[name], saved_whole[name]) for name in saved_whole)


def test_the_comparison_sees_other_bits(launch: Any, whole: Path, images: Path, tmp_path: Path) -> None:
    """A run whose augmentation starts anew when it is resumed does not end the same."""
    stop_after(launch, 2, tmp_path, images)
    kept = launch["checkpoint"].Checkpoints
    real = kept.load

    def load(self: Any, state: Any) -> int:
        finished = real(self, state)
        self.generators["augmentation"].manual_seed(0)
        return finished

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kept, "load", load)
        call(launch, tmp_path, images)
    weights, expected = (
        [pair for pair in content(files(folder / "run")[-1]) if pair[0].startswith("/parts/model/")]
        for folder in (tmp_path, whole)
    )
    assert [name for name, _ in weights] == [name for name, _ in expected]
    assert weights != expected


def test_two_files_are_kept(whole: Path) -> None:
    """The folder of a finished run holds the last two checkpoints and nothing else, each named by what it holds."""
    kept = files(whole / "run")
    assert [path.name[:11] for path in kept] == ["epoch-0002-", "epoch-0003-"]
    assert all(path.stem[11:] == hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in kept)


DAMAGE = {
    "empty": lambda whole: b"",
    "cut early": lambda whole: whole[:100],
    "cut in the middle": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "garbage": lambda whole: b"\x80\x02garbage" * 100,
    "one bit": lambda whole: whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:],
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_passed_over(
    launch: Any, whole: Path, images: Path, two: list[Path], capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """What is not what was written is said and not loaded; the run goes on from the one before, to the same end."""
    two[1].write_bytes(DAMAGE[kind](two[1].read_bytes()))
    call(launch, two[0].parent.parent, images)
    said = capsys.readouterr().out
    assert f"{two[1]} is damaged and not loaded: its " in said
    assert f"resuming after epoch 2 of 3, from {two[0]}" in said
    kept = files(two[0].parent)
    assert kept[0] == two[0]
    assert kept[1] != two[1]
    assert len(kept) == 2
    assert content(kept[1]) == content(files(whole / "run")[1])


def refused(capsys: pytest.CaptureFixture[str], *arguments: Any, **more: Any) -> str:
    """What a run that ends with code 2 says."""
    with pytest.raises(SystemExit) as ended:
        call(*arguments, **more)
    assert ended.value.code == 2
    return capsys.readouterr().err


def test_only_damaged_files_are_an_error(
    launch: Any, images: Path, two: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody wants days of training begun anew in silence: where no file is whole, the run ends, and deletes none."""
    for path in two:
        path.write_bytes(b"")
    said = refused(capsys, launch, two[0].parent.parent, images)
    assert f"holds {two[1].name} and {two[0].name}, damaged. Put a copy back, or pass an empty folder" in said
    assert files(two[0].parent) == two


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, (os.environ["TRAP"],)


def test_a_pickled_call_is_not_executed(
    launch: Any, images: Path, two: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file with the right name for its bytes and a call in its pickle is passed over, and the call is not made."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRAP", str(tmp_path / "sprung"))
        state = torch.load(two[1], weights_only=True) | {"trap": Trap()}
        torch.save(state, tmp_path / "trap")
    payload = (tmp_path / "trap").read_bytes()
    (two[0].parent / f"epoch-0009-{hashlib.sha256(payload).hexdigest()[:16]}.pt").write_bytes(payload)
    call(launch, tmp_path, images)
    said = capsys.readouterr().out
    assert "is damaged and not loaded: torch.load(weights_only=True) refuses it" in said
    assert f"complete already, all 3 epochs: {two[1]}" in said
    assert not (tmp_path / "sprung").exists()
    torch.load(tmp_path / "trap", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--norm", "group"], "norm 'batch' there and 'group' here"),
        (["--batch-size", "4", "--lr", "0.1"], "batch_per_rank 5 there and 4 here, lr 0.001953125 there and 0.1 here"),
        (["--seed", "1"], "seed 0 there and 1 here"),
        (["--epochs", "4"], "epochs 3 there and 4 here"),
        (["--data", "digits"], "data 'cifar10' there and 'digits' here, images 10 there and 1198 here"),
        (["--amp", "--channels-last"], "amp False there and True here, channels_last False there and True here"),
    ],
)
def test_other_settings_are_refused(
    launch: Any, images: Path, two: list[Path], capsys: pytest.CaptureFixture[str], options: list[str], text: str
) -> None:
    """A folder of a run with other settings ends the new one with what differs, and stays as it was."""
    before = {path: path.read_bytes() for path in two}
    said = refused(capsys, launch, two[0].parent.parent, images, *options)
    assert f"holds one with {text}. Start it as before, or pass another folder" in said
    assert {path: path.read_bytes() for path in files(two[0].parent)} == before


def test_a_file_is_no_folder(launch: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--checkpoint with a file ends with what it must be, before anything is trained."""
    (tmp_path / "run").write_text("mine")
    assert "needs a folder that rank 0 can read and write" in refused(capsys, launch, tmp_path, images)
    assert (tmp_path / "run").read_text() == "mine"


def test_a_full_disk_leaves_the_checkpoint_before(
    launch: Any, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the second checkpoint does not fit, the run ends in words, and goes on from the first one afterwards."""
    real, calls = os.fsync, iter(range(100))

    def fsync(descriptor: int) -> None:
        if next(calls) == 2:  # each checkpoint syncs its file, then the folder
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        assert "is not: No space left on device. Make it so" in refused(capsys, launch, tmp_path, images)
    assert [path.name[:11] for path in files(tmp_path / "run")] == ["epoch-0001-"]
    call(launch, tmp_path, images)
    assert "resuming after epoch 1 of 3" in capsys.readouterr().out
    assert epochs_of(tmp_path / "run.jsonl") == [1, 2, 3]


def test_a_log_line_that_was_cut_off_is_written_again(launch: Any, images: Path, two: list[Path]) -> None:
    """A resumed run mends the torn end of its log, leaves other runs' lines alone, and repeats no epoch."""
    folder = two[0].parent.parent
    log, other = folder / "run.jsonl", json.dumps({"run": "another", "epoch": 2})
    rows = torch.load(two[0], weights_only=True)["parts"]["log"]
    first, second = (json.dumps({**row, "run": rows["run"]}) for row in rows["rows"])
    log.write_text(f"{other}\n{first}\n{second[:40]}")
    call(launch, folder, images)
    lines = log.read_text().splitlines()
    assert lines[:2] == [other, first]
    assert [json.loads(line)["epoch"] for line in lines[2:]] == [2, 3]


def test_what_could_not_be_read_is_not_written(launch: Any, tmp_path: Path) -> None:
    """A part whose state holds an object that weights_only refuses is refused when it is saved."""

    class Part:
        def state_dict(self) -> dict[str, Any]:
            return {"path": tmp_path}

        def load_state_dict(self, state: dict[str, Any]) -> None: ...

    me = launch["ranks"].Rank(0, 1, None, torch.device("cpu"))
    kept = launch["checkpoint"].Checkpoints(tmp_path / "run", {"epochs": 1}, me, {"part": Part()}, {})
    assert kept.read() is None
    with pytest.raises(SystemExit):
        kept.save(1)
    assert files(tmp_path / "run") == []


def test_ranks_must_be_started_alike(
    launch: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where one node was given --checkpoint and another was not, all ranks end with that instead of waiting."""

    def gather(into: list[Any], mine: Any) -> None:
        into[:] = [mine, {**mine, "checkpoint": False}]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    me = launch["ranks"].Rank(0, 2, "gloo", torch.device("cpu"))
    with pytest.raises(SystemExit) as ended:
        launch["ranks"].require_alike(me, {"seed": 0, "checkpoint": True})
    assert ended.value.code == 2
    assert (
        "rank 0 has checkpoint True and rank 1 False. Give the same options to every node." in capsys.readouterr().err
    )
