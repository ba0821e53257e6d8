"""timm's layers with an activation: it runs inside of ours only where nobody can notice."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

import syncbn
from tests.support.fake_torchvision import timm
from tests.support.layer_runs import compiled as compiled_whole
from tests.support.oracle import UNIT, error

pytestmark = pytest.mark.filterwarnings("ignore")  # timm's own warnings about itself
Heard = list[str]
Listen = Callable[[Any, Heard], contextlib.AbstractContextManager[None] | None]


def timm_layer(act: type = nn.ReLU, **kwargs: Any) -> Any:
    torch.manual_seed(2)
    return timm("timm.layers").BatchNormAct2d(3, act_layer=act, inplace=False, **kwargs).double()


def own_forward(layer: Any, heard: Heard) -> None:
    forward = layer.act.forward
    layer.act.forward = lambda x: (heard.append("forward"), 2 * forward(x))[1]


def own_call_impl(layer: Any, heard: Heard) -> None:
    layer.act._call_impl = lambda x: (heard.append("call"), x.abs())[1]


def forward_hook(layer: Any, heard: Heard) -> None:
    layer.act.register_forward_hook(lambda *_: heard.append("forward"))


def forward_pre_hook(layer: Any, heard: Heard) -> None:
    layer.act.register_forward_pre_hook(lambda m, args: (heard.append("pre"), (args[0] + 1,))[1])


def backward_hook(layer: Any, heard: Heard) -> None:
    layer.act.register_full_backward_hook(lambda m, dx, dy: (heard.append("backward"), (3 * dx[0],))[1])


def backward_pre_hook(layer: Any, heard: Heard) -> None:
    layer.act.register_full_backward_pre_hook(lambda m, dy: (heard.append("backward"), (dy[0] / 2,))[1])


def drop_hook(layer: Any, heard: Heard) -> None:
    layer.drop.register_forward_hook(lambda m, args, y: (heard.append("drop"), y - 1)[1])


def drop_backward_pre_hook(layer: Any, heard: Heard) -> None:
    layer.drop.register_full_backward_pre_hook(lambda m, dy: (heard.append("drop"), (dy[0] * 5,))[1])


def own_drop(layer: Any, heard: Heard) -> None:
    layer.drop.forward = lambda x: (heard.append("drop"), x / 2)[1]


def replaced(layer: Any, heard: Heard) -> None:
    class Mine(nn.ReLU):
        def forward(self, x: Tensor) -> Tensor:
            heard.append("mine")
            return x.sigmoid()

    layer.act = Mine()


def reparametrized(layer: Any, heard: Heard) -> None:
    class Scale(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            heard.append("scale")
            return w * 3

    layer.act = nn.PReLU(dtype=torch.float64)
    parametrize.register_parametrization(layer.act, "weight", Scale())
    heard.clear()


def another_slope(layer: Any, heard: Heard) -> None:
    layer.act = nn.LeakyReLU(0.2)
    forward_hook(layer, heard)


def compiled(layer: Any, heard: Heard) -> None:
    """Where Module.compile puts what it makes; it makes nothing of torch's own modules."""
    layer.act._compiled_call_impl = lambda x: (heard.append("compiled"), x.relu())[1]


@contextlib.contextmanager
def global_hook(register: Any, hook: Any) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


def global_forward_hook(layer: Any, heard: Heard) -> Any:
    hook = lambda m, *_: heard.append("act") if m is layer.act else None  # noqa: E731  # as users write it
    return global_hook(torch_module.register_module_forward_hook, hook)


def global_forward_pre_hook(layer: Any, heard: Heard) -> Any:
    hook = lambda m, *_: heard.append("act") if m is layer.act else None  # noqa: E731
    return global_hook(torch_module.register_module_forward_pre_hook, hook)


def global_backward_hook(layer: Any, heard: Heard) -> Any:
    hook = lambda m, *_: heard.append("act") if m is layer.act else None  # noqa: E731
    return global_hook(torch_module.register_module_full_backward_hook, hook)


def global_backward_pre_hook(layer: Any, heard: Heard) -> Any:
    hook = lambda m, *_: heard.append("act") if m is layer.act else None  # noqa: E731
    return global_hook(torch_module.register_module_full_backward_pre_hook, hook)


@contextlib.contextmanager
def patch(owner: Any, name: str, heard: Heard) -> Iterator[None]:
    original = getattr(owner, name)

    def counted(*args: Any, **kwargs: Any) -> Any:
        if owner is not nn.Module or isinstance(args[0], nn.ReLU):
            heard.append(name)
        return original(*args, **kwargs)

    was_own = name in vars(owner)
    setattr(owner, name, counted)
    try:
        yield
    finally:
        setattr(owner, name, original) if was_own else delattr(owner, name)


def patched_class(layer: Any, heard: Heard) -> Any:
    return patch(nn.ReLU, "forward", heard)


def patched_class_call(layer: Any, heard: Heard) -> Any:
    return patch(nn.ReLU, "__call__", heard)


def patched_class_call_impl(layer: Any, heard: Heard) -> Any:
    return patch(nn.ReLU, "_call_impl", heard)


def patched_call_impl(layer: Any, heard: Heard) -> Any:
    return patch(nn.Module, "_call_impl", heard)


def patched_drop(layer: Any, heard: Heard) -> Any:
    return patch(nn.Identity, "forward", heard)


