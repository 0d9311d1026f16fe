"""Making and opening Zarr-backed caches: empty groups, their lock, and what stands in the way of them."""

from __future__ import annotations

from typing import Any

from ...errors import CacheExistsError, FormatError
from ...geometry import CacheGeometry
from ...metadata import Document
from ..objects.lock import LOCK_KEY
from ..objects.protocol import MissingObjectError, ObjectChangedError, Objects
from .handle import read_root
from .layout import COMPRESSORS, ROOT_KEY, SHARD_BLOCKS, Layout
from .root import Root
from .writer import ZarrWriter

OURS = {ROOT_KEY, "layers", "token_ids", "block_checksums", "states"}
"""First parts of the keys of a cache's objects."""


def create_group(
    objects: Objects,
    geometry: CacheGeometry,
    document: Document,
    *,
    compressor: str | None = None,
    overwrite: bool = False,
    timeout: float = 0,
    break_lock: bool = False,
    shard_blocks: int = SHARD_BLOCKS,
    copying: str | None = None,
    **more: Any,
) -> ZarrWriter:
    """Make an empty group, its root last, and hold it for appending.

    Raises:
        CacheExistsError: there is something, and it is not to be replaced or is no cache.
    """
    if compressor not in COMPRESSORS:
        known = ", ".join(repr(name) for name in COMPRESSORS)
        raise FormatError(f"compressor {compressor!r} is unknown; there are: {known}", path=objects.url)
    layout = Layout.plan(geometry, compressor, shard_blocks)
    root = Root.new(layout, document, copying=copying)
    data = root.encode()
    _refuse_what_is_there(objects, overwrite)
    lock = objects.lock(timeout, break_lock=break_lock)
    try:
        _refuse_what_is_there(objects, overwrite)
        if overwrite:
            _clear(objects)
        writer = ZarrWriter(objects, root, "", lock, copying=copying, **more)
    except BaseException:
        lock.release()
        raise
    try:
        writer.describe(layout.arrays_metadata())
        if copying is None:  # else the root says that it is not whole yet, and rows may go out meanwhile
            writer.finish_describing()
            objects.settle()
        try:
            writer.handle.tag = objects.put_if(ROOT_KEY, data, None)
        except ObjectChangedError:
            present, writer.handle.tag = objects.get_tagged(ROOT_KEY)
            if bytes(present) != data:  # else it is ours, and the answer was lost
                raise _exists(objects) from None
        objects.settle()
    except BaseException:
        writer.abandon()
        raise
    return writer


def open_locked(
    objects: Objects, *, timeout: float = 0, break_lock: bool = False, keep_copying: bool = False, **more: Any
) -> ZarrWriter:
    """Open a group for appending, waiting up to `timeout` seconds for another writer to finish.

    Args:
        keep_copying: leave the mark of an unfinished copy in place; anyone else who appends makes it his own.
    """
    read_root(objects)  # first: what is no cache is not locked
    lock = objects.lock(timeout, break_lock=break_lock)
    try:
        root, tag = read_root(objects)
        writer = ZarrWriter(objects, root, tag, lock, copying=root.copying if keep_copying else None, **more)
        if root.copying is not None and not root.seq_len:
            writer.describe(root.layout.arrays_metadata())  # who began may not have come so far
        return writer
    except BaseException:
        lock.release()
        raise


def remove_group(objects: Objects, *, timeout: float = 0, break_lock: bool = False) -> None:
    """Remove a cache, unless a writer holds it. Of a symbolic link to one the link is removed, and not the cache.

    Raises:
        CacheNotFoundError, FormatError: there is none.
        CacheLockedError: a writer holds it.
    """
    read_root(objects)
    lock = objects.lock(timeout, break_lock=break_lock)
    try:
        if not objects.unlink():
            _clear(objects)
            objects.remove()  # while it is locked: who waits for the lock finds out
    finally:
        lock.release()


def _refuse_what_is_there(objects: Objects, overwrite: bool) -> None:
    try:
        objects.get(ROOT_KEY)
    except MissingObjectError:
        # What an interrupted create() has left is no obstacle; other objects are.
        if any(key.partition("/")[0] not in OURS for key in objects.list() if not key.endswith(".tmp")):
            raise CacheExistsError(
                f"{objects.url}: there is something else already, and no cache: choose another place", path=objects.url
            ) from None
        return
    if not overwrite:
        raise _exists(objects)
    try:
        read_root(objects)
    except FormatError as error:
        raise CacheExistsError(f"{error}, so it is not replaced: remove it yourself", path=objects.url) from None


def _exists(objects: Objects) -> CacheExistsError:
    return CacheExistsError(
        f'{objects.url}: exists already; kvmmap.open(path, mode="a") appends to it, create(..., overwrite=True) '
        "replaces it",
        path=objects.url,
    )


def _clear(objects: Objects) -> None:
    """Remove a cache, its root first: there is none from then on, whatever happens."""
    objects.delete(ROOT_KEY)
    objects.settle()
    for key in list(objects.list()):
        if key != LOCK_KEY:
            objects.delete(key)
