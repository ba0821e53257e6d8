"""Where and with what a row is measured."""

import datetime
import functools
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent


def environment(machine: str | None, device: torch.device, ranks: int = 1) -> dict[str, Any]:
    """The `tables.ENVIRONMENT` columns of a row measured now."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine or machine_slug(device),
        "device": device_name(device),
        "clocks": clocks() if device.type == "cuda" else "",
        "torch": torch.__version__,
        "triton": triton_version(),
        "ranks": ranks,
        "threads": torch.get_num_threads(),
    }


@functools.cache
def commit() -> str:
    """Short hash of what was measured, '+dirty' if a tracked file other than a result differs; or $COMMIT."""
    given = os.environ.get("COMMIT")
    if given:
        return given
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    status = ("status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    return head + ("+dirty" if _output("git", "-C", str(ROOT), *status) else "")


def device_name(device: torch.device) -> str:
    """The model name of the GPU, or of the CPU with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    model = found.group(1).strip() if found else platform.processor() or platform.machine()
    return f"{model} ({cores()} cores)"


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_slug(device: torch.device) -> str:
    """The device's name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


_without_clocks: list[str] = []


def clocks() -> str:
    """SM and memory clock in MHz, now and at most, as nvidia-smi tells them; empty without it.

    Where it does not answer it is not asked again: waiting for it before every comparison would cost most of them.
    """
    fields = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem"
    query = ("nvidia-smi", "-i", str(torch.cuda.current_device()), f"--query-gpu={fields}")
    line = "" if _without_clocks else _output(*query, "--format=csv,noheader,nounits")
    values = [value.strip() for value in line.split(",")]
    if len(values) != 4:
        _without_clocks.append(line)
        return ""
    return "sm {} mem {} max {} {}".format(*values)


def triton_version() -> str:
    """Of the installed triton, empty without one; it is not imported."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """Standard output, stripped; empty if the command fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
