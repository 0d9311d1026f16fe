"""Forks of a writer's process: the child closes the descriptor that it inherits, and the lock with it.

So the lock ends with the process that took it. Writes by the child raise.
"""

from __future__ import annotations

import os
import weakref
from typing import NoReturn

from ..errors import CacheLockedError
from .posix import PosixFile

_files: weakref.WeakSet[PosixFile] | None = None


def close_in_children(file: PosixFile) -> None:
    """Close a file in every process that is forked from this one."""
    global _files
    if _files is None:
        _files = weakref.WeakSet()
        os.register_at_fork(after_in_child=_close)
    _files.add(file)


def _close() -> None:
    for file in _files or ():
        file.close()


def refuse_forked(path: str, pid: int) -> NoReturn:
    """Raise for a write by another process than `pid`, which opened the cache."""
    raise CacheLockedError(
        f"{path}: process {pid} holds it for writing, and this one was forked from it; open it here once that one has "
        "closed it",
        path=path,
        actual=pid,
    )
