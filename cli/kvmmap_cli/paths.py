"""Which caches a user means: files, globs that the shell left alone, and directories with everything below them; and
the like in an object store, where a URL that ends in a slash, or names a bucket alone, is a directory."""

from __future__ import annotations

import fnmatch
import glob
import os
from collections.abc import Callable, Iterator, Sequence

OnError = Callable[[OSError], None]


def names_one(paths: Sequence[str]) -> bool:
    """True if they name a single cache, and not a directory or a pattern."""
    return len(paths) == 1 and not (_is_folder(paths[0]) or _is_pattern(paths[0]))


def find(paths: Sequence[str], on_error: OnError | None = None) -> list[str]:
    """Return the caches that paths mean, each once: what is named, and below directories what ends like one.

    Args:
        paths: as the user wrote them.
        on_error: called with the error of each directory that can't be read; without it the first one is raised.
    """
    seen: dict[str, str] = {}
    for path in paths:
        for found in _expand(path, on_error):
            seen.setdefault(_spelling(found), found)
    return list(seen.values())


def _spelling(path: str) -> str:
    """Return one spelling for the many of a path: a/./b, a//b, /here/a/b."""
    return path if _is_url(path) else os.path.abspath(path)


def _expand(path: str, on_error: OnError | None) -> Iterator[str]:
    if _is_folder(path):
        yield from walk(path, on_error)
    elif not _is_pattern(path):
        yield path
    elif _is_url(path):
        yield from _matching(path)
    else:
        for match in sorted(glob.glob(path, recursive=True)):
            yield from walk(match, on_error) if _is_folder(match) else [match]


def walk(folder: str, on_error: OnError | None = None) -> Iterator[str]:
    """Yield the caches below a directory, in the order of their names."""
    import kvmmap

    yield from kvmmap.find(folder, on_error=on_error)


def _matching(pattern: str) -> Iterator[str]:
    """Yield the caches of an object store whose URLs a pattern describes; only ** goes past a slash."""
    fixed = pattern[: min(pattern.index(sign) for sign in "*?[" if sign in pattern)]
    for found in walk(fixed[: fixed.rindex("/") + 1]):
        parts, wanted = found.split("/"), pattern.rstrip("/").split("/")
        alike = len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))
        if alike or ("**" in pattern and fnmatch.fnmatchcase(found, pattern.replace("**/", "*"))):
            yield found


def _is_url(path: str) -> bool:
    return "://" in path


def _is_folder(path: str) -> bool:
    """True for a directory that is not itself a cache."""
    if path.rstrip("/").endswith(".zarr"):
        return False
    if _is_url(path):
        named = path.endswith("/") or "/" not in path.partition("://")[2]
        return named and (not glob.has_magic(path) or _has_caches(path))
    return os.path.isdir(path)


def _is_pattern(path: str) -> bool:
    """True if there is nothing of that very name."""
    if not glob.has_magic(path):
        return False
    return not (_is_stored(path) if _is_url(path) else os.path.exists(path))


def _is_stored(url: str) -> bool:
    import kvmmap

    try:
        kvmmap.open(url).close()
    except kvmmap.CacheNotFoundError:
        return False
    except kvmmap.KvmmapError:  # listing, or opening, says what is wrong
        return url.rstrip("/").endswith(".zarr")
    return True


def _has_caches(folder: str) -> bool:
    import kvmmap

    try:
        return bool(kvmmap.find(folder))
    except kvmmap.KvmmapError:
        return False
