"""How good a classifier is, over the samples of all ranks."""

from collections.abc import Iterable

import torch
from ranks import Rank, as_rank_0, summed
from torch import Tensor, nn
from torch.nn import functional as F

EVAL_BATCH = 256


def mine(count: int, me: Rank) -> tuple[Tensor, ...]:
    """This rank's share of so many samples in batches: rank, rank + world, ..., so that each is one rank's."""
    return torch.arange(me.rank, count, me.world).split(EVAL_BATCH)


@torch.no_grad()
def classified(model: nn.Module, outputs: Iterable[tuple[Tensor, Tensor]], me: Rank) -> dict[str, float]:
    """Accuracy and mean cross-entropy of these logits and labels and those of the other ranks, exact.

    outputs is iterated over while the model is in eval mode and has the buffers that a checkpoint would have.
    """
    as_rank_0(model, me)
    model.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=me.device)  # correct, loss, samples
    for logits, labels in outputs:
        totals[0] += (logits.argmax(1) == labels).sum()
        totals[1] += F.cross_entropy(logits, labels, reduction="sum")
        totals[2] += len(labels)
    model.train()
    correct, loss, count = summed(totals, me).tolist()
    return {"accuracy": correct / count, "loss": loss / count}
