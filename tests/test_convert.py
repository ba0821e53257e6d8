"""Module swap: everything is kept, or the call refuses."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize

import syncbn
from tests.support.layers import PLAIN, SHAPES, Squared, Tagged, model
from tests.support.ranks import RankPool


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_root_layers_keep_everything(rank: int) -> None:
    """A bare layer is swapped in place: same object, tensors, mode, requires_grad, attributes, dtype and class."""
    layer = PLAIN[rank](3, eps=1e-3, momentum=0.3).double().eval()
    layer.bias.requires_grad_(False)
    layer.qconfig = object()
    before = dict(layer.__dict__), dict(layer.state_dict(keep_vars=True))
    converted = syncbn.convert_sync_batchnorm(layer)
    assert converted is layer
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert isinstance(layer, PLAIN[rank])
    assert {name: value for name, value in layer.__dict__.items() if name != "_label"} == before[0]
    assert all(v is before[1][k] for k, v in layer.state_dict(keep_vars=True).items())
    with pytest.raises(ValueError, match="expected"):
        layer(torch.randn(SHAPES[rank % 3 + 1]).double())
    assert syncbn.revert_sync_batchnorm(layer) is layer
    assert type(layer) is PLAIN[rank]
    assert dict(layer.__dict__) == before[0]


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_eval_keeps_its_bits_there_and_back(rank: int) -> None:
    """Eval output is bit-equal before, after conversion and after reverting."""
    layer = PLAIN[rank](3)
    layer(torch.randn(SHAPES[rank]))
    x = torch.randn(SHAPES[rank])
    right = layer.eval()(x)
    assert torch.equal(syncbn.convert_sync_batchnorm(layer)(x), right)
    assert torch.equal(syncbn.revert_sync_batchnorm(layer)(x), right)


def test_hooks_survive() -> None:
    """Forward, pre-forward, backward and state-dict hooks run after conversion and after reverting."""
    layer, calls = nn.BatchNorm1d(3), []
    layer.register_forward_hook(lambda *_: calls.append("forward"))
    layer.register_forward_pre_hook(lambda *_: calls.append("pre"))
    layer.register_full_backward_hook(lambda *_: calls.append("backward"))
    layer.register_state_dict_post_hook(lambda *_: calls.append("state"))
    layer.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    for swapped in (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm):
        calls.clear()
        swapped(layer)(torch.randn(4, 3, requires_grad=True)).sum().backward()
        layer.load_state_dict(layer.state_dict())
        assert calls == ["pre", "forward", "backward", "state", "load"]


def test_shared_layers_stay_shared() -> None:
    """One layer under several names and parents is still one."""
    shared = nn.BatchNorm2d(3)
    net = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared, nn.ModuleList([shared])), "c": shared})
    syncbn.convert_sync_batchnorm(net)
    assert net["a"] is net["c"] is net["b"][0] is net["b"][1][0] is shared
    assert isinstance(shared, syncbn.SyncBatchNorm)


def test_an_optimizer_made_before_still_trains_the_layer() -> None:
    """Parameters are the same objects, so an optimizer made before the conversion moves them."""
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    before = net[1].weight.detach().clone()
    syncbn.convert_sync_batchnorm(net)(torch.randn(4, 3, 5, 5)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(net[1].weight, before)


def test_parametrizations_stay_and_can_be_removed() -> None:
    """A parametrized layer is still parametrized, computes with it, and can be freed of it after conversion."""
    layer = nn.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", _Exponential())
    right = layer.eval()(torch.ones(4, 3))
    syncbn.convert_sync_batchnorm(layer)
    assert parametrize.is_parametrized(layer, "weight")
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert torch.equal(layer(torch.ones(4, 3)), right)
    assert torch.equal(copy.deepcopy(layer)(torch.ones(4, 3)), right)
    assert torch.equal(syncbn.revert_sync_batchnorm(layer)(torch.ones(4, 3)), right)
    syncbn.convert_sync_batchnorm(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is type(syncbn.convert_sync_batchnorm(nn.BatchNorm1d(3)))
    assert type(syncbn.revert_sync_batchnorm(layer)) is nn.BatchNorm1d


class _Exponential(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w.exp()


def test_a_parametrized_convolution_beside_it_is_untouched() -> None:
    """Weight norm elsewhere in the model is not disturbed."""
    net = nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4))
    right = net.eval()(torch.ones(2, 3, 4, 4))
    assert torch.equal(syncbn.convert_sync_batchnorm(net)(torch.ones(2, 3, 4, 4)), right)


def test_conversion_is_idempotent() -> None:
    """A second conversion changes nothing."""
    net = syncbn.convert_sync_batchnorm(model())
    classes = [type(m) for m in net.modules()]
    syncbn.convert_sync_batchnorm(net)
    assert [type(m) for m in net.modules()] == classes


def test_subclasses_without_a_forward_are_kept_as_such() -> None:
    """A subclass that only adds attributes stays an instance of itself and comes back."""
    layer = Tagged(3, tag="x")
    syncbn.convert_sync_batchnorm(layer)
    assert isinstance(layer, Tagged)
    assert isinstance(layer, syncbn.SyncBatchNorm)
    assert layer.tag == "x"
    assert type(syncbn.revert_sync_batchnorm(layer)) is Tagged


def test_a_forward_of_its_own_is_never_flattened() -> None:
    """An unknown subclass is refused, with its name and both ways out, before any change; or skipped and reported."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Sequential(Squared(3)))
    with pytest.raises(TypeError, match=r"Squared at '1.0'.*register_converter.*on_unknown='skip'"):
        syncbn.convert_sync_batchnorm(net)
    assert type(net[0]) is nn.BatchNorm2d
    syncbn.convert_sync_batchnorm(net, on_unknown="skip")
    assert isinstance(net[0], syncbn.SyncBatchNorm)
    assert type(net[1][0]) is Squared
    assert syncbn.conversion_report(net)[1].why == "its forward is its own"
    with pytest.raises(ValueError, match="on_unknown must be"):
        syncbn.convert_sync_batchnorm(net, on_unknown="ignore")


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        ("body.*", ["body.0"]),
        (["head", "body.0"], ["body.0", "head"]),
        (lambda name, layer: layer.num_features == 4, ["body.0"]),
        (None, ["body.0", "head"]),
        ([], []),
    ],
    ids=["pattern", "names", "predicate", "all", "none"],
)
def test_only_selects(only: object, expected: list[str]) -> None:
    """`only` takes a pattern, several, or a predicate; the rest is reported as not chosen."""
    net = nn.ModuleDict({"body": nn.Sequential(nn.BatchNorm2d(4)), "head": nn.BatchNorm1d(3)})
    syncbn.convert_sync_batchnorm(net, only=only)
    rows = syncbn.conversion_report(net)
    assert [row.name for row in rows if row.status == "converted"] == expected
    assert all(row.why == "not chosen by `only`" for row in rows if row.status != "converted")


