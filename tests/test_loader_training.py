"""Training on loaders of different lengths equals training in one process with each step's samples of all ranks."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import syncbn
from tests.support.oracle import error
from tests.support.ranks import RankPool

README = (Path(__file__).parent.parent / "README.md").read_text()
Batch = tuple[Tensor, Tensor]
SIZES = {
    "uneven": ([3, 1], [2, 4, 5, 4]),
    "none": ([], [3, 3], [1, 1, 4, 4]),
    "four": ([2], [1, 3], [5, 1, 1, 4], [2, 2, 3]),
}
"""By rank, the sizes of its batches; as many steps as the longest has, an even number."""


def build() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 5),
        nn.BatchNorm1d(5),
    ).double()


def data(name: str) -> list[list[Batch]]:
    """Every rank's batches."""
    generator = torch.Generator().manual_seed(4)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, 8, 8, generator=generator, dtype=torch.float64)
        return x, torch.randint(5, (size,), generator=generator)

    return [[batch(size) for size in sizes] for sizes in SIZES[name]]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_ranks(name: str, accumulate: int, weigh: bool = True) -> tuple[dict[str, Tensor], float]:
    """As EvenLoader's docstring says; the state afterwards, and the mean loss of all samples."""
    mine, world = data(name)[dist.get_rank()], dist.get_world_size()
    net = syncbn.convert_sync_batchnorm(build())
    model, total = DistributedDataParallel(net), torch.zeros(2, dtype=torch.float64)
    optimizer = optimizer_of(model)
    for step, (x, labels) in enumerate(syncbn.EvenLoader(mine)):
        is_last = (step + 1) % accumulate == 0
        with contextlib.nullcontext() if is_last else model.no_sync():
            loss, count = F.cross_entropy(model(x), labels, reduction="sum"), torch.tensor(float(len(x)))
            dist.all_reduce(count)
            loss_of_all = loss * world / count if weigh else loss / max(len(x), 1)
            (loss_of_all / accumulate).backward()
        total += torch.stack([loss.detach(), torch.tensor(len(x))])
        if is_last:
            optimizer.step()
            optimizer.zero_grad()
    dist.all_reduce(total)
    return {k: v.clone() for k, v in net.state_dict().items()}, float(total[0] / total[1])


def train_alone(name: str, accumulate: int) -> tuple[dict[str, Tensor], float]:
    model, loaders = build(), data(name)
    optimizer, losses = optimizer_of(model), []
    for step in range(max(map(len, loaders))):
        x, labels = (
            torch.cat(parts) for parts in zip(*(ours[step] for ours in loaders if step < len(ours)), strict=True)
        )
        per_sample = F.cross_entropy(model(x), labels, reduction="none")
        (per_sample.mean() / accumulate).backward()
        losses += per_sample.tolist()
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return model.state_dict(), sum(losses) / len(losses)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SIZES)
def test_training_equals_one_process(ranks: RankPool, name: str, accumulate: int) -> None:
    """Parameters, buffers and mean loss are those of one process, float64, to 1e-10; no_sync for every other step."""
    right, right_loss = train_alone(name, accumulate)
    results = ranks.run(len(SIZES[name]), train_ranks, name, accumulate)
    for state, loss in results:
        assert abs(loss - right_loss) <= 1e-10 * right_loss
        for key, value in right.items():
            assert error(state[key], value) <= 1e-10, key
            assert torch.equal(state[key], results[0][0][key])


def test_a_mean_of_means_would_fail_here(ranks: RankPool) -> None:
    """The comparison can fail: with each rank's mean in the place of the global one the parameters differ."""
    right, _ = train_alone("uneven", 1)
    state, _ = ranks.run(2, train_ranks, "uneven", 1, False)[0]
    assert error(state["0.weight"], right["0.weight"]) > 1e-4


def _readme() -> float:
    names = {name: globals()[name] for name in ("torch", "dist", "syncbn", "F")}
    names |= {"model": DistributedDataParallel(syncbn.convert_sync_batchnorm(build())), "device": "cpu"}
    names |= {"loader": data("none")[dist.get_rank()], "optimizer": optimizer_of(names["model"])}
    exec(README.split("### Uneven loaders")[1].split("```python\n")[1].split("```")[0], names)
    return float(names["mean_loss"])


def test_the_snippet_of_the_readme(ranks: RankPool) -> None:
    """README's loop is the one that is tested here: its mean loss is one process's, to float32's rounding of it."""
    _, right = train_alone("none", 1)
    assert all(abs(loss - right) <= 1e-6 * right for loss in ranks.run(3, _readme))


