"""Caches by path or URL: create, open, resize, compact, fork, repair, remove.

Which storage a path means is decided here and known nowhere else.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

from .cache import QuantizedKvCache
from .errors import FormatError, KvmmapError, NotACacheError
from .geometry import CacheGeometry, index
from .metadata import Document, ModelInfo, document
from .paths import PathLike, is_url, place_text
from .storage.file.placement import METADATA_ROOM, place_file, place_of, remove_file
from .storage.file.reader import MappedReader
from .storage.file.resize import resize_file
from .storage.file.writer import Durability, MappedWriter
from .storage.objects.protocol import Objects
from .storage.protocols import Progress, Storage, Verify
from .storage.temporary import partial_path

if TYPE_CHECKING:
    from .storage.file.repair import RepairReport


def create(
    path: PathLike,
    *,
    num_layers: int,
    capacity: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    value_head_dim: int | Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
    model: ModelInfo | None = None,
    durability: Durability = "publish",
    overwrite: bool = False,
    timeout: float = 0,
    metadata_room: int = METADATA_ROOM,
    compressor: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    break_lock: bool = False,
) -> QuantizedKvCache:
    """Make a new cache and open it for appending.

    Args:
        path: where. A path makes a `.kvm` file, unless it ends with ".zarr": then a Zarr group in a directory, as
            URLs such as "s3://bucket/prompt.zarr" do in an object store. The directory around it must exist. A file
            appears whole, has mode 0600, and is sparse: reserving costs no disk.
        num_layers: transformer layers.
        capacity: positions to reserve; `resize` changes it.
        num_kv_heads: key and value heads; one number, or one a layer.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        metadata: plain JSON of your own.
        model: what makes the cache, so that nothing else uses it.
        durability: "publish": appends survive the death of this process at once, and power loss from `flush` or
            `close` on. "commit": every append that completes a step survives power loss when the call returns. A
            Zarr group keeps appends in memory until `flush`, `close` or "commit".
        overwrite: replace a cache that is there already.
        timeout: seconds to wait for a writer of the cache that is to be replaced.
        metadata_room: bytes to reserve for model and metadata as JSON; a Zarr group needs none.
        compressor: of a Zarr group: None, or "zstd" for cold storage.
        storage_options: of a URL: what obstore is to know, as `endpoint` or `access_key_id`; the usual environment
            variables and files count anyway (docs/zarr.md).
        break_lock: of an object store: take the lock from a writer that is certainly gone.

    Raises:
        CacheExistsError: there is something at `path`, and `overwrite` was not given or it is no cache.
        CacheNotFoundError: the directory does not exist.
        ShapeMismatchError, MetadataError: as in `QuantizedKvCache`.
        CacheLockedError: a writer holds the cache that is to be replaced.
        AccessDeniedError, StoreError: an object store refuses, or fails.
        MissingLibraryError: a library that Zarr or a URL needs is not installed; says which.
        OSError: the file can't be made.
    """
    geometry = CacheGeometry.build(
        num_layers=num_layers,
        capacity=capacity,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
    )
    storage: Storage
    notes, durability = document(metadata, model), _check_durability(durability)
    if group := group_at(path, storage_options):
        from .storage.zarr.placement import create_group

        storage = create_group(
            group,
            geometry,
            notes,
            durability=durability,
            overwrite=overwrite,
            timeout=timeout,
            compressor=compressor,
            break_lock=break_lock,
        )
    else:
        if compressor is not None:
            raise not_compressed(path)
        storage = MappedWriter.create(
            local_path(path),
            geometry,
            notes,
            durability=durability,
            overwrite=overwrite,
            timeout=timeout,
            metadata_room=metadata_room,
        )
    return QuantizedKvCache.of_storage(storage)


@contextlib.contextmanager
def making(
    path: PathLike,
    shape: Mapping[str, Any],
    notes: Document,
    *,
    compressor: str | None = None,
    overwrite: bool = False,
    storage_options: Mapping[str, Any] | None = None,
) -> Iterator[QuantizedKvCache]:
    """Give a new cache to fill, and put it in its place when the block ends well; else nothing is left of it.

    Args:
        shape: what `CacheGeometry.build` takes.

    Raises:
        As `create`.
    """
    if group := group_at(path, storage_options):
        from .storage.zarr.placement import create_group, remove_group

        writer = create_group(
            group, CacheGeometry.build(**shape), notes, compressor=compressor, overwrite=overwrite, copying="new"
        )
        try:
            yield QuantizedKvCache.of_storage(writer)
            writer.copying = None
            writer.close()
        except BaseException:
            writer.abandon()
            remove_group(group)
            raise
        return
    if compressor is not None:
        raise not_compressed(path)
    place = place_of(local_path(path), overwrite=overwrite)
    partial = partial_path(place)
    room = max(METADATA_ROOM, len(notes.encode()))
    storage = MappedWriter.create(partial, CacheGeometry.build(**shape), notes, metadata_room=room)
    try:
        with contextlib.closing(storage):
            yield QuantizedKvCache.of_storage(storage)
        place_file(partial, place, overwrite=overwrite)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def open_cache(
    path_or_url: PathLike,
    mode: Literal["r", "a"] = "r",
    *,
    timeout: float = 0,
    durability: Durability = "publish",
    recover: bool = False,
    verify: Verify = "read",
    storage_options: Mapping[str, Any] | None = None,
    break_lock: bool = False,
    cache_bytes: int | None = None,
    record_use: bool = True,
) -> QuantizedKvCache:
    """Open a cache, in constant time.

    Args:
        path_or_url: the path of a `.kvm` file, or path or URL of a Zarr group: "prompt.zarr", "s3://bucket/prompt.zarr",
            "file:///data/prompt.zarr", "memory://prompt".
        mode: "r" reads, beside any number of others and a writer; "a" appends, and is the only one that does.
        timeout: with "a", seconds to wait for another writer to finish.
        durability: with "a", as in `create`.
        recover: believe only the last sound commit, where published lengths are damaged. A Zarr group has no others.
        verify: when committed rows and token ids are compared with their checksums. "read": each block (256 positions
            of a layer) when it is first read, attended over or viewed through this handle, which then remembers it.
            "open": all of them, here and now, if the machine went down while a writer had the file open. "none":
            only when `verify()` is called. Rows that no commit covers yet have no checksum. A Zarr group compares all
            that it fetches, whatever is asked for.
        storage_options, break_lock: as in `create`.
        cache_bytes: of a Zarr group: fetched rows to keep in memory; 256 MiB by default.
        record_use: reading or appending through this handle is a use of the cache: it sets the file's access time, by
            which `kvmmap gc` decides what goes. False only looks, as `kvmmap inspect` and `kvmmap verify` do. A Zarr
            group keeps no such time.

    Raises:
        CacheNotFoundError: there is nothing at the path, or no such bucket.
        NotACacheError, VersionMismatchError, CorruptCacheError: what is there can't be used. With verify="read",
            whatever reads may raise CorruptCacheError later on.
        CacheLockedError: another writer holds it.
        AccessDeniedError, StoreError, MissingLibraryError: as in `create`.
        OSError: it can't be read, or with "a" written.
    """
    if mode not in ("r", "a"):
        raise KvmmapError(f'mode must be "r" (read) or "a" (append), not {mode!r}')
    if verify not in get_args(Verify):
        raise KvmmapError(f'verify must be "read", "open" or "none", not {verify!r}')
    storage: Storage
    if group := group_at(path_or_url, storage_options):
        from .storage.zarr.placement import open_locked
        from .storage.zarr.reader import CACHE_BYTES, ZarrReader

        room = CACHE_BYTES if cache_bytes is None else index(cache_bytes, "cache_bytes")
        if mode == "r":
            return QuantizedKvCache.of_storage(ZarrReader.open(group, cache_bytes=room))
        storage = open_locked(
            group,
            timeout=timeout,
            break_lock=break_lock,
            durability=_check_durability(durability),
            cache_bytes=room,
        )
        return QuantizedKvCache.of_storage(storage)
    path = local_path(path_or_url)
    if mode == "r":
        storage = MappedReader.open(path, recover=recover, verify=verify, record_use=record_use)
    else:
        storage = MappedWriter.open_locked(
            path,
            timeout=timeout,
            durability=_check_durability(durability),
            recover=recover,
            verify=verify,
            record_use=record_use,
        )
    return QuantizedKvCache.of_storage(storage)


def resize(path: PathLike, capacity: int, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Give a cache file another capacity: a new file is built beside it, checked, and takes its place.

    Readers of the old file go on reading it until they `refresh`, which tells them.

    Args:
        path: the cache; nobody may have it open for writing.
        capacity: positions to reserve.
        timeout: seconds to wait for a writer.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CapacityExceededError: more positions are stored.
        CorruptCacheError: a block does not match its checksum; nothing was changed.
        CacheLockedError, OSError, FormatError: as in `open`; nothing was changed.
    """
    resize_file(local_path(path), index(capacity, "capacity"), timeout=timeout, progress=progress)


