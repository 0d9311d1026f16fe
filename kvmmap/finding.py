"""Which caches lie below a place, by their names: nothing is opened."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from .opening import PathLike


def find(place: PathLike, *, storage_options: Mapping[str, Any] | None = None) -> list[str]:
    """Return the caches below a folder, or below a prefix of an object store, at any depth, in the order of names.

    What ends in ".kvm" or ".zarr" is taken for one, and not opened; within a group nothing is looked for.

    Args:
        place: path of a folder, or a URL such as "s3://bucket/prompts/" or "s3://bucket".
        storage_options: as in `create`.

    Raises:
        CacheNotFoundError: there is no such bucket.
        NotACacheError: no such kind of URL.
        AccessDeniedError, StoreError: an object store refuses, or fails; it may not be one that can be listed.
        MissingLibraryError: obstore is needed, and not installed.
    """
    path = os.fspath(place).removeprefix("file://")
    if "://" not in path:
        return list(_walk(path))
    from .storage.objects.remote import groups_below

    return sorted(groups_below(path, storage_options))


def _walk(folder: str) -> Iterator[str]:
    for here, folders, files in os.walk(folder):
        folders.sort()
        groups = [name for name in folders if name.endswith(".zarr")]
        folders[:] = [name for name in folders if not name.endswith(".zarr")]
        # What begins with a dot is a cache that is being made, or was when its maker died.
        names = [name for name in files if name.endswith(".kvm") and not name.startswith(".")]
        yield from (os.path.join(here, name) for name in sorted([*groups, *names]))
