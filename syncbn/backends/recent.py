"""A mapping that forgets its oldest entries, for what is worked out once for calls that are alike."""

import threading
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

V = TypeVar("V")


class Recent(Generic[V]):
    """At most `most` values by key, so that shapes may vary from step to step."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: dict[Hashable, V] = {}
        self._lock = threading.Lock()
        self.get = self._values.get
        """The value of a key, or None."""

    def made(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of key, made if there is none."""
        value = self._values.get(key)
        if value is None:
            value = make()
            self.put(key, value)
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Let value be the key's."""
        with self._lock:
            self._values.pop(key, None)
            while len(self._values) >= self.most:
                self._values.pop(next(iter(self._values)))
            self._values[key] = value

    def clear(self) -> None:
        self._values.clear()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._values

    def __len__(self) -> int:
        return len(self._values)