def compact(path: PathLike, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Drop the capacity that is not used: `resize` to the positions stored."""
    resize_file(local_path(path), None, timeout=timeout, progress=progress)


def fork(
    source: PathLike,
    target: PathLike,
    *,
    length: int | None = None,
    capacity: int | None = None,
    durability: Durability = "publish",
    progress: Progress | None = None,
) -> QuantizedKvCache:
    """Make a private continuation of a shared prefix: a new cache file that begins with another's positions.

    The source is only read, and may have a writer meanwhile. On btrfs, XFS and the like the rows are shared on the
    disk, so a fork costs nearly nothing; elsewhere they are copied. Rows, token ids, model and metadata come along,
    and so do checksums: what is damaged in the source is damaged in the fork, and not hidden.

    Args:
        source: the cache to begin with.
        target: where to make the new one; there must be nothing.
        length: keep so many positions of the source; all that are stored by default.
        capacity: positions to reserve; the source's by default.
        durability: as in `create`.
        progress: called with (bytes done, bytes in all) now and then.

    Returns:
        The new cache, open for appending; what it holds is committed.

    Raises:
        CacheExistsError: there is something at `target`.
        CacheNotFoundError: there is nothing at `source`, or no directory for `target`.
        PositionOutOfRangeError: fewer than `length` positions are stored.
        CapacityExceededError: `capacity` is less than `length`.
        CorruptCacheError: the block that is cut does not match its checksum; nothing was made.
        CacheChangedError: the source's writer took positions back meanwhile; nothing was made.
        OSError: the disk is full or failing; nothing was made.
    """
    from .storage.file.clone import fork_file

    storage = fork_file(
        local_path(source),
        local_path(target),
        length=length,
        capacity=None if capacity is None else index(capacity, "capacity"),
        durability=_check_durability(durability),
        progress=progress,
    )
    return QuantizedKvCache.of_storage(storage)


def repair(
    path: PathLike,
    new_path: PathLike,
    *,
    zero: Collection[tuple[int | None, int]] = (),
    progress: Progress | None = None,
) -> RepairReport:
    """Save what is sound of a damaged cache file into a new one. The damaged one is only read.

    Positions are kept from 0 up to the first block (256 positions) that does not match its checksum in some layer: with
    a hole in the middle, later positions would move, or mean something else. Published positions that no commit covers
    come along if all before them does, as far as they would be shown. Token ids are kept up to the first block of
    them that does not hold. Records that lead to the rows may be damaged, also several of them; of a file whose
    superblock is damaged nothing can be saved.

    Args:
        path: the damaged file; no writer may have it open.
        new_path: where to put what is saved; there must be nothing.
        zero: (layer, block) that are to be zeros if they are damaged, so that what is behind them is not lost;
            (None, block) for token ids, which become -1. Attention gives rows of zeros a weight like any others, so
            leave them out with `positions`. Their token ids become -1, and the metadata's "kvmmap.repair" lists them.
        progress: called with (positions done, positions in all) now and then.

    Returns:
        What was kept, and what was found.

    Raises:
        CorruptCacheError: nothing can be saved; nothing was made.
        NotACacheError, VersionMismatchError: `path` is no cache file that this package reads.
        CacheExistsError: there is something at `new_path`.
        CacheLockedError: a writer has the damaged file open.
        OSError: the disk is full or failing; nothing was made.
    """
    from .storage.file.repair import repair_file

    return repair_file(local_path(path), local_path(new_path), zero=zero, progress=progress)


def remove(
    path: PathLike,
    *,
    timeout: float = 0,
    storage_options: Mapping[str, Any] | None = None,
    break_lock: bool = False,
) -> None:
    """Delete a cache, unless a writer holds it. Readers that have a file open go on reading what they see.

    Args:
        path: the cache, a file or a Zarr group.
        timeout: seconds to wait for a writer.
        storage_options, break_lock: as in `create`.

    Raises:
        CacheNotFoundError: there is nothing at the path.
        NotACacheError: what is there is no cache; it stays.
        CacheLockedError: a writer holds it; it stays.
    """
    if group := group_at(path, storage_options):
        from .storage.zarr.placement import remove_group

        remove_group(group, timeout=timeout, break_lock=break_lock)
        return
    remove_file(local_path(path), timeout)


def group_at(
    path: PathLike, storage_options: Mapping[str, Any] | None = None, *, durable: bool = True
) -> Objects | None:
    """Return the place of a Zarr group if that is what a path or URL means, None if it means a file."""
    text = place_text(path)
    if is_url(text):
        if text.rstrip("/").endswith(".kvm"):
            raise NotACacheError(
                f"{text}: a .kvm file is mapped, and so must be local; in object stores caches are .zarr groups "
                "(kvmmap.copy() makes one of a file, kvmmap.fetch() the other way round)",
                path=text,
            )
        from .storage.objects.remote import objects_at

        return objects_at(text, storage_options)
    if os.path.isfile(os.path.join(text, "zarr.json")) or (
        text.rstrip("/").endswith(".zarr") and not os.path.isfile(text)
    ):
        from .storage.objects.local import FolderObjects

        return FolderObjects(text, durable=durable)
    return None


def local_path(path: PathLike) -> str:
    """Return the path of what must be a `.kvm` file."""
    text = place_text(path)
    if group_at(text) is not None:
        raise NotACacheError(f"{text}: this works on .kvm files alone, and that is a Zarr group", path=text)
    return text


def not_compressed(path: PathLike) -> FormatError:
    text = place_text(path)
    return FormatError(f"{text}: a .kvm file is mapped, and so can't be compressed; a .zarr group can", path=text)


def _check_durability(durability: str) -> Durability:
    if durability == "publish":
        return "publish"
    if durability == "commit":
        return "commit"
    raise KvmmapError(f'durability must be "publish" or "commit", not {durability!r}')
