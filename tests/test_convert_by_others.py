"""torch's name for the converter; and what torch's and timm's own converters do to a model of ours."""

import inspect

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.compat import apex
from tests.support.fake_torchvision import timm
from tests.support.ranks import RankPool


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4), nn.GroupNorm(2, 4)))


CLASSES = [syncbn.SyncBatchNorm, syncbn.SyncBatchNorm1d, syncbn.SyncBatchNorm2d, apex.SyncBatchNorm]


@pytest.mark.parametrize("cls", CLASSES)
def test_the_class_has_the_converter(cls: type[syncbn.SyncBatchNorm]) -> None:
    """`SyncBatchNorm.convert_sync_batchnorm` of any class, or of a layer, is the function."""
    model, before = net(), net()
    assert cls.convert_sync_batchnorm(model) is model
    syncbn.convert_sync_batchnorm(before)
    assert str(syncbn.conversion_report(model)) == str(syncbn.conversion_report(before))
    assert type(cls.convert_sync_batchnorm(nn.BatchNorm1d(3))) is syncbn.SyncBatchNorm1d
    assert type(cls(3).convert_sync_batchnorm(module=nn.BatchNorm3d(3))) is syncbn.SyncBatchNorm3d
    assert inspect.ismethod(cls.convert_sync_batchnorm)
    with pytest.raises(ValueError, match="on_unknown must be"):
        cls.convert_sync_batchnorm(net(), on_unknown="warn")


def test_its_arguments_begin_as_torchs() -> None:
    """module, process_group=None, by position or by name."""
    torchs = list(inspect.signature(nn.SyncBatchNorm.convert_sync_batchnorm).parameters.values())
    ours = list(inspect.signature(syncbn.SyncBatchNorm.convert_sync_batchnorm).parameters.values())
    assert [(p.name, p.kind, p.default) for p in ours[:2]] == [(p.name, p.kind, p.default) for p in torchs]
    assert all(p.kind is p.KEYWORD_ONLY for p in ours[2:])


def _groups() -> list[str]:
    pair = syncbn.new_group(2)
    by_position = syncbn.SyncBatchNorm.convert_sync_batchnorm(net(), pair)
    by_name = syncbn.SyncBatchNorm.convert_sync_batchnorm(net(), process_group=pair)
    assert str(syncbn.conversion_report(by_position)) == str(syncbn.conversion_report(by_name))
    assert dist.get_world_size() == 4
    return [row.group for row in syncbn.conversion_report(by_position)]


def test_it_takes_a_group(ranks: RankPool) -> None:
    """As its second argument, as torch's does."""
    assert ranks.run(4, _groups) == [[group, group, ""] for group in ("ranks 0 1",) * 2 + ("ranks 2 3",) * 2]


def ours() -> nn.Sequential:
    """Converted, and with a layer that has an activation."""
    model = syncbn.convert_sync_batchnorm(net())
    model.append(syncbn.SyncBatchNorm(4, activation="relu", skip_nonfinite=False))
    return model


def test_torchs_converter_replaces_ours() -> None:
    """nn.SyncBatchNorm.convert_sync_batchnorm puts torch's layers in the place of ours, and the activation is lost; the
    report says whose they are, and our converter takes them back, without what was lost.
    """
    model = ours().eval()
    x = torch.randn(2, 3, 4, 4)
    assert model(x).min() >= 0
    replaced = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    rows = {row.name: row for row in syncbn.conversion_report(replaced)}
    assert {name: (row.now, row.status, row.why) for name, row in rows.items() if name != "2.1"} == dict.fromkeys(
        ("1", "2.0", "3"), ("SyncBatchNorm", "left alone", "synchronized by torch, not converted")
    )
    assert type(replaced[3]) is nn.SyncBatchNorm
    again = syncbn.convert_sync_batchnorm(replaced)
    assert isinstance(again[3], syncbn.SyncBatchNorm)
    assert again[3].activation is None
    assert again(x).min() < 0


@pytest.mark.filterwarnings("ignore")  # timm's own about itself
def test_timms_converter_replaces_ours() -> None:
    """As torch's does, but that its own layers keep their activation; the report says whose they are."""
    layers = timm("timm.layers")
    model = ours().append(syncbn.convert_sync_batchnorm(layers.BatchNormAct2d(4)))
    replaced = layers.convert_sync_batchnorm(model)
    why = {row.name: row.why for row in syncbn.conversion_report(replaced)}
    assert why["1"] == why["2.0"] == why["3"] == "synchronized by torch, not converted"
    assert why["4"] == "synchronized by timm, not converted"
    assert isinstance(replaced[4].act, nn.ReLU)
