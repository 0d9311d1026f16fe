"""The file of an export: written under a temporary name, and put in its place when it is whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from ..errors import CacheExistsError, CacheNotFoundError
from ..storage.posix import PosixFile


def resolved(path: str, *, overwrite: bool) -> str:
    """Return where an export to `path` belongs: what a link names is replaced, and not the link.

    Raises:
        CacheExistsError: there is a file and `overwrite` is False, or a folder.
    """
    path = os.path.abspath(path)
    if os.path.isdir(path) or (os.path.lexists(path) and not overwrite):
        raise CacheExistsError(f"{path}: exists already; overwrite=True replaces a file", path=path)
    return os.path.realpath(path)


@contextlib.contextmanager
def new_file(path: str, *, overwrite: bool) -> Iterator[PosixFile]:
    """Yield a file to be filled in the block, which stands durably at `path` when the block ends; else nothing is left
    of it.

    Raises:
        CacheNotFoundError: there is no such directory.
        CacheExistsError: a file has come to stand there meanwhile, and `overwrite` is False.
    """
    try:
        file = PosixFile.create_beside(path)
    except FileNotFoundError:
        raise CacheNotFoundError(f"{os.path.dirname(path)}: there is no such directory", path=path) from None
    try:
        yield file
        file.sync()
        file.replace(path) if overwrite else file.link_to(path)
    except BaseException as error:
        file.discard()
        if isinstance(error, FileExistsError):
            raise CacheExistsError(f"{path}: exists already; overwrite=True replaces it", path=path) from None
        raise
    file.close()