def test_other_norms_are_left_alone() -> None:
    """InstanceNorm, GroupNorm, LayerNorm and frozen batch norms are not touched."""
    others = [nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4), syncbn.freeze(nn.BatchNorm2d(4))]
    net = nn.Sequential(*others)
    classes = [type(m) for m in net]
    syncbn.convert_sync_batchnorm(net)
    assert [type(m) for m in net] == classes
    assert [row.status for row in syncbn.conversion_report(net)] == ["left alone"] * 4


@pytest.mark.parametrize("lazy", [nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d])
def test_lazy_layers_become_ours_on_first_use(lazy: type) -> None:
    """A lazy layer is materialised with the input's channels, synchronized from its first call on; never 0 features."""
    rank = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d).index(lazy) + 1
    layer = lazy()
    syncbn.convert_sync_batchnorm(layer)
    x = torch.randn(SHAPES[rank]) + 7
    layer(x)
    assert type(layer) is type(syncbn.convert_sync_batchnorm(PLAIN[rank](3)))
    assert layer.num_features == 3
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 0.1 * x.transpose(0, 1).flatten(1).mean(1))
    assert type(syncbn.revert_sync_batchnorm(layer)) is PLAIN[rank]


def _lazy_on_ranks() -> torch.Tensor:
    layer = syncbn.convert_sync_batchnorm(nn.LazyBatchNorm1d())
    torch.manual_seed(torch.distributed.get_rank())
    layer(torch.randn(4, 3))
    return layer.running_mean


def test_a_lazy_layers_first_call_is_synchronized(ranks: RankPool) -> None:
    """On two ranks with other data the first call of a lazy layer already shares its statistics."""
    first, second = ranks.run(2, _lazy_on_ranks)
    assert torch.equal(first, second)


def _in_ddp() -> None:
    net = DistributedDataParallel(model())
    for swapped in (syncbn.convert_sync_batchnorm, syncbn.revert_sync_batchnorm):
        with pytest.raises(TypeError, match="then wrap it"):
            swapped(net)
        with pytest.raises(TypeError, match="at '0'"):
            swapped(nn.Sequential(net))


def test_a_model_in_ddp_is_refused(ranks: RankPool) -> None:
    """Swapping inside DistributedDataParallel is refused with the reason."""
    ranks.run(1, _in_ddp)


def test_compiled_and_scripted_models_are_refused() -> None:
    """A model after torch.compile, .compile() or scripting is refused with the reason."""
    compiled = model()
    compiled.compile(backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch advises against TorchScript; models in it remain
        scripted = torch.jit.trace(model().eval(), torch.randn(2, 3, 4, 4))
    for net, advice in (
        (torch.compile(model(), backend="eager"), "compile"),
        (compiled, "compile"),
        (scripted, "script"),
    ):
        with pytest.raises(TypeError, match=f"then {advice}"):
            syncbn.convert_sync_batchnorm(net)