def patched_torch_function(layer: Any, heard: Heard) -> Any:
    return patch(torch, "relu", heard)


def patched_function(layer: Any, heard: Heard) -> Any:
    return patch(F, "relu", heard)


def patched_call(layer: Any, heard: Heard) -> Any:
    return patch(nn.Module, "__call__", heard)


class Mode(TorchFunctionMode):
    def __init__(self, heard: Heard) -> None:
        super().__init__()
        self.heard = heard

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.relu:
            self.heard.append("relu")
        return func(*args, **(kwargs or {}))


def function_mode(layer: Any, heard: Heard) -> Any:
    return Mode(heard)


LISTENERS: list[Listen] = [own_forward, own_call_impl, forward_hook, forward_pre_hook, backward_hook, backward_pre_hook]
LISTENERS += [drop_hook, drop_backward_pre_hook, own_drop, replaced, reparametrized, another_slope, compiled]
LISTENERS += [global_forward_hook, global_forward_pre_hook, global_backward_hook, global_backward_pre_hook]
LISTENERS += [patched_class, patched_function, patched_call, function_mode, patched_class_call, patched_call_impl]
LISTENERS += [patched_class_call_impl, patched_drop, patched_torch_function]


def step(layer: Any, listen: Listen) -> tuple[Heard, list[Tensor]]:
    """What was heard in a step, and its y and gradients."""
    heard: Heard = []
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 4, 3, 5, 5, dtype=torch.float64, generator=generator)
    x.requires_grad_()
    with listen(layer, heard) or contextlib.nullcontext():
        y = layer(x)
        y.backward(dy)
    return heard, [y.detach(), x.grad, layer.weight.grad, layer.bias.grad]


@pytest.mark.parametrize("listen", LISTENERS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("made", ["converted", "reverted"])
def test_whoever_listens_is_heard(listen: Listen, made: str) -> None:
    """Whatever is put on, in or around the activation is told and changes the numbers as on timm's own layer."""
    theirs = timm_layer()
    ours = syncbn.convert_sync_batchnorm(copy.deepcopy(theirs))
    if made == "reverted":
        ours = syncbn.revert_sync_batchnorm(syncbn.convert_sync_batchnorm(foreign(theirs)))
    heard, right = step(theirs, listen)
    assert heard
    heard_ours, actual = step(ours, listen)
    assert heard_ours == heard
    for mine, expected in zip(actual, right, strict=True):
        assert error(mine, expected) <= UNIT[torch.float64]


def foreign(layer: Any) -> nn.Module:
    """timm's own synchronized form of a layer, whose way back is a class of ours."""
    sync = timm("timm.layers.norm_act").SyncBatchNormAct(3)
    sync.load_state_dict(layer.state_dict())
    sync.drop, sync.act = copy.deepcopy(layer.drop), copy.deepcopy(layer.act)
    return sync.double()


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.LeakyReLU])
@pytest.mark.parametrize("default_device", [False, True])
def test_where_nobody_listens_it_is_fused(act: type, default_device: bool) -> None:
    """A bare activation runs inside the layer, also under a default device, which is a mode that hears of functions."""
    layer = syncbn.convert_sync_batchnorm(timm_layer(act))
    with torch.device("cpu") if default_device else contextlib.nullcontext():
        y = layer(torch.randn(4, 3, 5, 5).double())
    assert type(y.grad_fn).__name__.startswith("Normalize")


@pytest.mark.parametrize("train", [True, False])
def test_the_input_has_timms_name(train: bool) -> None:
    """layer(x=…) works after conversion as before, there and back."""
    layer = timm_layer().train(train)
    x = torch.randn(4, 3, 5, 5).double()
    right = copy.deepcopy(layer)(x=x)
    for swapped in (syncbn.convert_sync_batchnorm, syncbn.freeze, syncbn.unfreeze, syncbn.revert_sync_batchnorm):
        made = swapped(layer)
        if swapped is not syncbn.freeze:
            assert error(copy.deepcopy(made.train(train))(x=x), right) <= UNIT[torch.float64]


def test_timms_own_synchronized_layer_may_lack_both() -> None:
    """timm's SyncBatchNormAct without an activation or drop, which it allows, converts and runs."""
    bare = timm("timm.layers.norm_act").SyncBatchNormAct(3).double()
    x = torch.randn(4, 3, 5, 5).double()
    right = nn.BatchNorm2d(3).double()(x)
    assert error(syncbn.convert_sync_batchnorm(bare)(x), right) <= UNIT[torch.float64]


@pytest.mark.parametrize("act", [nn.ReLU, nn.SiLU, nn.GELU])
def test_a_compiler_sees_the_activation(act: type) -> None:
    """Compiled, the layer is one graph with its activation, and trains to timm's numbers; exported in eval, too."""
    theirs = timm_layer(act)
    ours = syncbn.convert_sync_batchnorm(copy.deepcopy(theirs))
    actual, right = (step(each, lambda *_: None)[1] for each in (compiled_whole(ours, "aot_eager"), theirs))
    for mine, expected in zip(actual, right, strict=True):
        assert error(mine, expected) <= UNIT[torch.float64]
    x = torch.randn(4, 3, 5, 5).double()
    program = torch.export.export(ours.eval(), (x,))
    assert error(program.module()(x), theirs.eval()(x).detach()) <= UNIT[torch.float64]
