"""The way back, registered converters, and copies of converted models."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import syncbn
from syncbn import classes, convert
from tests.support.layers import SHAPES, Squared, Tagged, model


class SyncSquared(nn.Module):
    """What the registered converter makes of Squared."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x).square()


@pytest.fixture
def squared_converter(monkeypatch: pytest.MonkeyPatch) -> None:
    def to_sync(layer: nn.Module, group: object) -> nn.Module:
        inner = nn.BatchNorm2d(layer.num_features)
        inner.load_state_dict(layer.state_dict())
        return SyncSquared(syncbn.convert_sync_batchnorm(inner, group)).train(layer.training)

    def to_plain(layer: nn.Module) -> nn.Module:
        plain = Squared(layer.inner.num_features)
        plain.load_state_dict(layer.inner.state_dict())
        return plain.train(layer.training)

    monkeypatch.setattr(convert, "_converters", {})
    syncbn.register_converter(Squared, to_sync, to_plain)


@pytest.mark.usefixtures("squared_converter")
def test_a_registered_converter_swaps_its_class() -> None:
    """A registered class is replaced wherever it stands, shared places and root included, and comes back."""
    shared = Squared(3)
    shared(torch.randn(4, 3, 5, 5))
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)}).eval()
    x = torch.randn(2, 3, 4, 4)
    right = shared(x)
    syncbn.convert_sync_batchnorm(net)
    assert type(net["a"]) is SyncSquared
    assert net["a"] is net["b"][0]
    assert torch.equal(net["a"](x), right)
    with syncbn.plain(net):
        assert type(net["a"]) is Squared
    assert type(net["b"][0]) is SyncSquared
    syncbn.revert_sync_batchnorm(net)
    assert type(net["a"]) is Squared
    assert net["a"] is net["b"][0]
    assert torch.equal(net["a"](x), right)
    root = syncbn.convert_sync_batchnorm(Squared(3))
    assert type(root) is SyncSquared
    assert type(syncbn.revert_sync_batchnorm(copy.deepcopy(root))) is Squared
    convert._converters.clear()
    with pytest.raises(TypeError, match=r"SyncSquared at the root.*register_converter"):
        syncbn.revert_sync_batchnorm(root)


def test_torchs_sync_layers_are_taken_over() -> None:
    """nn.SyncBatchNorm becomes ours with its group and tensors; reverting leaves nothing that communicates."""
    marker = object()
    net = nn.Sequential(nn.SyncBatchNorm(3, process_group=marker))
    weight = net[0].weight
    syncbn.convert_sync_batchnorm(net)
    assert type(net[0]) is syncbn.SyncBatchNorm
    assert net[0].process_group is marker
    assert net[0].weight is weight
    syncbn.revert_sync_batchnorm(net)
    assert type(net[0]) is classes.BatchNorm
    for shape in SHAPES.values():
        assert net(torch.randn(shape)).shape == shape


def test_torchs_sync_layers_are_reverted_directly() -> None:
    """A published model with nn.SyncBatchNorm runs on a CPU after reverting, in training and eval."""
    net = nn.Sequential(nn.SyncBatchNorm(3))
    net[0].running_mean += 2
    right = nn.BatchNorm2d(3)
    right.load_state_dict(net[0].state_dict())
    syncbn.revert_sync_batchnorm(net)
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(net.eval()(x), right.eval()(x))
    assert torch.equal(net.train()(x), right.train()(x))


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Stands for detectron2's: known by name and structure, with a forward that needs a GPU group."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("needs a group")


def foreign(fuse_relu: bool, channel_last: bool) -> nn.Module:
    """An apex layer as a checkpoint brings it, by name and attributes."""
    cls = type("SyncBatchNorm", (NaiveSyncBatchNorm,), {})
    layer = cls(3)
    layer.fuse_relu, layer.channel_last, layer.process_group = fuse_relu, channel_last, None
    return layer


def test_other_libraries_sync_layers_are_reverted_by_structure() -> None:
    """Layers named and built like detectron2's and apex's become ordinary ones, a fused relu included."""
    x = torch.randn(4, 3, 5, 5)
    net = nn.Sequential(NaiveSyncBatchNorm(3), foreign(True, False))
    syncbn.revert_sync_batchnorm(net)
    assert [type(m) for m in net] == [classes.BatchNorm, classes.BatchNorm]
    assert torch.equal(net[0].eval()(x), nn.BatchNorm2d(3).eval()(x))
    assert torch.equal(net[1].eval()(x), nn.BatchNorm2d(3).eval()(x).relu())
    with pytest.raises(TypeError, match="channel_last=False"):
        syncbn.revert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), foreign(False, True)))


def test_another_librarys_pickling_is_no_obstacle() -> None:
    """A layer known by its name becomes an ordinary one whatever its class says of pickles."""
    layer = type("SyncBatchNorm", (NaiveSyncBatchNorm,), {"__reduce__": lambda self: (nn.BatchNorm2d, (3,))})(3)
    assert type(syncbn.revert_sync_batchnorm(layer)) is classes.BatchNorm


