"""Object stores for tests: remote ones, and ones that count requests and fail."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

from kvmmap.storage.objects.memory import MemoryObjects
from kvmmap.storage.objects.protocol import Objects

_numbers = itertools.count()


class FarObjects(MemoryObjects):
    """Objects in memory that are treated like a remote store."""

    remote = True


def new_place(*, far: bool = False) -> MemoryObjects:
    """Return a new, empty store in memory."""
    return (FarObjects if far else MemoryObjects)(f"memory://test-{next(_numbers)}")


class CountingObjects:
    """A store whose operations are counted, and may fail: before they are done, or after (a lost response)."""

    OPERATIONS = ("get", "get_tagged", "get_suffix", "read_into", "pieces", "put", "put_if", "delete", "settle")

    def __init__(self, inner: Objects, fails: Callable[[int], bool] = lambda count: False, late: bool = False) -> None:
        self.inner = inner
        self.fails = fails
        self.late = late
        self.count = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.inner, name)
        if name not in self.OPERATIONS:
            return found

        def call(*arguments: Any) -> Any:
            with self._lock:
                self.count += 1
                number = self.count
            failing = self.fails(number)
            if failing and not self.late:
                raise OSError(5, f"operation {number} failed: {name}")
            result = found(*arguments)
            if failing:
                raise OSError(5, f"the answer to operation {number} was lost: {name}")
            return result

        return call

    def lock(self, timeout: float, *, break_lock: bool) -> Any:
        return self.inner.lock(timeout, break_lock=break_lock)
