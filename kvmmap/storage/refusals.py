"""Errors that every storage raises alike."""

from __future__ import annotations

from typing import NoReturn

from ..errors import CacheChangedError, ClosedError, KvmmapError


def closed_error(path: str | None) -> ClosedError:
    """Return the error for a use after `close`."""
    return ClosedError("the cache is closed" if path is None else f"{path}: the cache is closed", path=path)


def refuse_truncated(path: str | None) -> NoReturn:
    """Raise for rows that were truncated while they were being read."""
    where = "" if path is None else f"{path}: "
    raise CacheChangedError(f"{where}positions were truncated during the read: read again", path=path)


def not_pickled(path: str | None) -> KvmmapError:
    """Return the error for pickling or copying a cache or a layer: its map and its lock belong to this process."""
    what = "a cache can't be pickled or copied, since its memory and its lock belong to this process"
    if path is None:
        return KvmmapError(f"{what}: keep it in a file, and kvmmap.open(path) it in the worker")
    return KvmmapError(f"{path}: {what}: send the path, and kvmmap.open(path) it in the worker", path=path)
