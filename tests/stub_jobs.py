"""What the process on the stub driver is asked: what the driver is given for a call, in every way a call can go."""

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

import syncbn
from syncbn import backends
from syncbn.backends import Epilogue, Running
from tests.oracle import in_layout
from tests.stub_device import STREAM, Launch, stub


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
    """One training step by gpu.py."""
    from syncbn.backends import gpu

    x, dy, epilogue, running = tensors(given)
    sums = gpu.batch_sums(x, epilogue.mask)
    _, mean, invstd = gpu.normalize(x, sums, epilogue, 1e-5, running)
    dsums, _, _ = gpu.grad_sums(dy, x, mean, invstd, epilogue)
    gpu.grad_input(dy, x, mean, invstd, epilogue, dsums, sums[-1:], given.residual)
    gpu.grad_input(dy, x, mean, invstd, epilogue, None, sums[-1:], True)


def every_argument_arrives(given: Given) -> int:
    """Two steps: all that gpu.py hands over is what the driver gets, by name and value; the number of launches."""
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
        gpu.grad_input(dy, x, mean_now, invstd, epilogue, dsums, sums[-1:], False)
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


class Step(NamedTuple):
    """What the driver was given for a layer's forward and backward, and where its tensors are."""

    launches: list[Launch]
    at: dict[str, int | None]


def layer_step(layer: syncbn.SyncBatchNorm, given: Given, steps: int) -> list[Step]:
    """The launches of each of `steps` training steps with the same leaves."""
    x, dy, epilogue, _ = tensors(given)
    x.requires_grad_()
    residual = None if epilogue.residual is None else epilogue.residual.requires_grad_()
    leaves = [t for t in (x, layer.weight, layer.bias, residual) if t is not None]
    done = []
    with backends.force("gpu"):
        for _ in range(steps):
            stub().launches.clear()
            y = layer(x, residual)
            grads = torch.autograd.grad(y, leaves, dy)
            at = {"x": x, "dy": dy, "y": y, "residual": residual, "weight": layer.weight, "bias": layer.bias}
            at |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
            at |= {"tracked": layer.num_batches_tracked}
            at |= dict(zip(("dx", "dweight", "dbias", "dresidual"), grads, strict=False))
            done.append(Step(list(stub().launches), {k: None if t is None else t.data_ptr() for k, t in at.items()}))
    return done


def the_direct_way_is_the_same(given: Given) -> list[str]:
    """Steps 2 and 3 are launched directly, with the kernels, grids and numbers of step 1, each given what it needs."""
    from syncbn import direct

    layer = syncbn.SyncBatchNorm(given.shape[1], activation=given.activation)
    ways = []
    applied = direct._apply
    direct._apply = lambda *args: (ways.append("direct"), applied(*args))[1]
    try:
        first, *others = layer_step(layer, given, 3)
    finally:
        direct._apply = applied
    for step in (first, *others):
        check_flow(step, given)
        for mine, right in zip(step.launches, first.launches, strict=True):
            assert (mine.function, mine.grid, mine.block) == (right.function, right.grid, right.block)
            assert _numbers(mine) == _numbers(right)
    return ways


def check_flow(step: Step, given: Given) -> None:
    """What a kernel is given is the caller's tensor, or what the kernel before it left."""
    sums, normalized, dsums, inputs = (launch.values for launch in step.launches)
    at = step.at
    assert all(launch.stream == STREAM for launch in step.launches)
    assert {values["x_ptr"] for values in (sums, normalized, dsums, inputs)} == {at["x"]}
    assert {values["dy_ptr"] for values in (dsums, inputs)} == {at["dy"]}
    for values in (normalized, dsums, inputs):
        assert (values["weight_ptr"], values["bias_ptr"]) == (at["weight"], at["bias"])
    assert normalized["y_ptr"] == at["y"]
    for name in ("running_mean", "running_var", "tracked"):
        assert normalized[name + "_ptr"] == at[name]
    assert normalized["sums_ptr"] == sums["sums_ptr"]
    for name in ("mean_ptr", "invstd_ptr"):
        assert normalized[name] == dsums[name] == inputs[name]
    assert inputs["dsums_ptr"] == dsums["dsums_ptr"]
    assert inputs["count_ptr"] == sums["sums_ptr"] + 16 * given.shape[1]
    assert (dsums["dweight_ptr"], dsums["dbias_ptr"]) == (at["dweight"], at["dbias"])
    assert inputs["dx_ptr"] == at["dx"]
    if given.residual and given.activation is not None:
        assert normalized["residual_ptr"] == dsums["residual_ptr"] == at["residual"]
        assert inputs["dresidual_ptr"] == at["dresidual"]
    assert len({values["sums_ptr"] for values in (sums,)} | {normalized["mean_ptr"], normalized["invstd_ptr"]}) == 3


def _numbers(launch: Launch) -> dict[str, float]:
    return {name: value for name, value in launch.values.items() if not name.endswith("_ptr")}


def ways_of(what: str) -> list[bool]:
    """Whether each of four steps went the direct way, the third under an unusual circumstance."""
    import triton

    from syncbn import direct

    given = Given((4, 32, 4, 4), residual=False)
    layer = syncbn.SyncBatchNorm(32, activation="relu")
    ways, heard = [], []
    applied = direct._apply
    direct._apply = lambda *args: (ways.append(True), applied(*args))[1]
    hook = triton.knobs.runtime.launch_enter_hook
    taken = []
    try:
        for step in range(4):
            ways.clear()
            now = given
            if step == 2:
                if what == "hook":
                    hook.add(heard.append)
                elif what == "address":
                    now = given._replace(offset=1)
                elif what == "dtype":
                    layer.half()
                elif what == "data":
                    layer.weight.data = torch.ones(32)
                elif what == "parameter":
                    layer.weight = torch.nn.Parameter(torch.ones(32))
            with stub().capturing() if what == "capture" and step == 2 else torch.enable_grad():
                layer_step(layer, now, 1)
            if step == 2 and what == "hook":
                hook.remove(heard.append)
                assert len(heard) == 4, "a launch was kept from the hook"
            taken.append(bool(ways))
    finally:
        direct._apply = applied
    return taken
