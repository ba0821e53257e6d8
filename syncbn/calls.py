"""The one sum over the ranks of a call: who waits in it is known, and whether all were in the same one is compared.

What goes wrong is an error that names the layer, the call and, as far as they can be asked, where the other ranks are.
"""

import functools
import logging
import time
import weakref
from collections.abc import Callable
from threading import get_ident
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from syncbn import comm, fingerprint, groups, inspection, mixups, profile, progress, watch
from syncbn.names import FORWARD, FUNCTION, Call, Label, Place, Pooling, Step, name_by_path
from syncbn.progress import Progress

T = TypeVar("T")
_log = logging.getLogger("syncbn")
_votes = functools.cache(fingerprint.is_on)
"""Whether this process takes part in the comparison, asked once."""
_named: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()
"""Models whose layers have got their paths here."""
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
    model = None if label is FUNCTION else groups.active_ddp()
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
            different calls; on a GPU, if an earlier call was found to be so; in check mode before anything is sent.
    """
    if call is None:
        return wire
    thread, place = get_ident(), (call, call.direction, time.monotonic())
    device, record = None if wire.is_cpu else progress.of(wire.device), profile.recording
    _enter(thread, call, place, device)
    try:
        try:
            if record is None:
                comm.all_sum(wire, call.group)
            else:
                _recorded(record, comm.all_sum, wire, place, call.group)
        except RuntimeError as error:
            raise _failed(place, error) from error
        if device is not None:
            call.turn = device.enqueue(call)
        elif call.tag and wire.is_cpu:
            found = fingerprint.differing(wire, call.tag)
            if found is not None:
                raise RuntimeError(f"{mixups.on_cpu(groups.rank(), place, found)}\n{watch.ask(place)}".rstrip())
        _done(call, place)
    finally:
        watch.now.pop(thread, None)
    return wire


def functional_sum(sums: Tensor, group_name: str, call: Call | None = None, direction: str = FORWARD) -> Tensor:
    """`all_sum` into a new tensor, by operations that can be traced. It abstains; in a graph, no call is known."""
    wire = F.pad(sums, (0, 2))
    if call is None:
        return comm.functional_sum(wire, group_name)[..., :-2]
    thread, place, record = get_ident(), (call, direction, time.monotonic()), profile.recording
    _enter(thread, call, place, None)
    try:
        if record is None:
            summed = comm.functional_sum(wire, group_name, call.group)
        else:
            summed = _recorded(record, comm.functional_sum, wire, place, group_name, call.group)
        _done(call, place)
    except RuntimeError as error:
        raise _failed(place, error) from error
    finally:
        watch.now.pop(thread, None)
    return summed[..., :-2]


def _recorded(
    record: profile.Profile, sum_over_ranks: Callable[..., Tensor], wire: Tensor, place: Place, *group: Any
) -> Tensor:
    """The sum, with its time taken."""
    begun = record.mark(wire)
    summed = sum_over_ranks(wire, *group)
    record.add(place[0], place[1], wire.numel() * wire.itemsize, begun, record.mark(wire))
    return summed


def awaited(what: Step | Pooling, answer: Callable[[], T]) -> T:
    """answer(), for which this rank waits on the others, seen by the watch as a layer's call is."""
    if not watch.is_started:
        watch.start()
    thread, place = get_ident(), (what, FORWARD, time.monotonic())
    watch.now[thread] = place
    record = profile.recording
    try:
        if record is None:
            return answer()
        begun, answered = time.perf_counter(), answer()
        record.add(what, FORWARD, 0, begun, time.perf_counter())
        return answered
    except RuntimeError as error:
        raise _failed(place, error) from error
    finally:
        watch.now.pop(thread, None)


def _enter(thread: int, call: Call, place: Place, device: Progress | None) -> None:
    """Before a sum over the ranks: whoever waits in it can be seen."""
    if not watch.is_started:
        watch.start()
    if device is not None and (found := device.mixed_up()) is not None:
        device.forget()
        raise RuntimeError(mixups.on_device(groups.rank(), device.place_of(found.tag), found))
    watch.now[thread] = place
    if inspection.is_on():
        try:
            _inspect(call, place)
        except BaseException:
            watch.now.pop(thread, None)
            raise


def _done(call: Call, place: Place) -> None:
    call.went(place[1])
    watch.last = call.label, place[1], call.number, time.monotonic()


def _inspect(call: Call, place: Place) -> None:
    try:
        differing = inspection.compare(call, place[1], watch.patience())
    except RuntimeError as error:
        raise _failed(place, error) from error
    if differing is not None:
        raise RuntimeError(
            f"{mixups.RULE}; in check mode, before it, they said:\n{differing}\n"
            f"Nothing was sent and no buffer has moved. {mixups.HOW}"
        )


def _failed(place: Place, error: RuntimeError) -> RuntimeError:
    """Of the type that the transport raised, so that whoever catches it still does.

    A line is logged at once: a launcher may end this process before the others have been asked.
    """
    reason = str(error).partition("\n")[0]
    waited = f"after {time.monotonic() - place[2]:.1f} s"
    text = f"The sum over the ranks failed on rank {groups.rank()} in {mixups.worded(place)}, {waited}: {reason}"
    _log.error("syncbn: %s", text)
    text = f"{text}\n{watch.ask(place)}".rstrip()
    try:
        return type(error)(text)
    except TypeError:  # one that takes more than a text
        return RuntimeError(text)
