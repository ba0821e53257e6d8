"""The one sum over the ranks of a call: who waits in it is known, and whether all were in the same one is compared.

What goes wrong is an error that names the layer, the call and, as far as they can be asked, where the other ranks are.
"""

import functools
import logging
import time
import weakref
from threading import get_ident

from torch import Tensor, nn
from torch.nn import functional as F

from syncbn import comm, fingerprint, inspection, watch
from syncbn.fingerprint import BACKWARD, FORWARD, Found
from syncbn.names import FUNCTION, Call, Label, known_labels, name_by_path
from syncbn.watch import Place

_log = logging.getLogger("syncbn")
_votes = functools.cache(fingerprint.is_on)
"""Whether this process takes part in the comparison, asked once."""
_named: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose layers have got their paths here."""
_HOW = (
    "Call the same layers in the same order on every rank, with an empty batch if there is nothing to do. "
    "If the models are alike and only converted or wrapped in different ways, call syncbn.name_layers(model) on every "
    "rank, or set SYNCBN_FINGERPRINT=0, which turns this comparison off."
)


NO_MARK = 0.0, 0


def begin(call: Call | None, direction: str) -> float:
    """What stands for this call on the wire, before its sum; 0 if this rank is alone or abstains."""
    if call is None:
        return 0.0
    call.direction = direction
    if not call.label.is_path:
        _name_in_ddp(call.label)
    if _votes():
        alike = call.needs_grad if direction is FORWARD else call.nth
        call.tag = fingerprint.tag_of(call.label, direction, call.shape[1], call.activation, alike)
    return call.tag


def _name_in_ddp(label: Label) -> None:
    """A layer that was built synchronized gets its path when it is first called within DistributedDataParallel."""
    model = None if label is FUNCTION else comm.active_ddp()
    if model is not None and model not in _named:
        _named.add(model)
        name_by_path(model)


def mark_of(call: Call | None) -> tuple[float, int]:
    """What the device compares after the sum, and the number that it writes when it has come so far."""
    return NO_MARK if call is None else (call.tag, call.turn)


def all_sum(wire: Tensor, call: Call | None) -> Tensor:
    """The sum over the ranks of the call's group, in place; the wire ends with the fingerprint. Alone, nothing is done.

    Raises:
        RuntimeError: of the transport's own type, if that fails; on the CPU, on all ranks alike, if they are in
            different calls; in check mode also on a GPU, before anything is sent.
    """
    if call is None:
        return wire
    thread, place = get_ident(), (call, call.direction, time.monotonic())
    _enter(thread, place)
    try:
        try:
            comm.all_sum(wire, call.group)
        except RuntimeError as error:
            raise _failed(place, error) from error
        if call.tag and wire.is_cpu:
            found = fingerprint.read(wire, call.tag)
            if not found.agree():
                raise _mixed_up(place, found)
    finally:
        _leave(thread, place)
    return wire


def functional_sum(sums: Tensor, group_name: str, call: Call | None = None, direction: str = FORWARD) -> Tensor:
    """`all_sum` into a new tensor, by operations that can be traced. It abstains; in a graph, no call is known."""
    wire = F.pad(sums, (0, 2))
    if call is None:
        return comm.functional_sum(wire, group_name)[..., :-2]
    thread, place = get_ident(), (call, direction, time.monotonic())
    _enter(thread, place)
    try:
        return comm.functional_sum(wire, group_name)[..., :-2]
    except RuntimeError as error:
        raise _failed(place, error) from error
    finally:
        _leave(thread, place)


def _enter(thread: int, place: Place) -> None:
    """Before a sum over the ranks: whoever waits in it can be seen."""
    if not watch.is_started:
        watch.start()
    watch.now[thread] = place
    if inspection.is_on():
        try:
            _inspect(place)
        except BaseException:
            del watch.now[thread]
            raise


def _leave(thread: int, place: Place) -> None:
    del watch.now[thread]
    watch.last = place
    if place[1] is BACKWARD:
        place[0].counts.went_back = True


def _inspect(place: Place) -> None:
    call, direction, _ = place
    try:
        differing = inspection.compare(call, direction, watch.patience())
    except RuntimeError as error:
        raise _failed(place, error) from error
    if differing is not None:
        raise RuntimeError(
            "All ranks of a group must make the same synchronized call; in check mode, before it, the ranks said:\n"
            f"{differing}\nNothing was sent and no buffer has moved. {_HOW}"
        )


def _failed(place: Place, error: RuntimeError) -> RuntimeError:
    """Of the type that the transport raised, so that whoever catches it still does.

    The line is logged at once: a launcher may end this process before the others have been asked.
    """
    call, direction, since = place
    reason = str(error).partition("\n")[0]
    where = f"layer {call.label.name!r} ({direction}, call {call.number}, {call.like()})"
    text = f"The sum over the ranks failed in {where} on rank {comm.rank()}, after {time.monotonic() - since:.1f} s"
    _log.error("syncbn: %s: %s", text, reason)
    text = f"{text}: {reason}\n{watch.ask(place)}".rstrip()
    try:
        return type(error)(text)
    except TypeError:  # one that takes more than a text
        return RuntimeError(text)


def _mixed_up(place: Place, found: Found) -> RuntimeError:
    call, direction, _ = place
    own = f"layer {call.label.name!r} ({direction}, call {call.number}, {call.like()})"
    return RuntimeError(
        f"All ranks of a group must be in the same synchronized call; got rank {comm.rank()} in {own} and "
        f"{_others(found)}. The sums were dropped and no buffer has moved. {_HOW}\n{watch.ask(place)}".rstrip()
    )


def _others(found: Found) -> str:
    """What the rest is in, as far as two numbers tell."""
    other, voters = fingerprint.other_of(found), int(found.votes // fingerprint.VOTE)
    if other is None:
        return f"others of {voters} ranks in at least two more calls"
    who = f"{other.ranks} of {voters} ranks"
    calls = sorted({call for label in known_labels() for call in fingerprint.calls_with(other.tag, label)})
    return f"{who} in {' or '.join(calls) or 'another call, of a layer that this rank does not know'}"
