"""Triton on a driver that runs nothing (stub_driver.c): real compiler, dispatch and launcher, no device.

What a test sees is what the driver is given: which kernel, which grid, and the value of every parameter that the
machine code declares. Tensors are on the CPU; nothing is computed.
"""

import contextlib
import ctypes
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("stub_driver.c")
STREAM = 0x1234
ON_LAUNCH = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint, ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)
)
FORMATS = {"u64": "Q", "b64": "Q", "s64": "q", "u32": "I", "b32": "I", "s32": "i", "f32": "f"}


def why_not() -> str | None:
    """Why this machine cannot have the stub, if so."""
    if _compiler() is None:
        return "needs a C compiler: Triton builds its launcher with it, and the stub driver is built with it"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "needs Python's C headers, with which Triton builds its launcher"
    return None


def _compiler() -> str | None:
    return os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")


def build(folder: Path) -> dict[str, str]:
    """The driver in folder, and the environment of a process that uses it."""
    compiler = _compiler()
    assert compiler is not None, "why_not() says so"
    options = ["-O1", "-fPIC", "-shared", "-w", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, "-o", folder / "libcuda.so.1", SOURCE], check=True)
    paths = [str(folder), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])]
    return {"TRITON_LIBCUDA_PATH": str(folder), "LD_LIBRARY_PATH": ":".join(paths), "TRITON_INTERPRET": "0"}


class Launch(NamedTuple):
    """As the driver saw it; values by the kernel's own names, scratch pointers left out."""

    kernel: str
    function: int
    grid: int
    block: int
    stream: int
    values: dict[str, float]


class StubDevice:
    """The driver of this process, which must have been started with `build`'s environment."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.device = 0
        self._compiled: dict[int, Any] = {}
        self._library = ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
        self._callback = ON_LAUNCH(self._note)  # kept alive
        self.watch(True)

    @property
    def module_loads(self) -> int:
        return int(self._library.stub_module_loads())

    def watch(self, launches: bool) -> None:
        """Whether launches are noted, which takes many times as long as they do."""
        self._library.stub_on_launch(self._callback if launches else None)

    @contextlib.contextmanager
    def capturing(self) -> Iterator[None]:
        """Within it, a stream is being captured."""
        from syncbn.backends import gpu_workspace

        before = gpu_workspace.is_capturing
        gpu_workspace.is_capturing = lambda device: True
        self._library.stub_set_capturing(1)
        try:
            yield
        finally:
            gpu_workspace.is_capturing = before
            self._library.stub_set_capturing(0)

    def register(self, compiled: Any) -> None:
        """Know a kernel by the handle of its function."""
        self._compiled[compiled.function] = compiled

    def _note(self, function: int, grid: int, block: int, stream: int | None, parameters: Any) -> None:
        compiled = self._compiled[function]
        declared = declared_parameters(compiled)
        raw = [ctypes.string_at(parameters[at], struct.calcsize(form)) for at, (_, form) in enumerate(declared)]
        values = {name: struct.unpack(form, bits)[0] for (name, form), bits in zip(declared, raw, strict=True)}
        self.launches.append(Launch(compiled.src.fn.__name__, function, grid, block, stream or 0, values))


def declared_parameters(compiled: Any) -> list[tuple[str, str]]:
    """Name and struct format of each parameter of the machine code; Triton adds two scratch pointers at the end."""
    entry = re.search(r"\.entry \w+\((.*?)\)\s*\.reqntid", compiled.asm["ptx"], re.DOTALL)
    assert entry is not None, "PTX declares its kernel so"
    forms = [FORMATS[kind] for kind in re.findall(r"\.param \.(\w+)", entry[1])]
    signature = compiled.src.signature
    names = [name for name in compiled.src.fn.arg_names if signature[name] != "constexpr"]
    assert len(forms) == len(names) + 2, (names, forms)
    signed = [form.lower() if signature[name][0] == "i" else form for name, form in zip(names, forms, strict=False)]
    return list(zip(names, signed, strict=True))


_installed: StubDevice | None = None


def stub() -> StubDevice:
    """This process's."""
    assert _installed is not None, "install() first"
    return _installed


def install() -> None:
    """Let Triton launch on the stub: two devices of compute capability 9.0, one stream."""
    global _installed
    from triton.backends.nvidia import driver as nvidia
    from triton.compiler.compiler import CompiledKernel
    from triton.runtime import driver

    from syncbn.backends import gpu_workspace

    warnings.filterwarnings("ignore", "CUDA initialization")  # a CUDA build of torch asks this driver too
    device = _installed = StubDevice()

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: device.device
            self.set_current_device = lambda index: None
            self.get_current_stream = lambda index: STREAM
            self.get_device_capability = lambda index: (9, 0)

    init_handles = CompiledKernel._init_handles

    def registering(kernel: Any) -> None:
        init_handles(kernel)
        device.register(kernel)

    CompiledKernel._init_handles = registering
    driver.set_active(Driver())
    gpu_workspace.current_stream = lambda device: STREAM
