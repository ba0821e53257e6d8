"""The C library that serves the CPU: found, checked and called. It is made by native/compiling.py.

`SYNCBN_CPU` chooses: `native` insists on it, `torch` does without; by default it serves where it is there, and plain
torch operations where it is not, with the same numbers to rounding.

One pass over the activations a verb, sums of float32 in float64, activation, addition, mask and the halves' conversion
in the same pass. Work is cut by shape alone and every operation is rounded by itself, so that the bits are the same
with any number of threads, which are torch's, and on any processor, but for those of a NaN in float16. It is compiled
for any processor and, on x86-64, for those with AVX2, not for AVX-512: none was at hand to measure it. In the child of
a fork it uses one thread, since a team does not outlive a fork; torch's own operations hang there if they use more.
"""

import ctypes
import functools
import logging
import os
import platform
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.backends.native import compiling

DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
NO_MOMENTUM = float("nan")
"""The cumulative average, 1/counter."""
HOW = "Where there is a C compiler, 'python -m syncbn.backends.native' makes it, as an installation does"
VERBS = ("batch_sums", "normalize", "grad_sums", "grad_input")
ANY_LEVEL = 9
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
Verb = Callable[[bytes], int]


class Alike(NamedTuple):
    """The first fields of `Call` in native/call.h, which calls that are alike share."""

    is_rows: int
    samples: int
    channels: int
    pixels: int
    dtype: int
    activation: int
    leaky_slope: float
    weight_dtype: int = 0
    bias_dtype: int = 0
    running_mean_dtype: int = 0
    running_var_dtype: int = 0
    most: float = 0.0


class Own(NamedTuple):
    """Its other fields: numbers, and addresses of what is as it says there; 0 is none."""

    threads: int
    tag: float = 0.0
    x: int = 0
    residual: int = 0
    mask: int = 0
    weight: int = 0
    bias: int = 0
    mean: int = 0
    invstd: int = 0
    sums: int = 0
    y: int = 0
    running_mean: int = 0
    running_var: int = 0
    counter: int = 0
    eps: float = 0.0
    momentum: float = 0.0
    dy: int = 0
    dsums: int = 0
    counted: int = 0
    dweight: int = 0
    dbias: int = 0
    dx: int = 0
    dresidual: int = 0


def _packing(fields: Any) -> Callable[..., bytes]:
    return struct.Struct("".join("d" if kind is float else "q" for kind in fields.__annotations__.values())).pack


pack_alike, pack_own = _packing(Alike), _packing(Own)


class Library:
    """The four verbs of a library that was made of the C files that are here now.

    Raises:
        OSError: if it is not there, cannot be loaded or is another one, with why.
    """

    def __init__(self, path: Path = compiling.LIBRARY) -> None:
        if not path.exists():
            raise OSError(f"{path.name} is not there")
        handle = ctypes.CDLL(str(path))
        try:
            fields, source = (_text(handle, name) for name in ("syncbn_fields", "syncbn_source"))
            self.verbs = {name: _verb(handle, f"syncbn_{name}") for name in VERBS}
            self.use_level: Callable[[int], int] = handle.syncbn_use_level
            self.has_threads = bool(handle.syncbn_has_threads())
        except AttributeError as error:
            raise OSError(f"{path.name} is another library: {error}") from None
        if fields.split() != [*Alike._fields, *Own._fields] or source != compiling.source():
            raise OSError(f"{path.name} was made of other C files than those that are here")
        self.level = self.use_level(ANY_LEVEL)
        """3 for what x86-64-v3 has, 0 for what any processor has."""

    def __str__(self) -> str:
        level = f"x86-64-v{self.level}" if self.level else platform.machine()
        return f"native code for {level}, {'OpenMP' if self.has_threads else 'one thread'}"


def _text(handle: ctypes.CDLL, name: str) -> str:
    function = getattr(handle, name)
    function.restype = ctypes.c_char_p
    value: bytes = function()
    return value.decode()


def _verb(handle: ctypes.CDLL, name: str) -> Verb:
    function: Verb = getattr(handle, name)
    function.argtypes = [ctypes.c_char_p]  # type: ignore[attr-defined]  # a foreign function has it
    return function


@functools.cache
def found() -> tuple[Library | None, str]:
    """The library, or None where plain torch operations serve, loaded once; and which way CPU tensors go, in words.

    Raises:
        RuntimeError: if `SYNCBN_CPU=native` insists on what is not there.
        ValueError: if `SYNCBN_CPU` is something else than native or torch.
    """
    choice = os.environ.get("SYNCBN_CPU", "")
    if choice not in ("", "native", "torch"):
        raise ValueError(f"SYNCBN_CPU must be native or torch, or not be set; got {choice!r}. Unset it.")
    library, way = None, "plain torch operations: SYNCBN_CPU is torch"
    if choice != "torch":
        try:
            library = Library()
            way = str(library)
        except OSError as error:
            if choice == "native":
                raise RuntimeError(f"SYNCBN_CPU=native needs the CPU library, but {error}. {HOW}.") from error
            way = f"plain torch operations, which are slower: {error}. {HOW}"
    logging.getLogger("syncbn").debug("CPU tensors take %s", way)
    return library, way


def library() -> Library | None:
    """The library, or None."""
    return found()[0]


@functools.cache
def verb(name: str) -> Callable[[bytes], None]:
    """One of the library's, made once, which takes the fields of `Call`; other Python threads run while it does."""
    loaded, way = found()
    if loaded is None:
        raise RuntimeError(f"There is no CPU library here that could be forced to serve, but {way}.")
    run = loaded.verbs[name]

    def checked(fields: bytes) -> None:
        if run(fields):
            raise MemoryError("There is no memory for the partial sums of a batch norm.")

    return checked


def address(name: str, t: Tensor | None, size: int, dtypes: Collection[torch.dtype] = DTYPES) -> int:
    """Of so many numbers side by side on the CPU, of one of these dtypes; 0 of none.

    This and `address_like` check every address that the library is given, but those of what was just allocated.
    """
    if t is None:
        return 0
    at = t.data_ptr()
    if t.numel() != size or t.dtype not in dtypes or not (t.is_cpu and t.is_contiguous()) or at % t.itemsize:
        raise _mistake(name, t, f"{size} numbers side by side")
    return at


def address_like(name: str, t: Tensor, x: Tensor, is_rows: bool) -> int:
    """Of an activation of x's shape and dtype that lies in memory as x does: as rows or planes, without gaps."""
    at = t.data_ptr()
    if t.dtype != x.dtype or t.shape != x.shape or not (t.is_cpu and is_dense(t, is_rows)) or at % t.itemsize:
        raise _mistake(name, t, f"{'rows' if is_rows else 'planes'} without gaps, {tuple(x.shape)} of {x.dtype}")
    return at


def is_dense(t: Tensor, is_rows: bool) -> bool:
    """Whether t (N, C, *S) has no gaps, with the channels innermost or in its order of dimensions."""
    if not is_rows or t.ndim == 2 or t.numel() == 0:
        return t.is_contiguous() or t.numel() == 0
    memory_format = _CHANNELS_LAST.get(t.ndim)
    return t.movedim(1, -1).is_contiguous() if memory_format is None else t.is_contiguous(memory_format=memory_format)


def _mistake(name: str, t: Tensor, wanted: str) -> RuntimeError:
    """What fails there is not the user's fault."""
    return RuntimeError(
        f"The CPU library takes {wanted}, for {name}; got shape {tuple(t.shape)}, strides {t.stride()}, {t.dtype} on "
        f"{t.device}. This is a mistake of syncbn: please report it; SYNCBN_CPU=torch does without the library."
    )
