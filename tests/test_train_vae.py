"""launch/train_vae.py: its bound is one, and a step on two ranks is that of one process with all images."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributions import Binomial, Normal, kl_divergence

from tests.support.launching import LAUNCH, TORCHRUN, forget_launched, launched, run
from tests.support.oracle import error
from tests.support.ranks import RankPool

SCRIPT = str(LAUNCH / "train_vae.py")
SHARES = ((0, 3), (3, 8))
"""Of eight images, those of each of two ranks."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    forget_launched()


def images() -> tuple[Tensor, Tensor]:
    """Eight images and the noise of their codes."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.randint(17, (8, 1, 8, 8), generator=generator).double()
    return counts, torch.randn(8, launched("vae").LATENT, generator=generator, dtype=torch.float64)


def test_the_bound_is_that_of_the_distributions() -> None:
    """log p(x|z) and KL(q ‖ p) of each image are torch's; over all images of a pixel, p(x|z) sums to 1."""
    counts, mean = images()
    logits, log_var = torch.randn(8, 1, 8, 8, dtype=torch.float64), mean.flip(0)
    likelihood, divergence = launched("vae").bound(counts, logits, mean, log_var)
    right = Binomial(16, torch.sigmoid(logits)).log_prob(counts).sum((1, 2, 3))
    prior = Normal(torch.zeros_like(mean), torch.ones_like(mean))
    assert error(likelihood, right) <= 1e-12
    assert error(divergence, kl_divergence(Normal(mean, torch.exp(log_var / 2)), prior).sum(1)) <= 1e-12
    every = torch.arange(17.0, dtype=torch.float64).view(17, 1, 1, 1)
    levels, _ = launched("vae").bound(every, logits[:1, :, :1, :1].expand(17, 1, 1, 1), mean[:1], log_var[:1])
    assert levels.exp().sum().item() == pytest.approx(1, rel=1e-12)


def test_the_bound_is_below_the_evidence() -> None:
    """Its mean over codes is at most log p(x), estimated with many: the image's evidence, by importance weights."""
    torch.manual_seed(2)
    vae = launched("vae")
    model, (counts, _) = vae.build("none").double(), images()
    x = counts[:1].expand(20_000, 1, 8, 8)
    noise = torch.randn(20_000, vae.LATENT, dtype=torch.float64)
    with torch.no_grad():
        logits, mean, log_var = model(x / 16, noise)
        likelihood, divergence = vae.bound(x, logits, mean, log_var)
        z = mean + torch.exp(log_var / 2) * noise
        weight = likelihood + Normal(0, 1).log_prob(z).sum(1) - Normal(mean, torch.exp(log_var / 2)).log_prob(z).sum(1)
    evidence = torch.logsumexp(weight, 0) - torch.tensor(20_000.0).log()
    assert (likelihood - divergence).mean() < evidence
    assert (likelihood - divergence).mean().item() == pytest.approx(weight.mean().item(), abs=0.1)


def losses(model: Any, counts: Tensor, noise: Tensor) -> Tensor:
    likelihood, divergence = launched("vae").bound(counts, *model(counts / 16, noise))
    return divergence - likelihood


def net(norm: str) -> Any:
    torch.manual_seed(1)
    return launched("vae").build(norm).double()


def _step() -> tuple[float, dict[str, Tensor]]:
    share, model = slice(*SHARES[dist.get_rank()]), net("syncbn")
    counts, noise = images()
    loss = losses(model, counts[share], noise[share]).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def test_two_ranks_are_one_process(ranks: RankPool) -> None:
    """The negative bound and all gradients of a step, with images shared out unevenly, to 1e-10 in float64."""
    outcomes, model = ranks.run(2, _step), net("batch")
    loss = losses(model, *images()).sum()
    loss.backward()
    assert sum(one for one, _ in outcomes) == pytest.approx(loss.item(), rel=1e-10)
    scale = max(p.grad.abs().max() for p in model.parameters())
    for name, parameter in model.named_parameters():
        off = (sum(grads[name] for _, grads in outcomes) - parameter.grad).abs().max()
        assert off <= 1e-10 * scale, name  # a bias before a norm has none


def test_the_script_on_two_ranks(tmp_path: Path) -> None:
    """It trains three nets, writes their lines, saves the synchronized one, draws, and ends with a table."""
    log, saved, picture = tmp_path / "log.jsonl", tmp_path / "net.pt", tmp_path / "pictures" / "vae.png"
    options = ("--all", "--epochs", "1", "--batch-size", "50", "--log-file", log, "--save", saved, "--png", picture)
    done = run(*TORCHRUN, SCRIPT, *options)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["norm"] for row in rows] == ["syncbn", "batch", "none"]
    assert all(row["bound"] < -100 and row["kl"] > 0 and row["ranks"] == 2 for row in rows)
    assert ["recomputed_bound" in row for row in rows] == [True, True, False]
    assert rows[0]["recomputed_bound"] > rows[0]["bound"]  # after one epoch running statistics are far behind
    assert torch.load(saved)["encoder.1.running_var"].shape == (32,)
    assert picture.stat().st_size > 5000
    *_, first, second, third, empty, last = done.stdout.rstrip().splitlines()
    assert [line.split()[0] for line in (first, second, third)] == ["SyncBatchNorm", "BatchNorm", "no"]
    assert f"{rows[0]['recomputed_bound']:.2f}" in first
    assert (empty, last) == ("", f"picture: {picture}")


def test_a_wrong_option_is_one_message() -> None:
    """With the script's name, and exit status 2."""
    done = run(sys.executable, SCRIPT, "--norm", "group", code=2)
    assert done.stderr.startswith("train_vae.py: error: argument --norm: invalid choice: 'group'")


def test_what_the_picture_needs_is_asked_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Without matplotlib it ends with code 2 before it trains, not with a traceback after that."""
    script = launched("train_vae")
    monkeypatch.setattr(sys, "argv", ["train_vae.py"])
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 2
    assert "matplotlib, which is not installed" in capsys.readouterr().err
