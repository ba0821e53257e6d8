"""Speech of different lengths: the data of train_sequences.py, its batches, and its recurrent net."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence

import syncbn

NORMS = ("syncbn", "batch", "none")
FEATURES, CLASSES = 12, 9


class Utterances(NamedTuple):
    """frames: a (L, 12) tensor each; labels: (N,), the speaker."""

    frames: list[Tensor]
    labels: Tensor

    def lengths(self) -> Tensor:
        return torch.tensor([len(frames) for frames in self.frames])


class Padded(NamedTuple):
    """A batch: x (N, L, 12), each utterance's own frames first; lengths and labels (N,), lengths on the CPU."""

    x: Tensor
    lengths: Tensor
    labels: Tensor

    def mask(self) -> Tensor:
        """(N, L), True at an utterance's own frames."""
        return torch.arange(self.x.shape[1], device=self.x.device) < self.lengths.to(self.x.device)[:, None]


def load() -> tuple[Utterances, Utterances]:
    """Training and test set of Japanese Vowels, 270 and 370 utterances of 7 to 29 frames by nine speakers, standardized
    by the training set; ValueError if the package that ships it is missing.

    Source: Kudo, Toyama, Shimbo, Multidimensional curve classification using passing-through regions, 1999.
    """
    try:
        from aeon.datasets import load_japanese_vowels
    except ImportError as error:
        raise ValueError(
            f"The speech data comes with the package aeon; it cannot be imported ({error}). "
            "Install it with: pip install 'syncbn[sequences]', on Python 3.11 or newer."
        ) from None
    both = []
    for split in ("train", "test"):
        series, speakers = load_japanese_vowels(split=split)
        frames = [torch.from_numpy(one.T).float() for one in series]
        both.append(Utterances(frames, torch.tensor([int(speaker) - 1 for speaker in speakers])))
    every = torch.cat(both[0].frames)
    mean, std = every.mean(0), every.std(0)
    train, test = (Utterances([(one - mean) / std for one in part.frames], part.labels) for part in both)
    return train, test


def padded(data: Utterances, chosen: Tensor, device: torch.device) -> Padded:
    """These utterances, padded with zeros to the longest of them."""
    frames = [data.frames[i] for i in chosen.tolist()]
    lengths = torch.tensor([len(one) for one in frames])
    return Padded(pad_sequence(frames, batch_first=True).to(device), lengths, data.labels[chosen].to(device))


def buckets(lengths: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """All indices in batches of some `size` utterances of similar lengths, in random order, none without a share for
    each rank: the last few join the batch before.
    """
    order = (lengths + 3 * torch.rand(len(lengths), generator=generator)).argsort()
    count = max(1, len(order) // size)
    batches = order.tensor_split(count)
    for i in torch.randperm(count, generator=generator).tolist():
        yield batches[i]


class SpeechNet(nn.Module):
    """Two bidirectional recurrent layers with a norm before, between and behind; then the mean over time and linear.

    (N, L, 12), lengths and mask -> (N, 9) logits. The first norms see (N, C, L) as a convolution leaves it, the others
    what a recurrent layer leaves, (N, C, L) with the strides of (N, L, C). With a mask, padding adds nothing to any
    statistic and is 0 behind each norm, as convolutions and sums take it; the recurrent layers leave it out anyway.
    """

    def __init__(self, norm: str, width: int = 24) -> None:
        super().__init__()
        make, bias = (nn.Identity, True) if norm == "none" else (nn.BatchNorm1d, False)  # which a norm takes away
        self.project, self.norm0 = nn.Conv1d(FEATURES, width, 1, bias=bias), make(width)
        self.conv, self.norm1 = nn.Conv1d(width, width, 3, padding=1, bias=bias), make(width)
        self.rnn1, self.norm2 = _bidirectional(width, width), make(2 * width)
        self.rnn2, self.norm3 = _bidirectional(2 * width, width), make(2 * width)
        self.classify = nn.Linear(2 * width, CLASSES)

    def forward(self, x: Tensor, lengths: Tensor, mask: Tensor | None) -> Tensor:
        y = torch.relu(_normalized(self.norm0, self.project(x.transpose(1, 2)), mask))
        y = torch.relu(_normalized(self.norm1, self.conv(y), mask))
        for rnn, norm in ((self.rnn1, self.norm2), (self.rnn2, self.norm3)):
            y = _normalized(norm, _run(rnn, y.transpose(1, 2), lengths).transpose(1, 2), mask)
        own = torch.arange(y.shape[2], device=y.device) < lengths.to(y.device)[:, None]
        mean = torch.where(own[:, None], y, 0).sum(2) / lengths.to(y)[:, None]
        return self.classify(mean)


def build(norm: str) -> nn.Module:
    """SpeechNet with norm; 'syncbn' is the 'batch' model converted."""
    model = SpeechNet(norm)
    return syncbn.convert_sync_batchnorm(model) if norm == "syncbn" else model


def _bidirectional(inputs: int, width: int) -> nn.GRU:
    return nn.GRU(inputs, width, batch_first=True, bidirectional=True)


def _normalized(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    y: Tensor = norm(x) if mask is None else norm(x, None, mask)  # torch's layers take no mask
    return y


def _run(rnn: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """(N, L, C) -> (N, L, 2 C'), each sequence as if it were alone, with zeros behind its end."""
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    y, _ = pad_packed_sequence(rnn(packed)[0], batch_first=True, total_length=x.shape[1])
    return y
