"""What the process on the stub driver is asked about calls that are alike: which way they go, with which arguments."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import syncbn
from benchmarks import resnet
from syncbn import backends, calls, fingerprint
from syncbn.backends import gpu_report, gpu_workspace, reference
from syncbn.names import BACKWARD, FORWARD, Call
from tests.support.cpu_backends import ON_CPU
from tests.support.stub_device import STREAM, Launch, stub
from tests.support.stub_jobs import Given, tensors


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


@contextlib.contextmanager
def told_ways() -> Iterator[list[str]]:
    """Which steps of direct.py are taken meanwhile."""
    from syncbn import direct

    ways: list[str] = []
    applied, gradients = direct._apply, direct.gradients
    direct._apply = lambda *args: (ways.append("direct"), applied(*args))[1]
    direct.gradients = lambda *args: (ways.append("readable backward"), gradients(*args))[1]
    try:
        yield ways
    finally:
        direct._apply, direct.gradients = applied, gradients


def the_direct_way_is_the_same(given: Given) -> list[str]:
    """Steps 2 and 3 are launched directly, with the kernels, grids and numbers of step 1, each given what it needs."""
    from syncbn import direct

    direct._calls.clear()
    layer = syncbn.SyncBatchNorm(given.shape[1], activation=given.activation)
    with told_ways() as ways:
        first, *others = layer_step(layer, given, 3)
    for step in (first, *others):
        check_flow(step, given)
        for mine, right in zip(step.launches, first.launches, strict=True):
            assert (mine.function, mine.grid, mine.block) == (right.function, right.grid, right.block)
            assert _numbers(mine) == _numbers(right)
    return ways


@contextlib.contextmanager
def two_ranks() -> Iterator[None]:
    """The other rank makes the same calls, as their sums say; the device counts them from 1."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    original, turns = calls.all_sum, itertools.count(1)

    def all_sum(wire: Tensor, call: Call | None) -> Tensor:
        assert call is not None, "a group of two"
        reference.stamped(wire, call.tag)[-2:] *= 2
        original(wire, call)
        call.turn = next(turns)
        return wire

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    calls.all_sum = all_sum
    try:
        yield
    finally:
        calls.all_sum = original
        dist.destroy_process_group()


def both_ways_tell_the_device_alike(given: Given) -> list[str]:
    """On two ranks, steps in both ways: tags of the layer's calls, turns in order, the report's address."""
    from syncbn import direct

    layer = syncbn.SyncBatchNorm(given.shape[1], activation=given.activation)
    direct._calls.clear()
    with told_ways() as ways, two_ranks():
        steps = layer_step(layer, given, 3)
    label, channels = layer._label, given.shape[1]
    forward = fingerprint.tag_of(label, FORWARD, channels, given.activation, True)
    backward = fingerprint.tag_of(label, BACKWARD, channels, given.activation, 1)
    assert 0 < forward != backward > 0
    for number, step in enumerate(steps):
        check_flow(step, given)
        marks = [(launch.values["tag"], launch.values.get("turn")) for launch in step.launches]
        turn = 2 * number
        assert marks == [(forward, None), (forward, turn + 1), (backward, None), (backward, turn + 2)]
    return ways


def a_forced_layer_is_direct(given: Given) -> list[str]:
    """The ways of three steps of the benchmarks' layer that communicates without need."""
    from syncbn import direct

    layer = resnet.ForcedOurs(given.shape[1], activation=given.activation)
    direct._calls.clear()
    with told_ways() as ways, two_ranks():
        layer_step(layer, given, 3)
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
    for work in gpu_workspace._workspaces.values():  # another thread's launch may come in between
        assert not 0 <= dsums["dsums_ptr"] - work.partials_at < 8 * work.most_partials
    assert inputs["count_ptr"] == sums["sums_ptr"] + 16 * given.shape[1]
    assert (dsums["dweight_ptr"], dsums["dbias_ptr"]) == (at["dweight"], at["dbias"])
    assert inputs["dx_ptr"] == at["dx"]
    if given.residual and given.activation is not None:
        assert normalized["residual_ptr"] == dsums["residual_ptr"] == at["residual"]
        assert inputs["dresidual_ptr"] == at["dresidual"]
    report = gpu_report.report_of(torch.device("cpu")).data_ptr()
    assert (normalized["report_ptr"], inputs["report_ptr"]) == (report, report)
    assert len({values["sums_ptr"] for values in (sums,)} | {normalized["mean_ptr"], normalized["invstd_ptr"]}) == 3


