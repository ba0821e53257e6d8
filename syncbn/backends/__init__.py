"""The four verbs that touch activation-sized tensors, and which implementation serves a tensor.

    x̂ = (x − mean)·invstd,   z = x̂·weight + bias + residual,   y = activation(z),   dz = dy·activation′(z)

mean and invstd are those of all ranks. What goes over the wire ends with two numbers that tell which call it is of: see
fingerprint.py. A tag of 0 stands for none, there is nothing to compare then.
Masked-out positions count nowhere, give y = 0, receive 0, and whatever stands there reaches nothing.
"""

import contextlib
import functools
import importlib.util
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from syncbn.formulas import DTYPES, Epilogue, Running

if TYPE_CHECKING:
    from syncbn.backends import cpu_direct, gpu_direct, gpu_workspace

    Launches = cpu_direct.Launches | gpu_direct.Launches
    Work = gpu_workspace.Workspace | cpu_direct.Work


class Backend(Protocol):
    """Any strides, any mix of real floating dtypes, empty tensors; nothing is read back to the host.

    A back-end is a module with these four functions; a new device is one such file and one line in `select`.
    """

    def batch_sums(self, x: Tensor, mask: Tensor | None, tag: float = 0.0) -> Tensor:
        """[Σx (C), Σx² (C), count, fingerprint (2)] of this rank: float64, on x's device."""
        ...

    def normalize(
        self,
        x: Tensor,
        sums: Tensor,
        epilogue: Epilogue,
        eps: float,
        running: Running | None,
        tag: float = 0.0,
        turn: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, mean, invstd from the sums of all ranks; moves the running statistics, if given.

        A GPU's compares the fingerprint with its tag and reports its turn, see gpu_report.py; the host does, otherwise.
        """
        ...

    def grad_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, epilogue: Epilogue, tag: float = 0.0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[Σdz (C), Σdz·x̂ (C), fingerprint (2)] of this rank in float64; Σdz·x̂ and Σdz as dweight and dbias, in their
        dtypes.
        """
        ...

    def grad_input(
        self,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        invstd: Tensor,
        epilogue: Epilogue,
        dsums: Tensor | None,
        count: Tensor,
        needs_dresidual: bool,
        tag: float = 0.0,
        turn: int = 0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """dx = weight·invstd·(dz − Σdz/count − x̂·Σdz·x̂/count) and dresidual = dz; tag and turn as in normalize.

        dsums and count are those of all ranks; without dsums there is no dx.
        """
        ...


_forced: str | None = None


@contextlib.contextmanager
def force(name: str) -> Iterator[None]:
    """Serve every tensor by the back-end of this name, to compare one with another."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def name_for(x: Tensor) -> str:
    """The name of the back-end that serves x."""
    if _forced is not None:
        return _forced
    if x.device.type == "cpu":
        return _on_cpu()
    if x.device.type == "cuda" and x.dtype in DTYPES and _has_triton():
        return "gpu"
    _say_reference(x.device.type, x.dtype)
    return "reference"


@functools.cache
def _on_cpu() -> str:
    """The library's, or the specification where there is none."""
    from syncbn.backends import cpu_library

    return "reference" if cpu_library.library() is None else "cpu"


def described(x: Tensor) -> str:
    """The back-end that serves x and, of the CPU, why it does."""
    if not x.is_cpu:
        return name_for(x)
    from syncbn.backends import cpu_library

    return f"{name_for(x)} ({cpu_library.found()[1]})"


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _say_reference(device: str, dtype: torch.dtype) -> None:
    """Once for each device type and dtype, that the slow path serves it."""
    reason = "triton is not installed" if device == "cuda" and dtype in DTYPES else "no back-end is made for them"
    logging.getLogger("syncbn").debug("%s tensors on %s take plain torch operations: %s", dtype, device, reason)


def select(x: Tensor) -> Backend:
    """The back-end that serves x, imported on first use."""
    return _load(name_for(x))


@functools.cache
def _load(name: str) -> Backend:
    if name == "cpu":
        from syncbn.backends import cpu

        return cpu
    if name == "gpu":
        from syncbn.backends import gpu

        return gpu
    if name == "reference":
        from syncbn.backends import reference

        return reference
    raise ValueError(f"There is no back-end named {name!r}; there are 'cpu', 'gpu' and 'reference'.")


def launches_for(x: Tensor, epilogue: Epilogue, running: Running | None) -> "Launches | None":
    """What a back-end lays out once for calls like this one, see direct.py; None for those that are unusual."""
    name = name_for(x)
    if name == "reference":
        return None
    if name == "gpu":
        from syncbn.backends import gpu_direct

        return gpu_direct.launches_for(x, epilogue, running)
    from syncbn.backends import cpu_direct

    return cpu_direct.launches_for(x, epilogue, running)


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on this device is being written to a CUDA graph."""
    from syncbn.backends import gpu_workspace

    return gpu_workspace.is_capturing(device)


def report_of(device: torch.device) -> Tensor:
    """The host's few bytes in which a device's kernels say how far they are, see progress.py."""
    from syncbn.backends import gpu_report

    return gpu_report.report_of(device)
