"""Activation checkpointing: a recomputation takes the sums that the first pass took, and takes none again.

A checkpointed region runs twice, in the forward pass and again in the backward pass. While it runs, it is found
    use_reentrant=False   behind the saved-tensor hooks, as the checkpoint's frame,
    use_reentrant=True    on the Python stack, as the ctx of a CheckpointFunction, torch's or another library's.
The sums of its calls, each of the size of C, hang on that frame or ctx in the order of the calls, and go with it.
Of what is not recognised so, nothing is recalled: it sums over the ranks anew, alike on all of them, and moves again.
In a compiled graph the sums are marked as saved; a graph made within an eager region looks them up when it runs.

That is so for a net that was first compiled outside of any region and is then put into one as a whole (checkpoint
inside of what is compiled, or compile it where it is checkpointed); for calls under torch.enable_grad() in a reentrant
region; for calls whose tensors torch.func transforms, or in forward-mode AD. A checkpoint function of another library
is recognised if it is an autograd function named CheckpointFunction; what others run in their backward is new.
"""

import contextlib
import itertools
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy

from syncbn import torch_private
from syncbn.names import Call

_SEEN = contextlib.nullcontext()

Path = tuple[Hashable, ...]
"""Where in a region's code a call is made: the frames between them, each with its place in its function."""


class _Pass(NamedTuple):
    """A region that is running, for the first time if recomputation is None, else as that one of its recomputations.

    Not every call that a reentrant region makes is seen to be in it, those under enable_grad are not; by its path, a
    call of the recomputation is not taken for another. A non-reentrant region sees all and needs no path.
    """

    region: Any
    recomputation: object
    path: Path = ()


class Taken(NamedTuple):
    """The sums of all ranks, of how many channels, and the call that took them, which a rank alone and a graph lack."""

    sums: Tensor
    channels: int
    call: Call | None = None


class _Record:
    """The sums of a region's calls by path and in order, and how far its newest recomputation has come."""

    def __init__(self) -> None:
        self.taken: defaultdict[Path, list[Taken]] = defaultdict(list)
        self.recomputation: object = None
        self.seen: Counter[Path] = Counter()

    def recall(self, again: _Pass) -> Taken | None:
        """The sums of the recomputation's next call; None if the first pass made no such call."""
        if self.recomputation != again.recomputation:
            self.recomputation, self.seen = again.recomputation, Counter()
        at = self.seen[again.path]
        self.seen[again.path] += 1
        return self.taken[again.path][at] if at < len(self.taken[again.path]) else None


def is_ordinary() -> bool:
    """Whether autograd records this call, outside of any region that may be recomputed and of any backward."""
    is_hooked = torch_private.top_hooks(True) is not None
    is_seen = torch_private.can_see_hooks and torch.is_grad_enabled()
    return is_seen and not is_hooked and torch_private.backward_id() == -1


def taken_once(take: Callable[[], Taken], channels: int, recorded: bool, site: str = "") -> tuple[Taken, bool]:
    """The sums of all ranks for this call of an autograd.Function's forward, and whether they were taken just now.

    recorded: whether autograd records the caller. site: `graph_site`, of a call within a graph.

    Raises:
        RuntimeError: where a recomputation makes another call than the first pass did.
    """
    hooked = torch_private.top_hooks(True) is not None
    stacked = not recorded or torch_private.backward_id() != -1
    if not hooked and not stacked:  # an ordinary forward pass
        return take(), True
    first, again = _open_passes(hooked, stacked, sys._getframe(2), site)
    known = None if again is None else _record_of(again.region).recall(again)
    if known is not None and known.channels != channels:
        raise RuntimeError(
            "The recomputation of a checkpointed region must make the calls of its first pass, in their order; got "
            f"{channels} channels where there were {known.channels}. "
            "Make the region depend on nothing that changes between forward and backward."
        )
    taken = take() if known is None else known
    for each in first:
        _record_of(each.region).taken[each.path].append(taken)
    return taken, known is None


