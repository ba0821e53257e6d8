"""What was set on a layer object hides its class: swapping and freezing refuse it by path, or keep it."""

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn
from tests.support.oracle import UNIT, error
from tests.support.ranks import RankPool


def patched(layer: nn.Module) -> None:
    forward = layer.forward
    layer.forward = lambda x: forward(x)


def partial(layer: nn.Module) -> None:
    layer.forward = functools.partial(type(layer).forward, layer)


def bound(layer: nn.Module) -> None:
    layer.forward = types.MethodType(lambda self, x: type(self).forward(self, x), layer)


def hooked_as_by_accelerate(layer: nn.Module) -> None:
    """What accelerate.hooks.add_hook_to_module leaves: the old bound method, and a partial that looks like it."""
    layer._old_forward = layer.forward

    def new_forward(module: Any, *args: Any, **kwargs: Any) -> Tensor:
        return module._old_forward(*args, **kwargs)

    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer._old_forward)


def compiled(layer: nn.Module) -> None:
    layer.forward = torch.compile(layer.forward, backend="eager")


def call(layer: nn.Module) -> None:
    layer.__call__ = layer.forward


def call_impl(layer: nn.Module) -> None:
    layer._call_impl = layer.forward


def call_of_a_trace(layer: nn.Module) -> None:
    layer._slow_forward = layer.forward


OWN_CALLS: list[Callable[[nn.Module], None]] = [patched, partial, bound, hooked_as_by_accelerate, compiled]
OWN_CALLS += [call, call_impl, call_of_a_trace]
own_call = pytest.mark.parametrize("wrap", OWN_CALLS, ids=lambda f: f.__name__)
BEFORE: dict[str, Callable[[], nn.Module]] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
    "nn.SyncBatchNorm": lambda: nn.SyncBatchNorm(3),
    "lazy": nn.LazyBatchNorm2d,
}
SYNCHRONIZED: dict[str, Callable[[], nn.Module]] = {
    "converted": lambda: syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)),
    "built": lambda: syncbn.SyncBatchNorm(3, activation="relu"),
    "built for 2d": lambda: syncbn.SyncBatchNorm2d(3),
    "torch's": lambda: nn.SyncBatchNorm(3),
    "frozen": lambda: syncbn.freeze(syncbn.SyncBatchNorm(3)),
}


def nested(layer: nn.Module) -> nn.Module:
    """At 'body.1', behind one that can be swapped."""
    first = nn.BatchNorm2d(3) if type(layer) is nn.BatchNorm2d else syncbn.SyncBatchNorm(3)
    return nn.ModuleDict({"body": nn.Sequential(first, layer)})


def assert_refused(call: Callable[[nn.Module], Any], net: nn.Module, text: str) -> None:
    """A TypeError with the layer's path, and nothing of the net has changed."""
    before = [(type(m), dict(m.__dict__)) for m in net.modules()]
    with pytest.raises(TypeError, match=text):
        call(net)
    assert [(type(m), dict(m.__dict__)) for m in net.modules()] == before


@own_call
@pytest.mark.parametrize("make", BEFORE.values(), ids=BEFORE)
def test_a_call_of_its_own_is_not_converted(wrap: Callable[[nn.Module], None], make: Callable[[], nn.Module]) -> None:
    """A layer with a call of its own is refused by its path, or skipped and reported; never converted and silent."""
    layer = make()
    wrap(layer)
    net, cls = nested(layer), type(layer)
    assert_refused(syncbn.convert_sync_batchnorm, net, r"set on the object.* at 'body\.1'.*on_unknown='skip'")
    syncbn.convert_sync_batchnorm(net, on_unknown="skip")
    assert type(layer) is cls
    row = syncbn.conversion_report(net)[1]
    assert row.status == "left alone"
    assert row.why.endswith("was set on the object")


def _pause(net: nn.Module) -> None:
    with syncbn.plain(net):
        raise AssertionError("not to be reached")


@own_call
@pytest.mark.parametrize("make", SYNCHRONIZED.values(), ids=SYNCHRONIZED)
@pytest.mark.parametrize("leave", [syncbn.revert_sync_batchnorm, _pause], ids=["revert", "plain"])
def test_a_call_of_its_own_is_not_reverted(
    wrap: Callable[[nn.Module], None], make: Callable[[], nn.Module], leave: Callable[[nn.Module], Any]
) -> None:
    """A synchronized layer that was wrapped afterwards is refused by its path, before the block, and still runs."""
    layer = make()
    wrap(layer)
    net = nested(layer)
    assert_refused(leave, net, r"set on the object.* at 'body\.1'")


@pytest.mark.parametrize("make", [lambda: nn.BatchNorm2d(3), SYNCHRONIZED["converted"]], ids=["plain", "converted"])
@pytest.mark.parametrize("wrap", [patched, partial, bound, hooked_as_by_accelerate, call], ids=lambda f: f.__name__)
def test_a_frozen_layer_keeps_its_call(wrap: Callable[[nn.Module], None], make: Callable[[], nn.Module]) -> None:
    """Freezing and thawing change no forward: one that was set on the object goes on, with the running statistics."""
    layer = make()
    layer(torch.randn(4, 3, 5, 5))
    x = torch.randn(4, 3, 5, 5)
    right = layer.eval()(x)
    wrap(layer)
    net = syncbn.freeze(nn.Sequential(layer).train()).train()
    assert torch.equal(net(x), right)
    syncbn.unfreeze(net)
    assert net[0].training
    net(x)
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("convert", [False, True])
def test_a_train_of_its_own_cannot_be_frozen_or_thawed(frozen: bool, convert: bool) -> None:
    """A layer whose own train decides its mode is refused by freeze and by unfreeze."""
    layer = nn.BatchNorm2d(3)
    net = nn.Sequential(nn.BatchNorm2d(3), layer)
    if convert:
        syncbn.convert_sync_batchnorm(net)
    if frozen:
        syncbn.freeze(net)
    layer.train = lambda mode=True: layer
    assert_refused(syncbn.freeze, net, "train that was set on the object.* at '1'")
    if frozen:
        assert_refused(syncbn.unfreeze, net, "train that was set on the object.* at '1'")


