"""Places where objects are stored by key: what a folder, a bucket and memory can all do.

Everything of a Zarr-backed cache that reaches a disk or a server goes through an `Objects`, so that a test can put one
in its place that fails. Nothing is known here of Zarr or of caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from ...errors import KvmmapError

Buffer = Any
"""Anything with the buffer protocol."""

Pieces = Sequence[tuple[int, memoryview]]
"""Where in an object to read, and what to fill from there."""


class MissingObjectError(KvmmapError, FileNotFoundError):
    """There is no such object. Has `path`."""


class ObjectChangedError(KvmmapError):
    """A conditional put found another version of the object than it was to replace. Has `path`."""


class Lock(Protocol):
    """The writer's lock on a place, held."""

    def release(self) -> None: ...

    def abandon(self) -> None:
        """Forget it without releasing it: what a forked child does with its parent's."""


class Objects(Protocol):
    """Objects by key, "a/b/c". Every put is atomic: a reader gets the old object, or the whole new one."""

    @property
    def url(self) -> str:
        """What errors and users call the place."""

    @property
    def remote(self) -> bool:
        """True if a request costs a round trip, so that many should be under way at once."""

    def get(self, key: str) -> Buffer:
        """Return an object. Raises MissingObjectError, as all that read do."""

    def get_tagged(self, key: str) -> tuple[Buffer, str]:
        """Return an object and the tag of its version, for `put_if`."""

    def get_suffix(self, key: str, size: int) -> Buffer:
        """Return an object's last `size` bytes, all of it if it has fewer."""

    def read_into(self, key: str, pieces: Pieces) -> None:
        """Fill buffers from offsets in an object. Raises EOFError if it is too short."""

    def pieces(self, key: str, size: int) -> Iterator[Buffer]:
        """Yield an object in pieces of about so many bytes, or as they arrive; each is to be used before the next."""

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        """Store the parts, one after the other, as an object."""

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        """Store a small object in place of the version `tag`, or where there is none; return the new one's tag.

        Raises:
            ObjectChangedError: another version is there.
        """

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""

    def list(self) -> Iterator[str]:
        """Yield the keys of all objects."""

    def unlink(self) -> bool:
        """If the place is reached by a symbolic link, remove the link, leave the place, and return True."""

    def remove(self) -> None:
        """Remove the place itself, once it is empty."""

    def settle(self) -> None:
        """Make everything put so far survive power loss."""

    def without_sync(self) -> Objects:
        """Return the same place, where `settle` promises nothing against power loss, if that makes a difference."""

    def lock(self, timeout: float, *, break_lock: bool) -> Lock:
        """Take the writer's lock. Raises CacheLockedError."""

    def owner(self) -> dict[str, Any] | None:
        """Return the holder of the writer's lock: "host", "pid", "time"; None if it is free."""
