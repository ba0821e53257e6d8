"""Compiles the kernels that a call would launch, without a device, and prints what the machine code is like.

    python -m tests.support.gpu_compile [target ...]

A target is sm_80, sm_90, sm_100 or gfx942. One JSON line a kernel. A process of its own: Triton must not interpret.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from syncbn.backends import gpu
from syncbn.formulas import Epilogue, Running
from tests.support import machine_code
from tests.support.oracle import in_layout

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*u1",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SECONDARY = ["sm_90"]
ALL_CONSTANTS_HAVE_ATTRIBUTES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64

CALLS: dict[str, dict[str, Any]] = {
    "NCHW": {"shape": (32, 512, 28, 28), "activation": "relu", "residual": True},
    "NHWC": {"shape": (32, 256, 56, 56), "layout": "channels_last", "activation": "relu", "residual": True},
    "NHWC 3 channels": {"shape": (32, 3, 112, 112), "layout": "channels_last"},
    "(N, C) float32": {"shape": (4096, 2048), "dtype": F32, "activation": "silu"},
    "NCHW 7": {"shape": (32, 2048, 7, 7), "activation": "relu", "residual": True, "main": False},
    "NCHW masked": {"shape": (8, 256, 56, 56), "activation": "relu", "masked": True, "main": False},
    "NHWC, dy NCHW": {"shape": (8, 256, 56, 56), "layout": "channels_last", "dy_layout": "contiguous", "main": False},
    "NCHW float64": {"shape": (8, 64, 56, 56), "dtype": F64, "activation": "silu", "main": False},
    "(2³², 1)": {"shape": (2**32, 1)},
}
"""Calls whose kernels are compiled; those with main False not for every target, nor held to full-width vectors."""


class HasDtype(Protocol):
    """A tensor, or what stands for one: compiling does not look at anything else of it."""

    @property
    def dtype(self) -> torch.dtype: ...


Pointers = Sequence[HasDtype | None]


class Launch(NamedTuple):
    """What a verb gives to `gpu.launch`."""

    kernel: Any
    grid: int
    pointers: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]


def recorded(
    shape: tuple[int, ...],
    dtype: torch.dtype = BF16,
    layout: str = "contiguous",
    dy_layout: str | None = None,
    activation: str | None = None,
    residual: bool = False,
    masked: bool = False,
    running: bool = True,
    momentum: float | None = None,
    main: bool = True,
) -> list[Launch]:
    """The launches of a training step, or of the verbs alone where nothing is running; tensors without storage."""

    def meta(*size: int, of: torch.dtype = dtype, layout: str = "contiguous") -> Tensor:
        return in_layout(torch.empty(size, dtype=of, device="meta"), layout)

    x, dy = meta(*shape, layout=layout), meta(*shape, layout=dy_layout or layout)
    wide = F64 if dtype == F64 else F32
    weight, bias, mean, var = (meta(shape[1], of=wide) for _ in range(4))
    mask = meta(shape[0], *shape[2:], of=torch.bool) if masked else None
    added = meta(*shape, layout=layout) if residual else None
    epilogue = Epilogue(weight, bias, added, mask, activation)
    kept = epilogue if activation or not running else epilogue._replace(residual=None)
    statistics = Running(mean, var, meta(of=torch.int64), momentum) if running else None
    needs_dresidual = residual and (activation is not None or masked)
    seen: list[Launch] = []
    with mock.patch.object(gpu, "launch", lambda *given: seen.append(Launch(*given))):
        sums = gpu.batch_sums(x, mask)
        _, mean, invstd = gpu.normalize(x, sums, epilogue, 1e-5, statistics)
        dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, kept)
        gpu.grad_input(dy, x, mean, invstd, kept, dsums, sums[-3:-2], needs_dresidual)
    return seen


def launches(*args: Any, **kwargs: Any) -> list[tuple[Any, tuple[Tensor | None, ...], tuple[float, ...]]]:
    """kernel, pointers and numbers of each launch of a training step."""
    return [(each.kernel, each.pointers, each.numbers) for each in recorded(*args, **kwargs)]


def options_of(kernel: Any) -> dict[str, Any]:
    """Triton's options; a Kernel of an earlier version has only its number of warps."""
    return getattr(kernel, "options", None) or {"num_warps": kernel.warps, "enable_fp_fusion": False}


def compile_for(target: GPUTarget, kernel: Any, pointers: Pointers, numbers: Sequence[float]) -> Any:
    """What Triton's dispatch compiles for these arguments and looks up on disk: pointers begin at 16 bytes.

    Its attributes are part of what it looks up, empty ones too: those of a pointer whose alignment does not count and
    of constants, before Triton 3.7 only of those that are strings.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = (*pointers, *numbers, *kernel.constants.values())
    for at, (parameter, value) in enumerate(zip(kernel.function.params, values, strict=True)):
        if value is None or at >= len(pointers) + len(numbers):
            signature[parameter.name], constants[at,] = "constexpr", value
            if isinstance(value, str) or ALL_CONSTANTS_HAVE_ATTRIBUTES:
                attributes[at,] = []
        elif at < len(pointers):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[at,] = [] if parameter.do_not_specialize_on_alignment else [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
    source = ASTSource(kernel.function, signature, constants, attributes)
    return triton.compile(source, target=target, options=options_of(kernel))


class _Device:
    """Of a driver, what Triton's dispatch asks before it compiles."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


def dispatched(target: GPUTarget, kernel: Any, pointers: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> Any:
    """What Triton's dispatch compiles for these arguments, by itself."""
    driver.set_active(_Device(target))
    given = kernel.constants | options_of(kernel)
    return kernel.function.warmup(*pointers, *numbers, grid=(1, 1, 1), **given)


def measure(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers, spills, and how many global accesses of streaming loops are of 128 bits or more."""
    if target.backend == "hip":
        spills = re.findall(r"\.(?:s|v)gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
        registers = re.findall(r"\.vgpr_count:\s*(\d+)", compiled.asm["amdgcn"])
        return {"registers": int(registers[0]), "local": sum(map(int, spills + scratch))}
    code = machine_code.read(compiled.asm["cubin"], compiled.metadata.shared)
    widths = [width for loop in code.streaming() for width in loop.widths()]
    wide = sum(width >= 16 for width in widths)
    return {"registers": code.registers, "local": code.local, "wide": wide, "accesses": len(widths)}


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    for call, given in CALLS.items():
        for kernel, pointers, numbers in launches(**given):
            for target in targets if given.get("main", True) or len(targets) == 1 else SECONDARY:
                arguments = (TARGETS[target], kernel, pointers, numbers)
                compiled = compile_for(*arguments)
                is_cuda = TARGETS[target].backend == "cuda"  # AMD's dispatch looks at sizes, too
                yield {
                    "call": call,
                    "main": given.get("main", True),
                    "kernel": kernel.function.__name__,
                    "target": target,
                    "is_dispatched": not is_cuda or dispatched(*arguments).hash == compiled.hash,
                    **measure(compiled, TARGETS[target]),
                }


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or ["sm_80", "sm_90", "sm_100"]):
        print(json.dumps(row), flush=True)
