"""What the process on the stub driver is asked: what the driver is given for a call, in every way a call can go."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn.formulas import Epilogue, Running
from tests.support.oracle import in_layout
from tests.support.stub_device import STREAM, stub

TAGS = 54321.0, float(2**20 - 1)
"""Of a step's forward and backward."""


class Given(NamedTuple):
    """A training step's tensors."""

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: torch.dtype = torch.bfloat16
    activation: str | None = "relu"
    residual: bool = True
    masked: bool = False
    affine: bool = True
    track: bool = True
    momentum: float | None = 0.1
    offset: int = 0  # elements before x's first


def tensors(given: Given) -> tuple[Tensor, Tensor, Epilogue, Running | None]:
    """x, dy, epilogue, running"""

    def activation_like() -> Tensor:
        t = in_layout(torch.zeros(given.shape, dtype=given.dtype), given.layout)
        if not given.offset:
            return t
        storage = torch.zeros(t.numel() + given.offset, dtype=given.dtype)
        return storage[given.offset :].as_strided(t.shape, t.stride(), given.offset)

    channels = given.shape[1]
    wide = torch.float64 if given.dtype == torch.float64 else torch.float32
    weight, bias = (
        (torch.ones(channels, dtype=wide), torch.zeros(channels, dtype=wide)) if given.affine else (None,) * 2
    )
    mask = torch.ones(given.shape[0], *given.shape[2:], dtype=torch.bool) if given.masked else None
    residual = activation_like() if given.residual else None
    running = None
    if given.track:
        buffers = torch.zeros(channels, dtype=wide), torch.ones(channels, dtype=wide)
        running = Running(*buffers, torch.tensor(0), given.momentum)
    return activation_like(), activation_like(), Epilogue(weight, bias, residual, mask, given.activation), running


@contextmanager
def told() -> Iterator[list[tuple[Any, int, tuple[Tensor | None, ...], tuple[float, ...]]]]:
    """What gpu.py hands to `launch` meanwhile."""
    from syncbn.backends import gpu, gpu_launch

    calls: list[tuple[Any, int, tuple[Tensor | None, ...], tuple[float, ...]]] = []

    def launch(*call: Any) -> None:
        calls.append(call)
        gpu_launch.launch(*call)

    gpu.launch = launch
    try:
        yield calls
    finally:
        gpu.launch = gpu_launch.launch


def verbs(given: Given) -> None:
    """One training step by gpu.py, its sums over ranks the third and fourth on the device."""
    from syncbn.backends import gpu

    x, dy, epilogue, running = tensors(given)
    sums = gpu.batch_sums(x, epilogue.mask, TAGS[0])
    _, mean, invstd = gpu.normalize(x, sums, epilogue, 1e-5, running, TAGS[0], 3)
    dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, epilogue, TAGS[1])
    gpu.grad_input(dy, x, mean, invstd, epilogue, dsums, sums[-3:-2], given.residual, TAGS[1], 4)
    gpu.grad_input(dy, x, mean, invstd, epilogue, None, sums[-3:-2], True)


def every_argument_arrives(given: Given) -> int:
    """Two steps: all that gpu.py hands over is what the driver gets, by name and value; the number of launches.

    Kernels are told the call's tag, and those after the sum over the ranks its turn and where to report.
    """
    from syncbn.backends import gpu_report

    report = gpu_report.report_of(torch.device("cpu")).data_ptr()
    with told() as calls:
        stub().launches.clear()
        verbs(given)
        loads = stub().module_loads
        verbs(given)
    assert stub().module_loads == loads, "the second step loaded a module"
    assert len(calls) == len(stub().launches)
    for (kernel, grid, pointers, numbers), launch in zip(calls, stub().launches, strict=True):
        names = kernel.function.arg_names[: len(pointers) + len(numbers)]
        right = {
            name: _bits(value) for name, value in zip(names, (*pointers, *numbers), strict=True) if value is not None
        }
        assert launch.values == right, kernel.function.__name__
        assert (launch.kernel, launch.grid) == (kernel.function.__name__, grid)
        assert (launch.block, launch.stream) == (32 * kernel.options["num_warps"], STREAM)
    for each, launch in enumerate(stub().launches):
        tag, turn = ((TAGS[0], None), (TAGS[0], 3), (TAGS[1], None), (TAGS[1], 4), (0.0, 0))[each % 5]
        assert launch.values["tag"] == tag
        assert launch.values.get("turn") == turn
        assert launch.values.get("report_ptr") == (None if turn is None else report)
    return len(calls)


def _bits(value: Tensor | float) -> float:
    if isinstance(value, Tensor):
        return value.data_ptr()
    return float(struct.unpack("f", struct.pack("f", value))[0]) if isinstance(value, float) else value


def captured_calls_load_nothing(given: Given) -> None:
    """After three warm-up steps four captured ones run, each with semaphores of its own, from a shuffled arena."""
    from syncbn.backends import gpu_workspace

    gpu_workspace._arenas[0] = [torch.zeros(1 << 16, dtype=torch.int32)[1:]]
    for _ in range(3):
        verbs(given)
    with stub().capturing():
        stub().launches.clear()
        for _ in range(4):
            verbs(given)
    used = [launch.values["semaphores_ptr"] for launch in stub().launches if "semaphores_ptr" in launch.values]
    assert len(used) == len(set(used)) > 0


def parameters_may_begin_anywhere() -> int:
    """Parameters and buffers that are slices of flat tensors, at every offset, take no module of their own."""
    from syncbn.backends import gpu

    x, dy, _, _ = tensors(Given((4, 32, 4, 4)))
    flat = torch.zeros(4, 40)
    loads = []
    for offset in range(5):
        weight, bias, mean, var = flat[:, offset : offset + 32].unbind()
        epilogue, running = Epilogue(weight, bias), Running(mean, var, torch.tensor(0), 0.1)
        sums = gpu.batch_sums(x, None)
        _, mean_now, invstd = gpu.normalize(x, sums, epilogue, 1e-5, running)
        dsums, _, _ = gpu.grad_sums(dy, x, mean_now, invstd, epilogue)
        gpu.grad_input(dy, x, mean_now, invstd, epilogue, dsums, sums[-3:-2], False)
        loads.append(stub().module_loads)
    return loads[-1] - loads[0]


def devices_have_their_own_kernels() -> None:
    """The same call on another device loads its own module, and each goes on with its own."""
    from syncbn.backends import gpu

    seen: dict[int, set[int]] = {0: set(), 1: set()}
    for turn in (0, 1, 0, 1):
        stub().device = turn
        stub().launches.clear()
        gpu.batch_sums(torch.zeros((4, 48, 4, 4), device="cpu" if turn == 0 else "meta"), None)
        seen[turn].add(stub().launches[0].function)
    stub().device = 0
    assert [len(functions) for functions in seen.values()] == [1, 1]
    assert not seen[0] & seen[1]
