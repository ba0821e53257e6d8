"""The watch: one thread a process that says who waits for whom when a call has waited for long.

A rank whose call has waited for `patience` seconds rings an alarm in the process group's store. Every rank's watch
looks there each `interval` and writes down where its rank is. The one that rang makes a table of it, which every
waiting rank logs, once a hang. It has a connection of its own to the store, on which nobody else waits: bounded.py.

    alarm/1    who rang, and the ranks of the group      alarm/1/rank    where that rank is      alarm/1/table

A look costs a message of some 60 bytes: at 1,024 ranks and an interval of 2 s, the store answers 512 a second. If the
process that hosts the store ends before the others, torch prints a warning there; under torchrun the launcher hosts it.
"""

import atexit
import collections
import functools
import json
import logging
import multiprocessing.util
import os
import socket
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from syncbn import comm, groups, mixups, progress, whereabouts
from syncbn.bounded import BoundedStore
from syncbn.fingerprint import Found
from syncbn.names import Label, Place
from syncbn.whereabouts import Where

PATIENCE = 60.0
STORE_SECONDS = 3.0
now: dict[int, Place] = {}
"""By thread, the call that waits for other ranks."""
last: tuple[Label, str, int, float] | None = None
"""The call that was the last to end: whose, its direction and number, and when. It keeps no process group alive."""
_log = logging.getLogger("syncbn")
_NO_ANSWER = "The other ranks could not be asked where they are: the process group's store does not answer."


def patience() -> float:
    """`SYNCBN_WATCH` in seconds, 0 for no watch."""
    given = os.environ.get("SYNCBN_WATCH", "")
    try:
        seconds = float(given) if given else PATIENCE
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < threading.TIMEOUT_MAX:
        raise ValueError(
            f"SYNCBN_WATCH must be the seconds that a call may wait before it is reported, or 0; got {given!r}. "
            f"Leave it away for {PATIENCE:.0f}."
        )
    return seconds


class _Question:
    """Where are all ranks of this call's group?"""

    def __init__(self, place: Place) -> None:
        self.place, self.answered, self.text = place, threading.Event(), ""

    def answer(self, text: str) -> None:
        self.text = text
        self.answered.set()


class Watch:
    """Of this process. Its thread alone speaks to the store, so that nobody who asks waits longer than he wants to."""

    def __init__(self, patience: float) -> None:
        self.patience, self.interval = patience, min(2.0, patience / 8)
        self.answering = 2 * self.interval + 0.5
        self._reported: Place | None = None
        self._mixed_up: Found | None = None
        self._told: tuple[Place, str] | None = None
        self._quiet_since: Any = None
        """The last call after one that failed: the process may be on its way out, and the store gone already."""
        self._alarms = 0
        self._store: BoundedStore | None = None
        self._world: Any = None
        self._questions: collections.deque[_Question] = collections.deque()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="syncbn-watch", daemon=True)
        self._thread.start()

    def ask(self, place: Place) -> str:
        """The table of where the ranks are now, or why there is none; within some intervals."""
        question = _Question(place)
        self._questions.append(question)
        self._wake.set()
        question.answered.wait(2 * self.answering + 1)
        return question.text or _NO_ANSWER

    def stop(self) -> None:
        """At the interpreter's end, when no thread may be left in a call of the store: with a last word to it."""
        self._stopped.set()
        self._wake.set()
        self._thread.join(STORE_SECONDS + 1)

    def _run(self) -> None:
        self._safely(self._connect)
        while not self._stopped.is_set():
            self._wake.wait(self.interval)
            self._wake.clear()
            self._safely(self._connect)
            while self._questions:
                question = self._questions.popleft()
                question.answer(self._safely(self._ring, question.place) or _NO_ANSWER)
                self._quiet_since = last
            if now or last is not self._quiet_since:
                self._safely(self._look)
        self._safely(self._say_goodbye)

    def _safely(self, step: Callable[..., Any], *given: Any) -> Any:
        """A store that fails is not asked again: what waits is told by its transport."""
        try:
            return step(*given)
        except Exception:
            _log.debug("the watch has lost the group's store", exc_info=True)
            self._store = None

    def _connect(self) -> None:
        """To the store of the default group there is now."""
        world = groups.world()
        if self._world is not None and self._world() is world:
            return
        for device in progress.every():  # what they know is of a group that is gone
            device.clear()
        self._reported = self._told = self._world = None
        if world is None:
            return
        if self._store is not None:
            self._store.close()
        self._world, self._alarms = weakref.ref(world), 0
        self._store = BoundedStore(functools.partial(comm.own_store, "syncbn/watch"), STORE_SECONDS)
        while self._store.check([f"alarm/{self._alarms + 1}"]):  # of hangs before this rank came
            self._alarms += 1
        if self._alarms:
            self._answer(_waiting())
        if self._store.check([f"ended/{groups.rank()}"]):  # of a process before this one, by the same launcher
            self._store.set(f"ended/{groups.rank()}", "")

    def _look(self) -> None:
        """Whether a call here has waited for too long, or an alarm was rung."""
        if groups.world() is None:
            return
        self._look_at_devices()
        place = _waiting()
        is_new = place is not None and place is not self._reported
        if is_new and time.monotonic() - place[2] >= self.patience:  # type: ignore[index]  # then there is one
            self._report(place)
        elif self._store is not None and self._store.check([f"alarm/{self._alarms + 1}"]):
            self._alarms += 1
            ranks = json.loads(self._store.get(f"alarm/{self._alarms}"))["ranks"]
            self._answer(place)
            if is_new and tuple(ranks) == groups.ranks_of(place[0].group):  # type: ignore[index]  # as above
                self._report(place, heard=True)

    def _look_at_devices(self) -> None:
        for device in progress.every():
            found = device.mixed_up()
            if found is not None and found != self._mixed_up:
                self._mixed_up = found
                _log.error("syncbn: %s", mixups.on_device(groups.rank(), device.place_of(found.tag), found))

    def _report(self, place: Any, heard: bool = False) -> None:
        self._reported = place
        table = self._safely(self._table, place, False) if heard else self._safely(self._ring, place)
        _log.warning(table or f"{_title(place, groups.ranks_of(place[0].group) or ())} not known. {_NO_ANSWER}")

    def _ring(self, place: Place) -> str | None:
        """The table; rings an alarm, or finds that another rank of the group has."""
        if self._told is not None and self._told[0] is place:  # another's alarm, while this call was waiting
            return self._told[1]
        if self._store is None:
            return None
        ranks = groups.ranks_of(place[0].group)
        mine = json.dumps({"rank": groups.rank(), "ranks": ranks, "at": time.time()})
        while True:
            rung = self._store.compare_set(f"alarm/{self._alarms + 1}", "", mine).decode()
            self._alarms += 1
            self._answer(place)
            if json.loads(rung)["ranks"] == list(ranks or ()):
                return self._table(place, is_mine=rung == mine)

    def _answer(self, place: Place | None) -> None:
        if self._store is not None:
            self._store.set(f"alarm/{self._alarms}/{groups.rank()}", _where(place).encoded())

    def _table(self, place: Place, is_mine: bool) -> str:
        """The one that rang waits for the answers and makes it; the others take it from there, if it comes."""
        store, key, ranks = self._there(), f"alarm/{self._alarms}", groups.ranks_of(place[0].group) or ()
        until = time.monotonic() + self.answering + (0 if is_mine else self.interval)
        missing = set(ranks)
        while time.monotonic() < until and missing and not self._stopped.is_set():
            if not is_mine and store.check([f"{key}/table"]):
                text: str = store.get(f"{key}/table").decode()
                self._told = place, text
                time.sleep(_LINGER)
                return text
            missing -= {rank for rank in missing if is_mine and store.check([f"{key}/{rank}"])}
            time.sleep(self.interval / 20 if missing else 0)
        found = [self._found(key, rank) for rank in ranks]
        text = whereabouts.table(_title(place, ranks), found)
        store.set(f"{key}/table", text)
        time.sleep(_LINGER)
        return text

    def _found(self, key: str, rank: int) -> Where:
        store = self._there()
        for at in (f"{key}/{rank}", f"ended/{rank}"):
            if store.check([at]) and (text := store.get(at)):
                return Where.decoded(text)
        return Where(rank, "silent")

    def _there(self) -> BoundedStore:
        assert self._store is not None, "asked before"
        return self._store

    def _say_goodbye(self) -> None:
        """Of a process that ends while the others may go on."""
        error = getattr(sys, "last_value", None)
        if self._store is not None and groups.world() is not None:
            reason = "" if error is None else f"{type(error).__name__}: {error}"[:500]
            self._store.set(f"ended/{groups.rank()}", _where(None)._replace(state="ended", at=reason).encoded())