def _numbers(launch: Launch) -> dict[str, float]:
    return {name: value for name, value in launch.values.items() if not name.endswith("_ptr")}


def change(layer: syncbn.SyncBatchNorm, what: str, flat: torch.Tensor) -> None:
    """Give the layer other parameters; its weight is the beginning of flat."""
    if what == "dtype":
        layer.half()
    elif what == "data":
        layer.weight.data = torch.ones(32)
    elif what == "dtype at the same address":
        layer.weight.data = flat.view(torch.bfloat16)[:32]
    elif what == "strides at the same address":
        layer.weight.data = flat[::2]
    elif what == "parameter":
        layer.weight = torch.nn.Parameter(torch.ones(32))


def ways_of(what: str) -> list[bool]:
    """Whether each of four steps went the direct way, the third under an unusual circumstance."""
    import triton

    from syncbn import direct

    direct._calls.clear()
    given = Given((4, 32, 4, 4), residual=False)
    layer = syncbn.SyncBatchNorm(32, activation="relu")
    flat = torch.ones(64)
    layer.weight.data = flat[:32]
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
                change(layer, what, flat)
            with stub().capturing() if what == "capture" and step == 2 else torch.enable_grad():
                layer_step(layer, now, 1)
            if step == 2 and what == "hook":
                hook.remove(heard.append)
                assert len(heard) == 4, "a launch was kept from the hook"
            taken.append(bool(ways))
    finally:
        direct._apply = applied
    return taken


def backward_is_direct(what: str) -> bool:
    """Whether the backward of a direct forward is launched directly, after a change in between."""
    from syncbn import direct

    given, flat = Given((4, 32, 4, 4), residual=False), torch.ones(2, 64)
    layer = syncbn.SyncBatchNorm(32, activation="relu")
    layer.weight.data, layer.bias.data = flat[0, :32], flat[1, :32]
    layer_step(layer, given, 1)
    x, dy, _, _ = tensors(given)
    with backends.force("gpu"):
        y = layer(x.requires_grad_())
    if what == "weight":
        layer.weight.data = flat[0].view(torch.bfloat16)[:32]
    elif what == "bias":
        layer.bias.data = flat[1, ::2]
    elif what == "x":
        x.data = x.data.to(memory_format=torch.channels_last)
    elif what == "dy":
        dy = dy.to(memory_format=torch.channels_last)
    readable, gradients = [], direct.gradients
    direct.gradients = lambda *args: (readable.append(what), gradients(*args))[1]
    try:
        if what == "a batch of dy":
            torch.autograd.grad(y, x, torch.stack([dy, dy]), is_grads_batched=True, retain_graph=True)
            torch.vmap(lambda dy: torch.autograd.grad(y, x, dy, retain_graph=True)[0])(torch.stack([dy, dy]))
        else:
            torch.autograd.grad(y, x, dy)
    finally:
        direct.gradients = gradients
    return not readable


def a_forced_backend_is_obeyed() -> int:
    """The launches of a call that is known, while another back-end is asked for."""
    layer, given = syncbn.SyncBatchNorm(32), Given((4, 32, 4, 4), activation=None, residual=False)
    layer_step(layer, given, 2)
    stub().launches.clear()
    with backends.force(ON_CPU):
        layer(tensors(given)[0].float().requires_grad_())
        layer(tensors(given)[0].requires_grad_())
    return len(stub().launches)


def knowing_a_call_costs_no_memory() -> list[str]:
    """What is allocated of an activation's size when a call becomes known, after ranks have communicated."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from syncbn import direct

    made: list[str] = []
    x, _, epilogue, running = tensors(Given((4, 32, 4, 4)))

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            made.extend([str(func)] if result.numel() >= x.numel() and result.device.type == "cpu" else [])
            return result

    direct._calls.clear()
    with backends.force("gpu"), Watch():
        direct.remember(x, epilogue, running)
    assert len(direct._calls) == 1
    return made


def unusual_calls_are_known_as_such() -> int:
    """How often what a crop would need is worked out in three calls."""
    from syncbn import direct
    from syncbn.backends import gpu_direct

    direct._calls.clear()
    asked, launches_for = [], gpu_direct.launches_for
    gpu_direct.launches_for = lambda *args: (asked.append(None), launches_for(*args))[1]
    try:
        layer_step(syncbn.SyncBatchNorm(6), Given((4, 6, 5, 8), "sliced", activation=None, residual=False), 3)
    finally:
        gpu_direct.launches_for = launches_for
    return len(asked)