class Bare(nn.Module):
    """A layer of another library that holds no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.eps, self.momentum = 1e-5, 0.1
        self.weight = self.bias = self.running_mean = self.running_var = None


@pytest.mark.parametrize("pauses", [False, True])
def test_a_layer_that_says_nothing_of_its_channels_is_refused(pauses: bool) -> None:
    """Reverting refuses it in words, and leaves the layers before it as they were."""
    net = nn.Sequential(syncbn.SyncBatchNorm(3), type("SyncBatchNorm", (Bare,), {})())
    with pytest.raises(TypeError, match=r"number of channels.*at '1'"):
        syncbn.plain(net).__enter__() if pauses else syncbn.revert_sync_batchnorm(net)
    assert type(net[0]) is syncbn.SyncBatchNorm


def test_a_layer_built_synchronized_reverts_with_its_activation() -> None:
    """A fused layer of ours becomes an ordinary one that still adds the residual and activates."""
    layer = syncbn.SyncBatchNorm(3, activation="silu")
    layer(torch.randn(4, 3, 5))
    x, residual = torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    right = layer.eval()(x, residual)
    syncbn.revert_sync_batchnorm(layer)
    assert not isinstance(layer, syncbn.SyncBatchNorm)
    assert torch.equal(layer(x, residual), right)
    with pytest.raises(ValueError, match="leave positions out"):
        layer.train()(x, mask=torch.ones(4, 5).bool())


def test_an_activation_given_after_conversion_is_not_lost() -> None:
    """A converted BatchNorm2d that was told to activate still does after reverting."""
    layer = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(3)).eval()
    layer.activation = "relu"
    x = torch.randn(2, 3, 4, 4)
    right = layer(x)
    assert torch.equal(syncbn.revert_sync_batchnorm(layer)(x), right)


class Doubling(syncbn.SyncBatchNorm):
    """A user's subclass of ours with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def test_a_subclass_of_ours_with_its_own_forward_is_not_flattened() -> None:
    """Reverting refuses a subclass whose forward it would lose."""
    with pytest.raises(TypeError, match=r"got tests\.test_revert\.Doubling at the root"):
        syncbn.revert_sync_batchnorm(Doubling(3))


@pytest.mark.parametrize("fails", [False, True])
def test_plain_is_a_pause(fails: bool) -> None:
    """Inside `plain` the layers are ordinary, afterwards synchronized as before, also after an exception."""
    net = syncbn.convert_sync_batchnorm(model())
    net.append(syncbn.SyncBatchNorm(4, activation="relu"))
    net.append(nn.SyncBatchNorm(4))
    classes, attributes = [type(m) for m in net], [dict(m.__dict__) for m in net]
    try:
        with syncbn.plain(net) as inside:
            assert inside is net
            assert not any(isinstance(m, (syncbn.SyncBatchNorm, nn.SyncBatchNorm)) for m in net.modules())
            net(torch.randn(2, 3, 4, 4))
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [type(m) for m in net] == classes
    assert [dict(m.__dict__) for m in net] == attributes


def test_plain_lets_a_model_be_exported() -> None:
    """torch.export of a model in the middle of training, then training goes on synchronized."""
    net = syncbn.convert_sync_batchnorm(model())
    x = torch.randn(2, 3, 4, 4)
    with syncbn.plain(net.eval()):
        program = torch.export.export(net, (x,))
    assert torch.equal(program.module()(x), net(x))
    assert isinstance(net.train()[1], syncbn.SyncBatchNorm)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
def test_converted_models_can_be_copied_and_saved_whole(how: str) -> None:
    """deepcopy, pickle and torch.save of converted layers keep class, state and the way back."""
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3), Tagged(3, tag="t"), syncbn.SyncBatchNorm(3)))
    net(torch.randn(4, 3, 5, 5))
    if how == "save":
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = copy.deepcopy(net) if how == "deepcopy" else pickle.loads(pickle.dumps(net))
    assert [type(m) for m in other] == [type(m) for m in net]
    assert other[1].tag == "t"
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert type(syncbn.revert_sync_batchnorm(other)[0]) is nn.BatchNorm2d


def test_an_ema_copy_follows() -> None:
    """torch.optim.swa_utils averages a converted model, buffers included."""
    net = syncbn.convert_sync_batchnorm(model())
    average = torch.optim.swa_utils.AveragedModel(
        net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5), use_buffers=True
    )
    average.update_parameters(net)
    net(torch.randn(4, 3, 5, 5))
    average.update_parameters(net)
    assert isinstance(average.module[1], syncbn.SyncBatchNorm)
    assert not torch.equal(average.module[1].running_mean, net[1].running_mean)
    assert average.module[1].running_mean is not net[1].running_mean
