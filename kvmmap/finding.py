"""Which caches, and which temporary files of caches, lie below a place, by their names: no cache is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from . import opening as _opening  # noqa: F401  # registers the storages
from .errors import NotACacheError
from .paths import PathLike, is_url, place_text
from .storage.file.placement import remove_dead
from .storage.registry import caches_below, has_cache_name
from .storage.temporary import is_temporary


def find(
    place: PathLike,
    *,
    storage_options: Mapping[str, Any] | None = None,
    on_error: Callable[[OSError], None] | None = None,
) -> list[str]:
    """Return the caches below a folder, or below a prefix of an object store, at any depth, in the order of names.

    What ends in ".kvm" or ".zarr" is taken for one, and not opened; within a group nothing is looked for.

    Args:
        place: path of a folder, or a URL such as "s3://bucket/prompts/" or "s3://bucket".
        storage_options: as in `create`.
        on_error: called with the error of each folder that can't be read, whose path is its `filename`; the others
            are searched. Without it the first such error is raised.

    Raises:
        CacheNotFoundError: there is no such bucket.
        NotACacheError: no such kind of URL.
        AccessDeniedError, StoreError: an object store refuses, or fails; it may not be one that can be listed.
        MissingLibraryError: obstore is needed, and not installed.
        OSError: there is no such folder, or one can't be read.
    """
    path = place_text(place)
    if not is_url(path):
        return list(_walk(path, on_error or _raise))
    return sorted(caches_below(path, storage_options))


def _walk(folder: str, on_error: Callable[[OSError], None]) -> Iterator[str]:
    for here, folders, files in os.walk(folder, onerror=on_error):
        folders.sort()
        groups = [name for name in folders if has_cache_name(name, folder=True)]
        folders[:] = [name for name in folders if name not in groups]
        names = [name for name in files if has_cache_name(name, folder=False)]
        yield from (os.path.join(here, name) for name in sorted([*groups, *names]))


def find_temporary(folder: PathLike) -> list[str]:
    """Return the temporary files of caches and exports below a folder, in the order of names.

    They belong to a process that is making a cache, or that died while making one, or to an interrupted copy that the
    same copy would continue. Folders that can't be read are passed over.

    Args:
        folder: path of a folder on this machine.
    """
    found = []
    for here, folders, files in os.walk(place_text(folder)):
        folders.sort()
        paths = (os.path.join(here, name) for name in sorted(files) if is_temporary(name))
        found += [path for path in paths if os.path.isfile(path) and not os.path.islink(path)]
    return found


def remove_temporary(path: PathLike, *, older_than: float) -> bool:
    """Remove a temporary file unless a process holds it, or it was written to within `older_than` seconds.

    Args:
        path: as `find_temporary` returns it.
        older_than: seconds.

    Returns:
        False if the file stays.

    Raises:
        NotACacheError: the name is not that of a temporary file.
        OSError: it can't be opened or removed.
    """
    text = place_text(path)
    if not is_temporary(os.path.basename(text)):
        raise NotACacheError(f"{text}: not the name of a temporary file of kvmmap", path=text)
    return remove_dead(text, older_than)


def _raise(error: OSError) -> None:
    raise error
