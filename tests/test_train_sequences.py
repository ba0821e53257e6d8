"""launch/train_sequences.py: a masked step is one of the unpadded sequences, whatever they are padded with."""

import copy
import json
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from tests.support.launching import LAUNCH, TORCHRUN, forget_launched, launched, run
from tests.support.oracle import error
from tests.support.ranks import RankPool

SCRIPT = str(LAUNCH / "train_sequences.py")
needs_data = pytest.mark.skipif(find_spec("aeon") is None, reason="the speech data comes with aeon (Python 3.11)")
LENGTHS = ([7, 3, 5], [4, 9])
"""Of the utterances of two ranks."""


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    yield
    forget_launched()


def utterances(lengths: list[int], seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    frames = [torch.randn(length, 12, generator=generator, dtype=torch.float64) * 2 + 1 for length in lengths]
    return launched("sequences").Utterances(frames, torch.arange(len(lengths)) % 9)


def net() -> nn.Module:
    torch.manual_seed(1)
    return launched("sequences").build("syncbn").double()


def _step(padding: float) -> tuple[float, dict[str, Tensor]]:
    """A rank's loss and gradients, of padded utterances."""
    sequences, script = launched("sequences"), launched("train_sequences")
    rank, model = dist.get_rank(), net()
    data = utterances(LENGTHS[rank], rank)
    batch = sequences.padded(data, torch.arange(len(data.labels)), torch.device("cpu"))
    batch = batch._replace(x=torch.where(batch.mask()[..., None], batch.x, padding))
    loss = script.losses(model, batch, True).sum()
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def unpadded(model: Any) -> Tensor:
    """The losses of all utterances of both ranks, each run by itself through all but the norms."""
    parts = [utterances(lengths, rank) for rank, lengths in enumerate(LENGTHS)]
    ys = [frames.T[None] for part in parts for frames in part.frames]

    def normalized(norm: nn.Module, ys: list[Tensor]) -> list[Tensor]:
        every = F.batch_norm(torch.cat(ys, 2), None, None, norm.weight, norm.bias, True, 0.0, norm.eps)
        return list(every.split([y.shape[2] for y in ys], 2))

    ys = [torch.relu(y) for y in normalized(model.norm0, [model.project(y) for y in ys])]
    ys = [torch.relu(y) for y in normalized(model.norm1, [model.conv(y) for y in ys])]
    for rnn, norm in ((model.rnn1, model.norm2), (model.rnn2, model.norm3)):
        ys = normalized(norm, [rnn(y.transpose(1, 2))[0].transpose(1, 2) for y in ys])
    logits = torch.cat([model.classify(y.mean(2)) for y in ys])
    return F.cross_entropy(logits, torch.cat([part.labels for part in parts]), reduction="none")


@pytest.mark.parametrize("padding", [0.0, 100.0])
def test_a_masked_step_is_that_of_the_unpadded_sequences(ranks: RankPool, padding: float) -> None:
    """On two ranks, loss and all gradients, to 1e-10 in float64; whatever the padding is."""
    outcomes = ranks.run(2, _step, padding)
    model = net()
    loss = unpadded(model).sum()
    loss.backward()
    assert sum(one for one, _ in outcomes) == pytest.approx(loss.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        assert error(sum(grads[name] for _, grads in outcomes), parameter.grad) <= 1e-10, name


def test_padding_changes_no_loss_with_the_mask_only() -> None:
    """By more frames to float64's rounding, by other values not a bit; without the mask visibly, in both modes."""
    script, ranks = launched("train_sequences"), launched("ranks")
    me = ranks.Rank(0, 1, None, torch.device("cpu"))
    data, model = utterances(list(range(7, 29)), 0), net().float()
    data = data._replace(frames=[frames.float() for frames in data.frames])
    with_mask, without = (script.effects(copy.deepcopy(model), data, is_masked, me) for is_masked in (True, False))
    assert len(with_mask) == len(without) == 6
    for column, change in with_mask.items():
        assert change <= (1e-12 if "20 more" in column else 0.0), column
    assert without["20 more, training"] > 1e-3
    assert without["noise, training"] > 1e-3
    assert without["noise, evaluation"] > 1e-3
    assert without["NaN, training"] != without["NaN, training"]


def test_batches_are_of_similar_lengths() -> None:
    """Each utterance once, at least one for each rank, and far less padding than in batches at random."""
    lengths = torch.randint(7, 30, (270,), generator=torch.Generator().manual_seed(0))
    for size in (16, 7, 500):
        batches = list(launched("sequences").buckets(lengths, size, torch.Generator().manual_seed(1)))
        assert torch.cat(batches).sort().values.tolist() == list(range(270))
        assert all(len(batch) >= min(size, 270) for batch in batches)
    batches = list(launched("sequences").buckets(lengths, 16, torch.Generator().manual_seed(1)))
    padding = [
        sum(len(b) * int(lengths[b].max()) - int(lengths[b].sum()) for b in of) for of in (batches, lengths_split())
    ]
    assert padding[0] < padding[1] / 3
    assert batches[0].tolist() != sorted(batches[0].tolist())


def lengths_split() -> list[Tensor]:
    return list(torch.randperm(270, generator=torch.Generator().manual_seed(2)).split(16))


@needs_data
def test_the_script_on_two_ranks(tmp_path: Path) -> None:
    """It trains both nets, writes a line for each epoch, saves the masked one, and ends with the table."""
    log, saved = tmp_path / "log.jsonl", tmp_path / "net.pt"
    done = run(*TORCHRUN, SCRIPT, "--epochs", "2", "--batch-size", "16", "--log-file", log, "--save", saved)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["mask"], row["epoch"]) for row in rows] == [(False, 1), (False, 2), (True, 1), (True, 2)]
    assert all(row["ranks"] == 2 and row["data"] == "japanese vowels" for row in rows)
    assert rows[3]["accuracy"] > 0.5
    assert torch.load(saved)["norm3.running_mean"].shape == (48,)
    plain, masked = done.stdout.strip().splitlines()[-2:]
    assert plain.split()[0] == "syncbn"
    assert masked.split()[:2] == ["syncbn,", "masked"]
    assert [float(cell) for cell in masked.split()[-2:]] == [0.0, 0.0]
    assert "nan" in plain
    assert f"{rows[3]['accuracy']:.2%}" in masked


def test_without_the_data() -> None:
    """What to install is said."""
    sequences = launched("sequences")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "aeon", None)
        patch.setitem(sys.modules, "aeon.datasets", None)
        with pytest.raises(ValueError, match=r"comes with the package aeon.*pip install 'syncbn\[sequences\]'"):
            sequences.load()


def test_a_mask_is_for_a_norm_that_takes_one() -> None:
    """One message for all ranks."""
    done = run(sys.executable, SCRIPT, "--norm", "batch", "--mask", "yes", code=2)
    assert done.stderr.count("error:") == 1
    assert "train_sequences.py: error: --mask yes is for a norm that takes one; got --norm batch" in done.stderr