_LINGER = 0.25
"""Seconds that whoever has the table waits: it may be about to end, and the store with it, before others have read."""
_watch: Watch | None = None
is_started = False


def start() -> None:
    """Once a process, by its first synchronized call."""
    global _watch, is_started
    seconds = patience()
    is_started = True
    if seconds and _watch is None:
        _watch = Watch(seconds)
        if multiprocessing.parent_process() is None:
            atexit.register(_watch.stop)
        else:  # such a process ends without the interpreter's farewell
            multiprocessing.util.Finalize(None, _watch.stop, exitpriority=100)


def ask(place: Place) -> str:
    """Where all ranks of this call's group are, for an error's text; empty without a watch."""
    return "" if _watch is None else _watch.ask(place)


def _waiting() -> Place | None:
    """The call that has waited longest on this rank, on the host or on its device."""
    queued = [place for device in progress.every() if (place := device.waiting()) is not None]
    return min([*now.values(), *queued], key=lambda place: place[2], default=None)


def _where(place: Place | None) -> Where:
    """This rank, now."""
    state = "outside" if place is None else "waiting"
    here = Where(groups.rank(), state, at=whereabouts.stack_of_main(inside=place is None), host=socket.gethostname())
    if place is None:
        return here if last is None else _after(here, *last)
    call, direction, since = place
    return here._replace(
        layer=call.what(),
        direction=direction,
        call=call.number,
        like=call.like(),
        seconds=time.monotonic() - since,
        progress=comm.progress_of(call.group),
    )


def _after(here: Where, label: Label, direction: str, number: int, ended: float) -> Where:
    """In no layer, after this call of one."""
    group = label.group()
    progress = 0 if group is None else comm.progress_of(group)
    seconds = time.monotonic() - ended
    return here._replace(layer=label.what(), direction=direction, call=number, seconds=seconds, progress=progress)


def _title(place: Place, ranks: Sequence[int]) -> str:
    waited = f"rank {groups.rank()} has been in {mixups.worded(place)} for {time.monotonic() - place[2]:.0f} s"
    return f"syncbn: {waited}; ranks {whereabouts.spans(ranks)} are:"


def _forget() -> None:
    """In a forked process, which has no such thread and waits for nobody."""
    global _watch, is_started, last
    _watch, is_started, last = None, False, None
    now.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
