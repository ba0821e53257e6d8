"""What layers call themselves."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.names import Label
from tests.support.ranks import RankPool


def model() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return nn.ModuleDict({"stem": nn.BatchNorm2d(3), "body": nn.ModuleList([block, nn.BatchNorm1d(5)])})


def names_of(root: nn.Module) -> dict[str, str]:
    layers = [m for m in root.modules() if isinstance(m, syncbn.SyncBatchNorm)]
    return {f"{layer.num_features}": layer._label.name for layer in layers}


def test_conversion_names_layers_by_their_paths() -> None:
    """A converted layer is called by its path in the model that was converted."""
    assert names_of(syncbn.convert_sync_batchnorm(model())) == {"3": "stem", "4": "body.0.1", "5": "body.1"}


def test_conversion_in_parts_keeps_the_first_paths() -> None:
    """A later conversion of the whole names only what has no path; `name_layers` names all anew."""
    parts = model()
    syncbn.convert_sync_batchnorm(parts["body"])
    assert names_of(syncbn.convert_sync_batchnorm(parts)) == {"3": "stem", "4": "0.1", "5": "1"}
    assert names_of(syncbn.name_layers(parts)) == {"3": "stem", "4": "body.0.1", "5": "body.1"}


def test_built_layers_are_numbered_as_they_are_built() -> None:
    """Without a path: the class, the number and the channels; a bare layer that is converted, too."""
    first, second = syncbn.SyncBatchNorm(64), syncbn.SyncBatchNorm2d(32)
    bare = syncbn.convert_sync_batchnorm(nn.BatchNorm2d(8))
    numbers = [int(layer._label.name.split("#")[1].split()[0]) for layer in (first, second, bare)]
    assert numbers == [numbers[0], numbers[0] + 1, numbers[0] + 2]
    assert first._label.name == f"SyncBatchNorm #{numbers[0]} (64 channels)"
    assert second._label.name == f"SyncBatchNorm2d #{numbers[1]} (32 channels)"
    assert bare._label.name == f"SyncBatchNorm2d #{numbers[2]} (8 channels)"
    assert names_of(syncbn.name_layers(nn.Sequential(first))) == {"64": "0"}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_keep_their_names_and_count_anew(again) -> None:
    """The copy's label is its own, with the name and none of the calls."""
    net = syncbn.convert_sync_batchnorm(model())
    net["stem"]._label.calls = 7
    other = again(net)
    assert names_of(other) == names_of(net)
    assert other["stem"]._label is not net["stem"]._label
    assert other["stem"]._label.calls == 0
    assert other["stem"]._label.is_path


def test_a_layer_that_an_earlier_version_pickled_gets_a_number() -> None:
    """Its state has no label."""
    layer = syncbn.SyncBatchNorm2d(3)
    state = {name: value for name, value in layer.__getstate__().items() if name != "_label"}
    new = syncbn.SyncBatchNorm2d.__new__(syncbn.SyncBatchNorm2d)
    new.__setstate__(state)
    assert new._label.name.endswith("(3 channels)")


def test_models_load_with_weights_only(tmp_path) -> None:
    """What is allowed for a whole model covers the label."""
    net = syncbn.convert_sync_batchnorm(nn.Sequential(nn.BatchNorm2d(3)))
    torch.save(net, tmp_path / "net.pt")
    with torch.serialization.safe_globals([*syncbn.safe_globals(), nn.Sequential, set]):
        assert names_of(torch.load(tmp_path / "net.pt", weights_only=True)) == {"3": "0"}


def test_reverted_layers_have_no_label() -> None:
    """Nothing of it is left on an ordinary layer; within `plain` it is put aside."""
    net = syncbn.convert_sync_batchnorm(model())
    with syncbn.plain(net):
        assert "_label" not in vars(net["stem"])
    assert names_of(net) == {"3": "stem", "4": "body.0.1", "5": "body.1"}
    assert "_label" not in vars(syncbn.revert_sync_batchnorm(net)["stem"])


def test_what_wrappers_add_to_a_path_is_left_out() -> None:
    """A checkpoint wrapper, a compiled part and FSDP's or DDP's attribute are no part of the name."""
    net = syncbn.convert_sync_batchnorm(model())
    net["body"][0] = checkpoint_wrapper(net["body"][0])
    net["stem"] = nn.ModuleDict({"_orig_mod": net["stem"]})  # as torch.compile holds it
    assert names_of(syncbn.name_layers(net)) == {"3": "stem", "4": "body.0.1", "5": "body.1"}


def test_a_module_that_is_really_called_module_keeps_it() -> None:
    """Only a parallel wrapper's `module` is left out."""
    net = nn.ModuleDict({"module": nn.BatchNorm2d(3)})
    assert names_of(syncbn.convert_sync_batchnorm(net)) == {"3": "module"}


def test_a_shared_layer_has_its_first_path() -> None:
    """One layer, one name."""
    layer = nn.BatchNorm2d(3)
    assert names_of(syncbn.convert_sync_batchnorm(nn.ModuleDict({"a": layer, "b": layer}))) == {"3": "a"}


def test_name_layers_takes_a_module() -> None:
    """Anything else is refused in words."""
    with pytest.raises(TypeError, match=r"must be an nn\.Module; got list"):
        syncbn.name_layers([])  # type: ignore[type-var]  # that is the test


def _named_by_ddp() -> list[str]:
    if dist.get_rank() == 0:
        syncbn.SyncBatchNorm(9)  # one more than the others have built
    net = nn.Sequential(syncbn.SyncBatchNorm(3), nn.Sequential(syncbn.SyncBatchNorm(3)))
    DistributedDataParallel(net)(torch.randn(2, 3)).sum().backward()
    return [net[0]._label.name, net[1][0]._label.name]


def test_layers_within_ddp_get_their_paths_by_themselves(ranks: RankPool) -> None:
    """The first training step names what was built synchronized, alike on ranks that have built different things."""
    assert ranks.run(2, _named_by_ddp) == [["0", "1.0"]] * 2


def test_a_label_says_its_name() -> None:
    """In a debugger."""
    assert repr(Label("layer1.bn")) == "Label('layer1.bn')"
