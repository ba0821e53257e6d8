"""A training that survives: after each epoch all that it needs to go on, in a folder, whole or not at all.

    checkpoints = Checkpoints(folder, settings, me, parts, generators)
    state = checkpoints.read()                     # None: from the beginning
    finished = checkpoints.load(state) if state else 0
    ...
    checkpoints.save(epoch)                        # every rank, at each epoch's end

Rank 0 alone reads and writes, and tells the others: they need not see the folder, and all have the same checkpoint.
A file is named by its epoch and its SHA-256, so a torn or damaged one is known before it is loaded.
"""

import hashlib
import io
import os
import re
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from ranks import Rank, on_rank_0

NAME = re.compile(r"epoch-(\d+)-([0-9a-f]{16})\.pt")
UNFINISHED = "unfinished.tmp"  # one name: what a killed process leaves is overwritten by the next
STATE = {"epoch", "settings", "parts", "generators"}
State = dict[str, Any]


class Part(Protocol):
    """A model, an optimizer, a schedule: whatever gives its state and takes it back."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> Any: ...


class Checkpoints:
    """The last two checkpoints of one run, in a folder of its own.

    settings are what must be the same to resume, with the number of epochs among them. parts are alike on all ranks:
    rank 0's are written. generators differ from rank to rank: those of every rank are written.
    """

    def __init__(
        self, folder: Path, settings: State, me: Rank, parts: dict[str, Part], generators: dict[str, torch.Generator]
    ) -> None:
        self.folder, self.settings, self.me, self.parts, self.generators = folder, settings, me, parts, generators
        self.last: Path | None = None  # the newest one that is whole; rank 0's

    def read(self) -> State | None:
        """The newest whole checkpoint, the same on every rank, or None where there is none; nothing is loaded yet."""
        payload = on_rank_0(self.me, self._choose)
        return None if payload is None else unpack(payload)

    def load(self, state: State) -> int:
        """Give state to the parts and the generators; the finished epoch."""
        for name, part in self.parts.items():
            part.load_state_dict(state["parts"][name])
        for name, generator in self.generators.items():
            generator.set_state(state["generators"][self.me.rank][name])
        return state["epoch"]

    def save(self, epoch: int) -> None:
        """Write the state after epoch; on return it is on the disk, or all ranks have ended with what went wrong."""
        generators = [{name: generator.get_state() for name, generator in self.generators.items()}] * self.me.world
        if self.me.backend is not None:
            dist.all_gather_object(generators, generators[0])
        on_rank_0(self.me, lambda: self._keep(epoch, generators))

    def _keep(self, epoch: int, generators: list[State]) -> None:
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"epoch": epoch, "settings": self.settings, "parts": parts, "generators": generators}
        written = write(self.folder, epoch, pack(state))
        for path in found(self.folder):
            if path not in (written, self.last):
                path.unlink(missing_ok=True)
        self.last = written

    def _choose(self) -> bytes | None:
        """The bytes to resume from; ValueError where there are checkpoints, and none is whole or of this run."""
        prepare(self.folder)
        candidates = found(self.folder)
        for path in candidates:
            try:
                payload = read_bytes(path)
                state = check(path, payload)
            except Damaged as error:
                print(f"{path} is damaged and not loaded: {error}", flush=True)
                continue
            self._refuse_other_settings(state["settings"])
            self.last = path
            if state["epoch"] < self.settings["epochs"]:
                print(f"resuming after epoch {state['epoch']} of {self.settings['epochs']}, from {path}", flush=True)
                probe(self.folder)
            else:
                print(f"complete already, all {state['epoch']} epochs: {path}", flush=True)
            return payload
        if candidates:
            names = " and ".join(path.name for path in candidates)
            raise ValueError(
                f"--checkpoint resumes from a whole file; {self.folder} holds {names}, damaged. Put a copy back, "
                "or pass an empty folder to train from the beginning; nothing has been deleted."
            )
        probe(self.folder)
        return None

    def _refuse_other_settings(self, theirs: State) -> None:
        names = [name for name in {**theirs, **self.settings} if theirs.get(name) != self.settings.get(name)]
        if names:
            changes = ", ".join(f"{n} {theirs.get(n)!r} there and {self.settings.get(n)!r} here" for n in names)
            raise ValueError(
                f"--checkpoint resumes a run with the settings it was started with; {self.folder} holds one with "
                f"{changes}. Start it as before, or pass another folder for this one; nothing has been changed."
            )


class Damaged(Exception):
    """The file is not what was written."""


def found(folder: Path) -> list[Path]:
    """The checkpoints in folder, newest first; other files are not ours."""
    epochs = {path: int(match[1]) for path in folder.iterdir() if (match := NAME.fullmatch(path.name))}
    return sorted(epochs, key=lambda path: (epochs[path], path.name), reverse=True)


def check(path: Path, payload: bytes) -> State:
    """What payload holds; Damaged if it is not the bytes that path is named after, or not a checkpoint."""
    match = NAME.fullmatch(path.name)
    if match is None or digest(payload) != match[2]:
        raise Damaged(f"its {len(payload)} bytes are not those that were written.")
    try:
        state = unpack(payload)
    except Exception as error:  # torch.load raises of every kind
        raise Damaged(f"torch.load(weights_only=True) refuses it: {str(error).splitlines()[0]}") from error
    if not isinstance(state, dict) or not state.keys() >= STATE:
        raise Damaged("it holds something else.")
    return state


def pack(state: State) -> bytes:
    """The bytes of state. ValueError if unpack would refuse them: better now than when they are needed."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    try:
        unpack(buffer.getvalue())
    except Exception as error:
        reason = next((line for line in str(error).splitlines() if "Unsupported" in line), str(error)).strip()
        raise ValueError(
            f"A checkpoint is of tensors and plain values, as torch.load(weights_only=True) takes them; {reason} "
            "Give Checkpoints parts whose state_dict has no other objects."
        ) from error
    return buffer.getvalue()


def unpack(payload: bytes) -> State:
    """Tensors and plain values only: a file cannot run code."""
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()[:16]


def write(folder: Path, epoch: int, payload: bytes) -> Path:
    """The file that holds payload, on the disk when this returns; whatever happens before, no file has that name."""
    unfinished, path = folder / UNFINISHED, folder / f"epoch-{epoch:04}-{digest(payload)}.pt"
    try:
        with unfinished.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
        sync(folder)
    except OSError as error:
        raise refusal(folder, error) from error
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def sync(folder: Path) -> None:
    """Make the folder's new names last, too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        next(folder.iterdir(), None)
    except OSError as error:
        raise refusal(folder, error) from error


def probe(folder: Path) -> None:
    """Refuse a folder that cannot be written to before an epoch has been trained."""
    try:
        (folder / UNFINISHED).write_bytes(b"\0")
        (folder / UNFINISHED).unlink()
    except OSError as error:
        raise refusal(folder, error) from error


def read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(
            f"--checkpoint resumes from the newest file; {path} cannot be read: {error.strerror}. "
            "Make it readable, or move it away to resume from the one before."
        ) from error


def refusal(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"--checkpoint needs a folder that rank 0 can read and write, with space for three checkpoints; "
        f"{folder} is not: {error.strerror}. Make it so, or pass another; what it holds is as it was."
    )
