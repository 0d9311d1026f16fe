"""Every error that kvmmap raises on purpose.

All of them are `KvmmapError`. Each message says what is wrong, where, and what to do; the facts behind it are
attributes, so that a program need not read the message. This module imports nothing of the package.
"""

from __future__ import annotations

from typing import Any


class KvmmapError(Exception):
    """Base of all errors of this package. Attributes that don't apply to an error are None."""

    expected: Any = None
    """What there should have been: a shape, a size, a name."""

    actual: Any = None
    """What there was instead."""

    capacity: int | None = None
    """Positions reserved."""

    position: int | None = None
    """Index of the token position concerned."""

    head: int | None = None
    """Index of the KV head concerned."""

    layer: int | None = None
    """Index of the layer concerned."""

    path: str | None = None
    """The cache's path or URL."""

    def __init__(
        self,
        message: str,
        *,
        expected: Any = None,
        actual: Any = None,
        capacity: int | None = None,
        position: int | None = None,
        head: int | None = None,
        layer: int | None = None,
        path: str | None = None,
    ) -> None:
        super().__init__(message)
        self.expected = expected
        self.actual = actual
        self.capacity = capacity
        self.position = position
        self.head = head
        self.layer = layer
        self.path = path

    def __str__(self) -> str:
        return str(self.args[0])


class CapacityExceededError(KvmmapError):
    """More positions than were reserved; nothing was appended. Has `capacity`, `position`, `expected`, `actual`."""


class ShapeMismatchError(KvmmapError, ValueError):
    """An array's shape is not what the geometry asks for. Has `expected` and `actual`."""


class DtypeError(KvmmapError, TypeError):
    """An array's element type or device is not one that can be stored. Has `expected` and `actual`."""


class PositionOutOfRangeError(KvmmapError, IndexError):
    """A token position that is not stored. Has `position`, `actual` (positions stored); negative ones don't wrap."""


class HeadOutOfRangeError(KvmmapError, IndexError):
    """A KV head that the layer does not have. Has `head` and `expected` (the number of KV heads)."""


class LayerOutOfRangeError(KvmmapError, IndexError):
    """A layer that the cache does not have. Has `layer` and `expected` (the number of layers)."""


class NonFiniteError(KvmmapError, ValueError):
    """A NaN or an infinity in the input; nothing was appended. Has `position`, `head`, and in a cache `layer`."""


class EmptyCacheError(KvmmapError, ValueError):
    """Nothing is stored, so there is nothing to attend over."""


class NoRowsError(KvmmapError, ValueError):
    """A layer that keeps no keys and values. Has `layer`."""


class NoCheckpointError(KvmmapError, LookupError):
    """States that were not written, or a position that has no checkpoint. Has `position`, and `expected`: the
    positions that have one."""


class MetadataError(KvmmapError, ValueError):
    """Metadata that is not plain JSON, or larger than the room reserved for it."""


class UnsupportedModelError(KvmmapError):
    """A model, or a way of running it, that keeps or needs something else than keys and values by position."""


class UnknownTokensError(KvmmapError):
    """Positions that can't be judged, as their token ids aren't known, or that would be lost unasked; nothing has
    changed. Has `position` (the first one), `actual` (positions stored), `path`."""


class ModelMismatchError(KvmmapError):
    """A cache that was made by another model, config or weights. Has `expected` (the cache's facts that differ, by
    name), `actual` (the model's), `path`."""


class CacheExistsError(KvmmapError, FileExistsError):
    """`create` was given a path at which there is something already. Has `path`."""


class CacheNotFoundError(KvmmapError, FileNotFoundError):
    """There is nothing at the path. Has `path`."""


class CacheLockedError(KvmmapError):
    """Another writer holds the cache. Has `path`, and `actual`: the writer's process id where it is known."""


class CacheChangedError(KvmmapError):
    """The cache was truncated or replaced since this handle last looked: `refresh()` it, or open it again."""


class ReadOnlyError(KvmmapError):
    """A write through a handle that was opened for reading."""


class ClosedError(KvmmapError):
    """The cache has been closed."""


class PoisonedError(KvmmapError, OSError):
    """An earlier sync failed, so nothing more can be promised: close and reopen; the last commit is intact."""


class LibraryFullError(KvmmapError, OSError):
    """No room in a library: its budget or the disk is used up, and nothing may be evicted. Has `path`, `actual`."""


class StoreError(KvmmapError, OSError):
    """An object store failed or refused, and trying again did not help. Has `path`: its URL."""


class AccessDeniedError(StoreError, PermissionError):
    """An object store does not accept who is asking, or does not allow it. Has `path`: its URL."""


class MissingLibraryError(KvmmapError, ImportError):
    """A library that only some caches need is not installed; the message says what to install."""


class FormatError(KvmmapError):
    """A file that can't be used as a cache. Has `path`."""


class NotACacheError(FormatError):
    """The file is not a kvmmap cache at all."""


class VersionMismatchError(FormatError):
    """The file needs a newer kvmmap: its format version, a codec or a transform is unknown here."""


class CorruptCacheError(FormatError):
    """The file is a cache, and damaged. Has `layer` and `position` where the damage is in the data."""


class ParentError(CorruptCacheError):
    """The file that a cache continues is missing, is another one, or no longer holds what the cache needs of it.
    `path` (the cache's) and `actual` (the parent's path)."""