def _kept() -> None:
    """A check and a train that were set on the object are no call: they stay, and the layer is synchronized."""
    modes: list[bool] = []
    layer = nn.BatchNorm2d(3).double()
    layer._check_input_dim = lambda x: None
    layer.train = lambda mode=True: (modes.append(mode), nn.Module.train(layer, mode))[1]
    own = layer.train, layer._check_input_dim
    syncbn.convert_sync_batchnorm(layer)
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    x = torch.randn(4 * size, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    right = nn.BatchNorm1d(3).double()
    mine = slice(4 * rank, 4 * rank + 4)
    assert error(layer(x[mine]), right(x)[mine]) <= UNIT[torch.float64]
    nn.Sequential(layer).eval()
    assert (modes, layer.training) == ([False], False)
    with syncbn.plain(layer):
        assert error(layer(x[mine]), right.eval()(x)[mine]) <= UNIT[torch.float64]
    syncbn.revert_sync_batchnorm(layer)
    assert type(layer) is nn.BatchNorm2d
    assert (layer.train, layer._check_input_dim) == own
    assert error(layer(x[mine]), right(x)[mine]) <= UNIT[torch.float64]


def test_a_check_and_a_train_of_its_own_are_kept(ranks: RankPool) -> None:
    """On one rank and two they go through conversion, `plain` and reverting; the numbers are the whole batch's."""
    _kept()
    ranks.run(2, _kept)


class Patched:
    """A forward that was put on a class from elsewhere, as a tool does that counts or traces."""

    def __init__(self, cls: Any) -> None:
        self.cls, self.forward = cls, cls.forward

    def __enter__(self) -> None:
        @functools.wraps(self.forward)
        def forward(layer: nn.Module, *args: Any) -> Tensor:
            return 2 * self.forward(layer, *args)

        self.own = "forward" in vars(self.cls)
        self.cls.forward = forward

    def __exit__(self, *_: object) -> None:
        if self.own:
            self.cls.forward = self.forward
        else:
            del self.cls.forward


@pytest.mark.parametrize("cls", [nn.modules.batchnorm._BatchNorm, nn.BatchNorm2d, nn.SyncBatchNorm], ids=str)
def test_a_forward_put_on_torchs_class_is_not_lost(cls: type) -> None:
    """A patch of a whole class is refused like a forward of its own, on the class itself or a base."""
    layer = nn.SyncBatchNorm(3) if cls is nn.SyncBatchNorm else nn.BatchNorm2d(3)
    with Patched(cls):
        assert_refused(syncbn.convert_sync_batchnorm, nested(layer), r"forward of its own.* at 'body\.")
    assert isinstance(syncbn.convert_sync_batchnorm(layer), syncbn.SyncBatchNorm)


def unhooked(layer: nn.Module) -> None:
    """What accelerate.hooks.remove_hook_from_module leaves: the class's own forward, bound, on the object."""
    hooked_as_by_accelerate(layer)
    layer.forward = layer._old_forward
    del layer._old_forward


@pytest.mark.parametrize("leave", [unhooked, lambda layer: layer.__dict__.update(train=layer.train)])
def test_what_a_hook_leaves_is_no_call_of_its_own(leave: Callable[[nn.Module], None]) -> None:
    """The class's own method, bound to the object, hides nothing: layers convert, pause, freeze and revert."""
    net = nn.Sequential(nn.BatchNorm2d(3))
    x = torch.randn(4, 3, 5, 5)
    right = nn.BatchNorm2d(3)(x)
    leave(net[0])
    syncbn.convert_sync_batchnorm(net)
    assert type(net(x).grad_fn).__name__.startswith("Normalize")
    leave(net[0])
    with syncbn.plain(net):
        assert torch.equal(net(x), right)
    assert type(net(x).grad_fn).__name__.startswith("Normalize")
    syncbn.freeze(net).train()
    assert not net[0].training
    leave(net[0])
    assert syncbn.unfreeze(net.train())[0].training
    assert torch.equal(syncbn.revert_sync_batchnorm(net)(x), right)
    assert type(net[0]) is nn.BatchNorm2d


def test_a_registered_converter_decides_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is on an object of a registered class is the converter's business."""
    cls = type("Own", (nn.BatchNorm2d,), {"forward": lambda self, x: x})
    monkeypatch.setattr(syncbn.convert, "_converters", {})
    syncbn.register_converter(cls, lambda layer, group: syncbn.SyncBatchNorm2d(3), lambda layer: cls(3))
    net = nn.Sequential(cls(3))
    patched(net[0])
    assert type(syncbn.convert_sync_batchnorm(net)[0]) is syncbn.SyncBatchNorm2d


def test_the_report_names_a_call_that_was_set_after_conversion() -> None:
    """A synchronized layer that was wrapped is reported as such."""
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    patched(net[0])
    assert syncbn.conversion_report(net)[0].why == "its forward was set on the object"
