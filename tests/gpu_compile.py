"""Compiles the kernels that a call would launch, without a device, and prints what the machine code is like.

    python -m tests.gpu_compile [target ...]

A target is sm_80, sm_90, sm_100 or gfx942. One JSON line a kernel. A process of its own: Triton must not interpret.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from syncbn.backends import Epilogue, Running, gpu

POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SECONDARY = ["sm_90"]
NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
LAST = torch.channels_last

CALLS: dict[str, dict[str, Any]] = {
    "NCHW": {"shape": (32, 512, 28, 28), "activation": "relu", "residual": True},
    "NHWC": {"shape": (32, 256, 56, 56), "rows": True, "activation": "relu", "residual": True},
    "NHWC 3 channels": {"shape": (32, 3, 112, 112), "rows": True},
    "(N, C) float32": {"shape": (4096, 2048), "dtype": F32, "activation": "silu"},
    "NCHW 7": {"shape": (32, 2048, 7, 7), "activation": "relu", "residual": True, "main": False},
    "NCHW masked": {"shape": (8, 256, 56, 56), "activation": "relu", "masked": True, "main": False},
    "NHWC, dy NCHW": {"shape": (8, 256, 56, 56), "rows": True, "dy_rows": False, "main": False},
    "NCHW float64": {"shape": (8, 64, 56, 56), "dtype": F64, "activation": "silu", "main": False},
    "(2³², 1)": {"shape": (2**32, 1)},
}
"""Calls whose kernels are compiled; those with main False not for every target, nor held to full-width vectors."""


def launches(
    shape: tuple[int, ...],
    rows: bool = False,
    dy_rows: bool | None = None,
    dtype: torch.dtype = BF16,
    activation: str | None = None,
    residual: bool = False,
    masked: bool = False,
    main: bool = True,
) -> list[tuple[Any, tuple[Tensor | None, ...], tuple[float, ...]]]:
    """kernel, pointers and numbers of each launch of a training step; tensors without storage."""
    seen: list[tuple[Any, tuple[Tensor | None, ...], tuple[float, ...]]] = []
    gpu.launch = lambda kernel, grid, pointers, numbers: seen.append((kernel, pointers, numbers))

    def meta(*size: int, of: torch.dtype = dtype, rows: bool = False) -> Tensor:
        t = torch.empty(size, dtype=of, device="meta")
        return t.to(memory_format=LAST) if rows and len(size) == 4 else t

    x, dy = meta(*shape, rows=rows), meta(*shape, rows=rows if dy_rows is None else dy_rows)
    wide = F64 if dtype == F64 else F32
    weight, bias, mean, var = (meta(shape[1], of=wide) for _ in range(4))
    mask = meta(shape[0], *shape[2:], of=torch.bool) if masked else None
    epilogue = Epilogue(weight, bias, torch.empty_like(x) if residual else None, mask, activation)
    sums = gpu.batch_sums(x, mask)
    running = Running(mean, var, meta(of=torch.int64), None)
    _, mean, invstd = gpu.normalize(x, sums, epilogue, 1e-5, running)
    dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, epilogue)
    gpu.grad_input(dy, x, mean, invstd, epilogue, dsums, sums[-1:], residual)
    return seen


def compile_for(target: GPUTarget, kernel: Any, pointers: tuple[Tensor | None, ...], numbers: tuple[float, ...]) -> Any:
    """What Triton's dispatch compiles for these arguments: 16-byte aligned pointers, unspecialised integers."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = (*pointers, *numbers, *kernel.constants.values())
    for at, (parameter, value) in enumerate(zip(kernel.function.params, values, strict=True)):
        if value is None or at >= len(pointers) + len(numbers):
            signature[parameter.name], constants[at,] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name], attributes[at,] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if abs(value) < 2**31 else "i64"
    source = ASTSource(kernel.function, signature, constants, attributes)
    return triton.compile(source, target=target, options={"num_warps": kernel.warps, "enable_fp_fusion": False})


def measure(compiled: Any, target: GPUTarget) -> dict[str, int]:
    """Registers, spills, and how many global accesses inside loops are of 128 bits."""
    if target.backend == "hip":
        spills = re.findall(r"\.(?:s|v)gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        scratch = re.findall(r"\.private_segment_fixed_size:\s*(\d+)", compiled.asm["amdgcn"])
        registers = re.findall(r"\.vgpr_count:\s*(\d+)", compiled.asm["amdgcn"])
        return {"registers": int(registers[0]), "local": sum(map(int, spills + scratch))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found is not None, usage
    registers, stack, local = map(int, found.groups())
    wide, accesses = _streaming(code)
    return {"registers": registers, "local": stack + local, "wide": wide, "accesses": accesses}


def _tool(name: str, *args: str) -> str:
    return subprocess.run([NVIDIA_TOOLS / name, *args], capture_output=True, text=True, check=True).stdout


def _streaming(code: str) -> tuple[int, int]:
    """Global accesses of 128 bits, and all, in loops; not in those over float64 partials, which add with DADD."""
    lines = code.splitlines()
    labels = {line.split(":")[0]: at for at, line in enumerate(lines) if re.match(r"\.L_x_\d+:", line)}
    wide = accesses = 0
    for at, line in enumerate(lines):
        jump = re.search(r"BRA\S*\s.*`\((\.L_x_\d+)\)", line)
        if jump is None or labels.get(jump[1], at) >= at:
            continue
        body = lines[labels[jump[1]] : at]
        if not any("DADD" in each for each in body):
            memory = re.findall(r"\b(?:LDG|STG)\.\S+", "\n".join(body))
            accesses += len(memory)
            wide += sum(".128" in each for each in memory)
    return wide, accesses


def rows(targets: list[str]) -> Iterator[dict[str, Any]]:
    for call, given in CALLS.items():
        for kernel, pointers, numbers in launches(**given):
            for target in targets if given.get("main", True) or len(targets) == 1 else SECONDARY:
                compiled = compile_for(TARGETS[target], kernel, pointers, numbers)
                yield {
                    "call": call,
                    "main": given.get("main", True),
                    "kernel": kernel.function.__name__,
                    "target": target,
                    "threads": 32 * kernel.warps,
                    **measure(compiled, TARGETS[target]),
                }


if __name__ == "__main__":
    for row in rows(sys.argv[1:] or ["sm_80", "sm_90", "sm_100"]):
        print(json.dumps(row), flush=True)
