"""Dropping the old checkpoints of a file with states, so that it takes less disk."""

from __future__ import annotations

import contextlib

from .writer import MappedWriter


def drop_old_checkpoints(path: str) -> tuple[int, ...]:
    """Drop all checkpoints of a file but the last and pinned ones, and return their space to the file system.

    Returns:
        The positions of those that are kept, counted over the chain.

    Raises:
        CacheLockedError: a writer holds the file.
        CacheNotFoundError, FormatError, OSError: it can't be opened, or written.
    """
    with contextlib.closing(MappedWriter.open_locked(path, timeout=0)) as writer:
        with writer.lock:
            writer.check_writable()
            writer.checkpoints.drop_old()
        base = 0 if writer.parent is None else writer.parent.length
        return tuple([base + found.position for found in writer.checkpoints.all()])
