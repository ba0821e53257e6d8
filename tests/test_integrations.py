"""Real models of other libraries, built from configuration with random weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from tests.support.fake_torchvision import timm

pytestmark = pytest.mark.filterwarnings("ignore")  # these libraries' own warnings about themselves
TIMM = ("resnet18", "efficientnet_b0", "mobilenetv3_small_050", "regnety_002", "densenet121", "res2net50_14w_8s")
TIMM += ("ghostnet_100", "mobileone_s0", "levit_128s", "skresnet18", "repvgg_a0", "dla34")
IMAGE = torch.Size((4, 3, 64, 64))
TRANSFORMERS: dict[str, tuple[str, dict, Callable[[], dict[str, Tensor]]]] = {
    "ResNet": ("ResNetModel", {"depths": [1, 1, 1, 1]}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "RegNet": ("RegNetModel", {"depths": [1, 1, 1, 1]}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "MobileNetV1": ("MobileNetV1Model", {"depth_multiplier": 0.25}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "MobileNetV2": ("MobileNetV2Model", {"depth_multiplier": 0.35}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "MobileViT": ("MobileViTModel", {}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "MobileViTV2": ("MobileViTV2Model", {"width_multiplier": 0.5}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "SwiftFormer": ("SwiftFormerModel", {"depths": [1, 1, 1, 1]}, lambda: {"pixel_values": torch.randn(IMAGE)}),
    "Segformer": (
        "SegformerForSemanticSegmentation",
        {"depths": [1, 1, 1, 1]},
        lambda: {"pixel_values": torch.randn(IMAGE)},
    ),
    "Wav2Vec2Conformer": (
        "Wav2Vec2ConformerModel",
        {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 64},
        lambda: {"input_values": torch.randn(2, 4000)},
    ),
    "PatchTST": (
        "PatchTSTModel",
        {"num_input_channels": 2, "context_length": 32, "num_hidden_layers": 1},
        lambda: {"past_values": torch.randn(4, 32, 2)},
    ),
}


def flat(output: object) -> Tensor:
    """The first tensor of whatever a model returns."""
    if isinstance(output, Tensor):
        return output
    return flat(next(iter(output.values() if hasattr(output, "values") else output)))


def check_model(net: nn.Module, forward: Callable[[nn.Module], Tensor]) -> None:
    """Converting changes no bit of eval output and trains to the same statistics; reverting gives the classes back."""
    classes = {name: type(m) for name, m in net.named_modules()}
    norms = [m for m in net.modules() if isinstance(m, _BatchNorm)]
    assert norms, "an architecture without batch norm proves nothing"
    torch.manual_seed(5)
    right = forward(net.eval())
    syncbn.convert_sync_batchnorm(net)
    assert all(isinstance(m, syncbn.SyncBatchNorm) for m in norms)
    assert torch.equal(forward(net), right)
    net.train()
    forward(net).square().mean().backward()
    assert any(m.num_batches_tracked >= 1 for m in norms)
    assert any(m.weight.grad is not None for m in norms)
    after = forward(net.eval())
    syncbn.revert_sync_batchnorm(net)
    assert {name: type(m) for name, m in net.named_modules()} == classes
    assert torch.equal(forward(net), after)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    """Hugging Face architectures with batch norm convert, train and revert."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model, arguments, inputs = TRANSFORMERS[name]
    torch.manual_seed(4)
    net = getattr(transformers, model)(getattr(transformers, f"{name}Config")(**arguments))
    given = inputs()
    check_model(net, lambda net: flat(net(**given)))


@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    """timm architectures convert, train and revert; those of BatchNormAct2d keep their activations and drops."""
    create_model = timm("timm").create_model
    torch.manual_seed(4)
    net = create_model(name)
    x = torch.randn(2, 3, 224, 224) if name.startswith("levit") else torch.randn(IMAGE)
    check_model(net, lambda net: flat(net(x)))


@pytest.mark.parametrize(("act", "fused"), [(nn.ReLU, True), (nn.SiLU, True), (nn.GELU, False), (nn.LeakyReLU, True)])
@pytest.mark.parametrize("drop", [False, True])
def test_timms_activation_and_drop(act: type, fused: bool, drop: bool) -> None:
    """BatchNormAct2d trains to its own numbers after conversion, fused where ours can fuse and nothing is dropped."""
    layers = timm("timm.layers")
    kwargs = {"drop_layer": nn.Dropout2d} if drop else {}
    ours, theirs = (layers.BatchNormAct2d(3, act_layer=act, inplace=False, **kwargs).double() for _ in range(2))
    syncbn.convert_sync_batchnorm(ours)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    dy = torch.randn_like(x)
    results = []
    for layer in (ours, theirs):
        torch.manual_seed(9)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        results.append((y.detach(), leaf.grad, layer.weight.grad))
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)
    ours_made_it = type(ours(x).grad_fn).__name__.startswith("Normalize")
    assert ours_made_it == (fused and not drop)
    assert type(syncbn.revert_sync_batchnorm(ours)) is layers.BatchNormAct2d