CLASSES = torch.zeros(0, dtype=torch.int64)
MEANS: dict[str, Callable[[Tensor], Tensor]] = {
    "cross_entropy": lambda y: F.cross_entropy(y, CLASSES.new_zeros(len(y))),
    "cross_entropy of probabilities": lambda y: F.cross_entropy(y, torch.ones_like(y) / 5, label_smoothing=0.1),
    "nll_loss": lambda y: F.nll_loss(y.log_softmax(1), CLASSES.new_zeros(len(y))),
    "mse_loss": lambda y: F.mse_loss(y, torch.ones_like(y)),
    "l1_loss": lambda y: F.l1_loss(y, torch.ones_like(y)),
    "smooth_l1_loss": lambda y: F.smooth_l1_loss(y, torch.ones_like(y)),
    "huber_loss": lambda y: F.huber_loss(y, torch.ones_like(y)),
    "binary_cross_entropy": lambda y: F.binary_cross_entropy(y.sigmoid(), torch.ones_like(y)),
    "binary_cross_entropy_with_logits": lambda y: F.binary_cross_entropy_with_logits(y, torch.ones_like(y)),
    "kl_div": lambda y: F.kl_div(y.log_softmax(1), torch.ones_like(y) / 5, reduction="batchmean"),
    "gaussian_nll_loss": lambda y: F.gaussian_nll_loss(y, torch.zeros_like(y), torch.ones_like(y)),
    "poisson_nll_loss": lambda y: F.poisson_nll_loss(y, torch.ones_like(y)),
    "margin_ranking_loss": lambda y: F.margin_ranking_loss(y[:, 0], y[:, 1], torch.ones_like(y[:, 0])),
    "triplet_margin_loss": lambda y: F.triplet_margin_loss(y, torch.ones_like(y), -torch.ones_like(y)),
    "cosine_embedding_loss": lambda y: F.cosine_embedding_loss(y, torch.ones_like(y), torch.ones_like(y[:, 0])),
    "mean": lambda y: y.square().mean(),
}


def _means() -> dict[str, tuple[float, list[Tensor]]]:
    results = {}
    for name, loss_of in MEANS.items():
        model = DistributedDataParallel(syncbn.convert_sync_batchnorm(build()))
        for x, _ in syncbn.EvenLoader(data("uneven")[1][:1] if dist.get_rank() else []):
            loss = loss_of(model(x))
            loss.backward()
        results[name] = float(loss.detach()), [p.grad for p in model.parameters()]
    return results


def test_means_of_no_samples(ranks: RankPool) -> None:
    """Losses that are means are NaN on an empty batch; all gradients stay finite: half of the other rank's."""
    first, second = ranks.run(2, _means)
    for name, loss_of in MEANS.items():
        assert first[name][0] != first[name][0], name
        assert second[name][0] == second[name][0], name
        model = build()
        loss_of(model(data("uneven")[1][0][0])).backward()
        largest = max(float(p.grad.abs().max()) for p in model.parameters())
        for ours, other, p in zip(first[name][1], second[name][1], model.parameters(), strict=True):
            assert torch.equal(ours, other), name
            assert float((ours - p.grad / 2).abs().max()) <= 1e-10 * largest, name


def test_what_else_losses_do_without_samples() -> None:
    """In torch 2.13 ctc_loss refuses, multi_margin_loss is any number, and a factor that is learned gets a NaN."""
    x = torch.zeros(0, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="must not be empty"):
        F.ctc_loss(x.expand(4, 0, 5).log_softmax(2), torch.zeros(0, 2, dtype=torch.int64), CLASSES, CLASSES)
    F.multi_margin_loss(x, CLASSES)  # memory that was never written
    factor = torch.ones((), requires_grad=True)
    (factor * F.mse_loss(x, x.detach())).backward()
    assert factor.grad.isnan()
    factor.grad = None
    (factor * F.mse_loss(x, x.detach(), reduction="sum")).backward()
    assert factor.grad == 0


REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "InstanceNorm2d(affine=True)": nn.InstanceNorm2d(4, affine=True),
    "PixelShuffle": nn.PixelShuffle(2),
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "view(len(x), -1)": lambda x: x.view(len(x), -1),
    "x.max()": lambda x: x.max(),
    "max(0)": lambda x: x.max(0).values,
    "stack of a loop over samples": lambda x: torch.stack(list(x)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_refuses(name: str) -> None:
    """These raise on an empty batch in torch 2.13, forward or backward."""
    with pytest.raises((RuntimeError, IndexError)):
        REFUSED[name](torch.zeros(0, 4, 8, 8, requires_grad=True)).sum().backward()


TAKEN: list[nn.Module] = [
    nn.ConvTranspose2d(4, 6, 3),
    nn.BatchNorm2d(4),
    nn.GroupNorm(2, 4),
    nn.InstanceNorm2d(4),
    nn.LayerNorm(8),
    nn.MaxPool2d(2),
    nn.AvgPool2d(2),
    nn.AdaptiveMaxPool2d(3),
    nn.Dropout2d(),
    nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.ReflectionPad2d(1),
    nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True)),
    nn.Sequential(nn.Flatten(2), nn.ConstantPad1d(1, 0.0), nn.Conv1d(4, 2, 3)),
]


@pytest.mark.parametrize("layer", TAKEN, ids=lambda layer: str(layer).split("(")[0] + str(TAKEN.index(layer)))
def test_what_torch_takes(layer: nn.Module) -> None:
    """These take an empty batch, and leave gradients of zeros."""
    x = torch.zeros(0, 4, 8, 8, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape[0] == 0
    assert x.grad.shape == x.shape
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())
