"""A store whose operations end: with a time limit that holds also where the host of the store is frozen or cut off.

A store's own limit is the server's business; a server that is not there lets its clients wait for ever.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any


class BoundedStore:
    """What `connect` gives, used by a thread of its own; after an operation that took too long, no more."""

    def __init__(self, connect: Callable[[], Any], seconds: float) -> None:
        self._seconds, self._is_stuck = seconds, False
        self._asked: queue.SimpleQueue[tuple[str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(connect,), name="syncbn-store", daemon=True).start()

    def check(self, keys: Sequence[str]) -> bool:
        return bool(self._ask("check", list(keys)))

    def get(self, key: str) -> bytes:
        """Of a key that is there."""
        return self._ask("get", key)  # type: ignore[no-any-return]  # a store's

    def set(self, key: str, value: str) -> None:
        self._ask("set", key, value)

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """What is there afterwards."""
        return self._ask("compare_set", key, expected, desired)  # type: ignore[no-any-return]  # a store's

    def close(self) -> None:
        self._asked.put(None)

    def _ask(self, operation: str, *given: Any) -> Any:
        if self._is_stuck:
            raise TimeoutError("the store did not answer before")
        self._asked.put((operation, given))
        try:
            answer, error = self._answers.get(timeout=self._seconds)
        except queue.Empty:
            self._is_stuck = True
            raise TimeoutError(f"the store did not answer within {self._seconds:.0f} s") from None
        if error is not None:
            raise error
        return answer

    def _serve(self, connect: Callable[[], Any]) -> None:
        store: Any = None
        while (asked := self._asked.get()) is not None:
            try:
                if store is None:
                    store = connect()
                self._answers.put((getattr(store, asked[0])(*asked[1]), None))
            except Exception as error:
                self._answers.put((None, error))
