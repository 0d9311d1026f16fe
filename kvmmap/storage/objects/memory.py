"""Objects in this process's memory, shared by all who open the same `memory://` URL."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from .lock import ObjectLock, read_owner
from .protocol import Buffer, Lock, MissingObjectError, ObjectChangedError, Pieces


class MemoryObjects:
    """Objects in this process's memory.

    Args:
        url: what names the place.
    """

    remote = False
    _places: ClassVar[dict[str, dict[str, tuple[bytes, int]]]] = {}
    _lock = threading.Lock()
    _versions = 0

    def __init__(self, url: str) -> None:
        self.url = url
        with self._lock:
            self._objects = self._places.setdefault(url, {})

    @classmethod
    def places(cls) -> list[str]:
        """Return the URLs of all places that hold an object."""
        with cls._lock:
            return [url for url, objects in cls._places.items() if objects]

    def get(self, key: str) -> Buffer:
        return self._find(key)[0]

    def get_tagged(self, key: str) -> tuple[Buffer, str]:
        data, version = self._find(key)
        return data, str(version)

    def _find(self, key: str) -> tuple[bytes, int]:
        try:
            return self._objects[key]
        except KeyError:
            raise MissingObjectError(f"{self.url}/{key}: there is no such object", path=self.url) from None

    def get_suffix(self, key: str, size: int) -> Buffer:
        return self.get(key)[-size:]

    def read_into(self, key: str, pieces: Pieces) -> None:
        data = memoryview(self.get(key))
        for offset, target in pieces:
            if offset + len(target) > len(data):
                raise EOFError(f"{self.url}/{key}: ends at {len(data)}")
            target[:] = data[offset : offset + len(target)]

    def pieces(self, key: str, size: int) -> Iterator[Buffer]:
        data = memoryview(self.get(key))
        for start in range(0, len(data), size):
            yield data[start : start + size]

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        with self._lock:
            self._store(key, b"".join(memoryview(part).cast("B") for part in parts))

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        with self._lock:
            present = self._objects.get(key)
            if (None if present is None else str(present[1])) != tag:
                raise ObjectChangedError(f"{self.url}/{key}: was changed by another", path=self.url)
            return self._store(key, data)

    def _store(self, key: str, data: bytes) -> str:
        MemoryObjects._versions += 1
        self._objects[key] = data, self._versions
        return str(self._versions)

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(key, None)

    def list(self) -> Iterator[str]:
        yield from tuple(self._objects)

    def list_after(self, folder: str, after: str) -> Iterator[tuple[str, int, float]]:
        """As `BucketObjects.list_after`; times are not kept, and 0."""
        for key in sorted(self._objects):
            if key.startswith(f"{folder}/") and key > after:
                yield key, len(self._objects[key][0]), 0.0

    def unlink(self) -> bool:
        return False

    def remove(self) -> None:
        """There is nothing but the objects."""

    def settle(self) -> None:
        """Memory does not survive the process."""

    def without_sync(self) -> MemoryObjects:
        return self

    def lock(self, timeout: float, *, break_lock: bool) -> Lock:
        return ObjectLock.take(self, timeout, break_lock=break_lock)

    def owner(self) -> dict[str, Any] | None:
        return read_owner(self)
