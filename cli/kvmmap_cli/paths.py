"""Which caches a user means: files, globs that the shell left alone, and directories with everything below them."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence

SUFFIXES = (".kvm", ".zarr")


def is_url(path: str) -> bool:
    """True if it is no local path."""
    return "://" in path


def names_one(paths: Sequence[str]) -> bool:
    """True if they name a single cache, and not a directory or a pattern."""
    return len(paths) == 1 and (is_url(paths[0]) or not (_is_folder(paths[0]) or _is_pattern(paths[0])))


def find(paths: Sequence[str]) -> list[str]:
    """Return the caches that paths mean, each once: what is named, and below directories what ends like one."""
    return list(dict.fromkeys(found for path in paths for found in _expand(path)))


def _expand(path: str) -> Iterator[str]:
    if is_url(path):
        yield path
    elif _is_folder(path):
        yield from walk(path)
    elif _is_pattern(path):
        for match in sorted(glob.glob(path, recursive=True)):
            yield from walk(match) if _is_folder(match) else [match]
    else:
        yield path


def walk(folder: str) -> Iterator[str]:
    """Yield the caches below a directory, in the order of their names."""
    for here, folders, files in os.walk(folder):
        folders.sort()
        inner = [name for name in folders if name.endswith(".zarr")]
        folders[:] = [name for name in folders if not name.endswith(".zarr")]
        # What begins with a dot is a cache that is being made, or was when its maker died.
        names = [name for name in files if name.endswith(".kvm") and not name.startswith(".")]
        yield from (os.path.join(here, name) for name in sorted([*inner, *names]))


def _is_folder(path: str) -> bool:
    """True for a directory that is not itself a cache."""
    return os.path.isdir(path) and not path.rstrip("/").endswith(".zarr")


def _is_pattern(path: str) -> bool:
    return glob.has_magic(path) and not os.path.exists(path)