@torch_private.constant_when_compiled
def graph_site() -> str:
    """Where the call stands that is being written to a graph; empty if no region is running as the graph is made.

    A graph for the first pass and one for the recomputation may run independent calls in different orders.
    """
    first, again = _open_passes(True, True, sys._getframe(1))
    if not first and again is None:
        return ""
    lines = torch_private.traced_lines()
    return " ".join(["graph", *lines]) if lines else ""


@contextlib.contextmanager
def kept() -> Iterator[None]:
    """Within it, what is written to a graph is saved for its backward, where a compiled region would recompute it."""
    nodes = torch_private.graph_nodes()
    before = len(nodes)
    yield
    for node in itertools.islice(reversed(nodes), len(nodes) - before):
        node.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def hidden() -> contextlib.AbstractContextManager[None]:
    """Within it, selective checkpointing sees no operation: it counts them, and a recomputation has fewer."""
    return _hidden() if torch_private.count_modes() else _SEEN


@contextlib.contextmanager
def _hidden() -> Iterator[None]:
    modes = torch_private.modes()
    others = [mode for mode in modes if not isinstance(mode, torch_private.selective_modes)]
    if len(others) == len(modes):
        yield
        return
    _replace_modes(modes, others)
    try:
        yield
    finally:
        _replace_modes(others, modes)


def _replace_modes(now: list[Any], then: list[Any]) -> None:
    for _ in now:
        torch_private.pop_mode()
    for mode in then:
        torch_private.push_mode(mode)


def _record_of(region: Any) -> _Record:
    record: _Record = vars(region).setdefault("_syncbn", _Record())
    return record


def _open_passes(hooked: bool, stacked: bool, caller: FrameType, site: str = "") -> tuple[list[_Pass], _Pass | None]:
    """The innermost recomputation that is running, and the first passes that are running within it (or at all).

    A recomputation among the hooks is within one on the stack: that one is waiting for its saved tensors or its
    gradients.
    """
    first, again = _split(_hooked_passes() if hooked else iter(()))
    if stacked:
        first_on_stack, again_on_stack = _split(_stacked_passes(caller))
        first, again = first + first_on_stack, again or again_on_stack
    if site:  # the frames between are the compiler's
        first = [each._replace(path=(site,)) for each in first]
        again = None if again is None else again._replace(path=(site,))
    return first, again


def _split(passes: Iterator[_Pass]) -> tuple[list[_Pass], _Pass | None]:
    """The first passes up to a recomputation, and that."""
    first: list[_Pass] = []
    for each in passes:
        if each.recomputation is not None:
            return first, each
        first.append(each)
    return first, None


def _hooked_passes() -> Iterator[_Pass]:
    """Of non-reentrant regions, the innermost first."""
    for pack in _pack_hooks():
        found = torch_private.checkpoint_of(pack)
        if found is not None:
            yield _Pass(*found)


def _pack_hooks() -> list[Any]:
    """All that are in force, the innermost first: torch shows the innermost only, so each is lifted for a moment."""
    lifted = []
    try:
        while (hooks := torch_private.top_hooks(True)) is not None:
            torch_private.pop_hooks()
            lifted.append(hooks)
    finally:
        for hooks in reversed(lifted):
            torch_private.push_hooks(*hooks)
    return [pack for pack, _ in lifted]


def _stacked_passes(caller: FrameType | None) -> Iterator[_Pass]:
    """Of reentrant regions, the innermost first, from this frame of the Python stack outwards."""
    path: list[Hashable] = []
    while caller is not None:
        code = caller.f_code
        if code.co_name in ("forward", "backward") and code.co_varnames[:1] == ("ctx",):
            ctx = caller.f_locals["ctx"]
            if type(ctx).__name__ == "CheckpointFunctionBackward":
                recomputation = None if code.co_name == "forward" else torch_private.backward_id()
                yield _Pass(ctx, recomputation, tuple(path))
        path.append((code, caller.f_lasti))
        caller = caller.f_back
