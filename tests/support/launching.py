"""How the tests start the scripts of launch/: a clean environment, a time limit, the output as the failure."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
TORCHRUN = (sys.executable, str(LAUNCH / "torchrun.py"), "--standalone", "--nproc-per-node", "2")
TRAIN = str(LAUNCH / "train.py")
FROM_A_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NPROC")


def environment(**more: str) -> dict[str, str]:
    """Ours without what a launcher sets and without GPUs; the scripts are to use this interpreter."""
    mine = {name: value for name, value in os.environ.items() if name not in FROM_A_LAUNCHER}
    return {**mine, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **more}


def run(*command: str | Path, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
    """The finished command, which must have ended with `code`; `more` are environment variables."""
    arguments = [str(part) for part in command]
    done = subprocess.run(arguments, env=environment(**more), cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == code, f"{arguments} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def launched(name: str) -> Any:
    """A module of launch/, whose scripts import their neighbours by their plain names."""
    if str(LAUNCH) not in sys.path:
        sys.path.insert(0, str(LAUNCH))
    return __import__(name)


def forget_launched() -> None:
    """So that nobody else takes one of them for a `data` or `log` of his own."""
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == LAUNCH:
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != str(LAUNCH)]


def write_cifar10(folder: Path, images: int = 4, seed: int = 0) -> dict[str, torch.Tensor]:
    """Files of the official format with `images` records each; returns their bytes, (images, 3073) uint8."""
    generator = torch.Generator().manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in (*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"):
        labels = torch.randint(10, (images, 1), generator=generator)
        pixels = torch.randint(256, (images, 3072), generator=generator)
        written[name] = torch.cat([labels, pixels], 1).to(torch.uint8)
        (folder / name).write_bytes(written[name].numpy().tobytes())
    return written


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def content(path: Path) -> list[tuple[str, Any]]:
    """All that a checkpoint holds, flat, without times and the run's own name; tensors as bytes."""

    def walk(value: Any, at: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict | list | tuple):
            for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
                yield from walk(inner, f"{at}/{key}")
        elif not at.endswith(("/ms_per_step", "/run")):
            yield at, value.contiguous().numpy().tobytes() if isinstance(value, torch.Tensor) else value

    return list(walk(torch.load(path, weights_only=True), ""))


def epochs_of(log: Path) -> list[int]:
    return [json.loads(line)["epoch"] for line in log.read_text().splitlines()]
