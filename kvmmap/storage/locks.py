"""The type of the locks of storages."""

from __future__ import annotations

from typing import Any, Protocol


class Lock(Protocol):
    """A lock that a thread may take again while it holds it: `threading.RLock`."""

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool: ...

    def release(self) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(self, kind: Any, error: Any, trace: Any, /) -> None: ...
