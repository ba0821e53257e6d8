"""What torch makes of a symbolic trace, folding and quantization: within `plain` as of its own layers."""

import importlib
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import syncbn
from tests.support.oracle import error
from tests.test_fx import EXACT, LAYERS, batch


def fuse(model: nn.Module) -> nn.Module:
    """torch.fx's folding of batch norms into the convolutions before them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its import uses what torch advises against
        optimization = importlib.import_module("torch.fx.experimental.optimization")
    return optimization.fuse(model)


@pytest.mark.parametrize("name", ["converted", "built for 2d", "frozen and converted"])
def test_convolutions_fuse_after_plain(name: str) -> None:
    """fx fusion folds no synchronized layer and changes no number; within `plain` it folds what it folds of torch's."""
    made = nn.Sequential(nn.Conv2d(3, 3, 1), LAYERS[name](), nn.ReLU()).double().eval()
    syncbn.unfreeze(made).eval()
    made[1].running_mean += 1
    right = made(batch()).detach()
    kept = fuse(made)
    assert sum(isinstance(m, syncbn.SyncBatchNorm) for m in kept.modules()) == 1
    assert error(kept(batch()), right) <= EXACT
    with syncbn.plain(made):
        folded = fuse(made)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    assert error(folded(batch()), right) <= EXACT


def _prepared(model: nn.Module) -> Any:
    quantization = pytest.importorskip("torch.ao.quantization", reason="this torch has no torch.ao.quantization")
    quantize_fx = importlib.import_module("torch.ao.quantization.quantize_fx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that these move to torchao
        mapping = quantization.get_default_qat_qconfig_mapping("fbgemm")
        torch.manual_seed(4)
        return quantize_fx.prepare_qat_fx(model.train(), mapping, (batch().float(),))


def _classes(graph: nn.Module) -> list[str]:
    return sorted(type(m).__name__.removeprefix("Sync") for m in graph.modules())


def test_quantization_aware_training_after_plain() -> None:
    """prepare_qat_fx within `plain` makes the modules that it makes of torch's layers; so it does before conversion,
    which then synchronizes the norms within its own.
    """
    plain = _prepared(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    made = syncbn.convert_sync_batchnorm(
        nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    )
    with syncbn.plain(made):
        paused = _prepared(made)
    assert _classes(paused) == _classes(plain)
    norms = [m for m in plain.modules() if isinstance(m, nn.BatchNorm2d)]
    syncbn.convert_sync_batchnorm(plain)
    assert norms
    assert all(isinstance(m, syncbn.SyncBatchNorm2d) for m in norms)
    plain(batch().float()).square().sum().backward()
    assert all(m.num_batches_tracked == 1 for m in norms)


def test_quantization_leaves_a_synchronized_layer_whole() -> None:
    """prepare_qat_fx of a converted model traces it, a layer one node, and puts no quantization into the layer."""
    made = syncbn.convert_sync_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    prepared = _prepared(made)
    assert [n.target for n in prepared.graph.nodes if n.op == "call_module" and n.target == "1"] == ["1"]
    assert type(prepared.get_submodule("1")) is syncbn.SyncBatchNorm2d
    assert prepared(batch().float()).isfinite().all()
