"""Whether all ranks are in the same call, told by two numbers on the wire.

    v = 2³² + h,   q = h²,   h an integer, 1 ≤ h < 2²⁰, made of what must be alike;   0 and 0 of a rank that abstains

The sums over W ≤ 4096 ranks, V and Q, are exact in float64. ⌊V / 2³²⌋ is the number n of ranks that voted; they agree
iff V = n·(2³² + h) and Q = n·h²: then Σ(hᵢ − h)² = Q − 2h·Σhᵢ + n·h² = 0. If they do not, no rank finds both. Calls in
compiled and traced graphs, under torch.func and in a second derivative abstain, where a layer's name would have to be a
constant of the graph. On a GPU without Triton nobody compares. A mix-up is missed once in a million, having but 20
bits; and layers without a path are told apart by the order of their first calls, so that if a rank leaves one out from
the first step on and the next has its size, nobody can tell. Name them: syncbn.name_layers.
"""

import ctypes
import hashlib
import itertools
import os
from typing import Any, NamedTuple

from torch import Tensor

from syncbn.formulas import ACTIVATIONS, VOTE
from syncbn.names import BACKWARD, FORWARD, Label, worded

MOST = 1 << 20
MOST_TAGS = 1024
"""Kept for each layer; what is not kept is made again."""
NTH = range(1, 17)
"""Backward passes of calls in one step that are tried to tell which the others are in."""
_Two = ctypes.c_double * 2


class Found(NamedTuple):
    """The two sums as a rank found them; tag is its own."""

    tag: float
    votes: float
    squares: float


class Other(NamedTuple):
    """What the other ranks are in, where there are no more than two calls: how many ranks, and its tag."""

    ranks: int
    tag: float


def is_on() -> bool:
    """Whether this process takes part, `SYNCBN_FINGERPRINT`."""
    return os.environ.get("SYNCBN_FINGERPRINT", "1") != "0"


def tag_of(label: Label, *alike: Any) -> float:
    """h of this layer and what must be alike: direction, channels, activation, needs a gradient or nth call."""
    tag = label.tags.get(alike)
    if tag is None:
        tag = _hash(label, *alike)
        if len(label.tags) < MOST_TAGS:
            label.tags[alike] = tag
    return tag


def _hash(label: Label, *alike: Any) -> float:
    text = "\0".join((label.identity, *map(repr, alike)))
    return float(1 + int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") % (MOST - 1))


def differing(wire: Tensor, tag: float) -> Found | None:
    """What the end of a wire on the CPU says if not all that voted are in the call of this tag; None if they are."""
    votes, squares = _Two.from_address(
        wire.data_ptr() + 8 * wire.numel() - 16
    )  # an ATen indexing takes five times that
    voters = votes // VOTE
    if votes == voters * (VOTE + tag) and squares == voters * tag * tag:
        return None
    return Found(tag, votes, squares)


def other_of(found: Found) -> Other | None:
    """k others in a call of tag t: Σ(hᵢ − h) = k·(t − h), Σ(hᵢ − h)² = k·(t − h)²; None if there are more than two."""
    voters = found.votes // VOTE
    total = found.votes - voters * VOTE
    first = total - voters * found.tag
    second = found.squares - 2 * found.tag * total + voters * found.tag**2
    if first == 0 or second % abs(first):
        return None
    tag = found.tag + second // first
    ranks = first / (tag - found.tag)
    is_one = ranks.is_integer() and 0 < ranks < voters and 1 <= tag < MOST
    return Other(int(ranks), tag) if is_one else None


def calls_with(tag: float, label: Label) -> list[str]:
    """The calls of this layer that have this tag: of those that were made here, or else of those that it might make."""
    alike = [key for key, known in label.tags.items() if known == tag]
    channels = {key[1] for key in label.tags} | ({label.channels} if label.is_path and label.channels else set())
    if not alike:
        ways = (FORWARD, True), (FORWARD, False), *((BACKWARD, nth) for nth in NTH)
        might = itertools.product(channels, ACTIVATIONS, ways)
        keys = [(direction, size, activation, rest) for size, activation, (direction, rest) in might]
        alike = [key for key in keys if _hash(label, *key) == tag]
    return [_worded(label, *key) for key in alike]


def _worded(label: Label, direction: str, channels: int, activation: str | None, rest: int) -> str:
    nth = f" of its call {rest} since the last" if direction == BACKWARD and rest > 1 else ""
    like = worded(channels, activation, direction == BACKWARD or bool(rest))
    return f"layer {label.name!r} ({direction}{nth}, {like})"
