"""Caches by path or URL: create, open, remove.

Which storage a path or URL belongs to is asked of the registry; importing this module registers the storages that the
package comes with.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from .cache import QuantizedKvCache
from .errors import FormatError, KvmmapError, NotACacheError, ShapeMismatchError
from .geometry import CacheGeometry
from .metadata import Document, ModelInfo, document
from .paths import PathLike, place_text
from .ranges import index
from .state_spec import CHECKPOINT_SLOTS, StateSpec
from .storage.file import place as _files  # noqa: F401  # registers .kvm files
from .storage.protocols import Durability, Storage, Verify
from .storage.registry import CreateOptions, OpenOptions, Place, place_at
from .storage.zarr import place as _groups  # noqa: F401  # registers Zarr groups


def create(
    path: PathLike,
    *,
    num_layers: int | None = None,
    capacity: int | None = None,
    num_kv_heads: int | Sequence[int] | None = None,
    head_dim: int | Sequence[int] | None = None,
    value_head_dim: int | Sequence[int] | None = None,
    key_codec: str | Sequence[str] | None = None,
    value_codec: str | Sequence[str] | None = None,
    preset: str | None = None,
    recent_window: int | None = None,
    sinks: int | None = None,
    states: Iterable[StateSpec] = (),
    checkpoint_slots: int = CHECKPOINT_SLOTS,
    parent: PathLike | QuantizedKvCache | None = None,
    parent_length: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    model: ModelInfo | None = None,
    durability: Durability = "publish",
    overwrite: bool = False,
    timeout: float = 0,
    metadata_room: int | None = None,
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
        capacity: positions to reserve, those of a parent included; `resize` changes it. A parent's unless given.
        num_kv_heads: key and value heads; one number, or one a layer; 0 for a layer without rows.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        key_codec, value_codec: names of the codecs that keys and values are stored by; one for all, or one a layer; the
            preset's unless given.
        preset: a pair of codecs: "int8" (the default), "fidelity" (rotated int8), "compact" (keys of 8 bits, values of
            4), "small" (5 and 4), "tiny" (4), or "lossless" (bfloat16).
        recent_window: last positions to keep in 16 bits besides, 0 to 65,536: attention of a query goes over these for
            the positions up to this many before it, which is where a codec's loss counts most. The preset's unless
            given: 128 for "fidelity", 256 for "compact" and "tiny", 512 for "small", else 0; and 0 where all codecs
            are f16 or f32, whose rows are as exact.
        sinks: first positions to keep in 16 bits besides, 0 to 65,536; the preset's unless given: 4 for the same ones.
        states: tensors of fixed size that layers overwrite at every position, as recurrent layers do; see
            `write_states`.
        checkpoint_slots: checkpoints of all states to keep; each takes `checkpoint_bytes` of disk once it is written.
        parent: a `.kvm` file in the same folder, or an open cache in one, that the new one continues: it begins with
            the parent's first positions, and stores only what follows. Shapes and codecs are the parent's, and so are
            model and metadata unless given. The parent must stay where it is; it may be appended to, but not truncated
            below `parent_length`. These positions must be committed; a parent that is open for writing is flushed.
        parent_length: positions of the parent; all by default.
        metadata: plain JSON of your own.
        model: what makes the cache, so that nothing else uses it.
        durability: "publish": appends survive the death of this process at once, and power loss from `flush` or
            `close` on. "commit": every append that completes a step survives power loss when the call returns. A
            Zarr group keeps appends in memory until `flush`, `close` or "commit".
        overwrite: replace a cache that is there already.
        timeout: seconds to wait for a writer of the cache that is to be replaced.
        metadata_room: bytes to reserve for model and metadata as JSON, 64 KiB by default; a Zarr group needs none.
        compressor: of a Zarr group: None, or "zstd" for cold storage.
        storage_options: of a URL: what obstore is to know, as `endpoint` or `access_key_id`; the usual environment
            variables and files count anyway (docs/zarr.md).
        break_lock: of an object store: take the lock from a writer that is certainly gone.

    Raises:
        CacheExistsError: there is something at `path`, and `overwrite` was not given or it is no cache.
        CacheNotFoundError: the directory does not exist.
        ShapeMismatchError, DtypeError, MetadataError: as in `QuantizedKvCache`.
        CacheLockedError: a writer holds the cache that is to be replaced.
        AccessDeniedError, StoreError: an object store refuses, or fails.
        MissingLibraryError: a library that Zarr or a URL needs is not installed; says which.
        ParentError: the parent can't be continued: it lies in another folder, or is damaged.
        PositionOutOfRangeError: the parent has not that many committed positions.
        OSError: the file can't be made.
    """
    options = CreateOptions(
        durability=check_durability(durability),
        overwrite=overwrite,
        timeout=timeout,
        metadata_room=None if metadata_room is None else index(metadata_room, "metadata_room"),
        compressor=compressor,
        break_lock=break_lock,
    )
    place = place_of(path, storage_options)
    if parent is not None:
        shape = (
            num_layers,
            num_kv_heads,
            head_dim,
            value_head_dim,
            key_codec,
            value_codec,
            preset,
            recent_window,
            sinks,
        )
        if any(one is not None for one in shape) or tuple(states):
            raise ShapeMismatchError("a cache with a parent has its shapes and codecs: give only capacity, if anything")
        source, length = _parent_file(parent, parent_length)
        notes = None if metadata is None and model is None else document(metadata, model)
        room = None if capacity is None else index(capacity, "capacity")
        return QuantizedKvCache.of_storage(place.create_child(source, length, room, notes, options))
    if parent_length is not None:
        raise ShapeMismatchError("parent_length is given without a parent", actual=parent_length)
    if num_layers is None or capacity is None or num_kv_heads is None or head_dim is None:
        raise ShapeMismatchError("num_layers, capacity, num_kv_heads and head_dim are needed where there is no parent")
    geometry = CacheGeometry.of_preset(
        "int8" if preset is None else preset,
        num_layers=num_layers,
        capacity=capacity,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        key_codec=key_codec,
        value_codec=value_codec,
        recent_window=recent_window,
        sinks=sinks,
        states=states,
        checkpoint_slots=checkpoint_slots,
    )
    return QuantizedKvCache.of_storage(place.create(geometry, document(metadata, model), options))


def _parent_file(parent: PathLike | QuantizedKvCache, length: int | None) -> tuple[str, int | None]:
    """Return the path of a parent, and how many of its positions are wanted."""
    length = None if length is None else index(length, "parent_length")
    if not isinstance(parent, QuantizedKvCache):
        return file_path(parent), length
    if parent.path is None:
        raise FormatError("a cache in memory can't be continued by a file: copy it into one")
    wanted = parent.seq_len if length is None else length
    if parent.writable and parent.storage.committed_len < wanted:
        parent.flush()
    return file_path(parent.path), wanted


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
    options = CreateOptions(compressor=compressor, overwrite=overwrite)
    with place_of(path, storage_options).replace(CacheGeometry.build(**shape), notes, options) as storage:
        yield QuantizedKvCache.of_storage(storage)


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

    A cache with states opens at its last checkpoint. Positions beyond it, of a writer that died or still appends, are
    not shown (`rows_beyond_checkpoint`); mode "a" drops them, with a RuntimeWarning.

    Args:
        path_or_url: the path of a `.kvm` file, or path or URL of a Zarr group: "prompt.zarr", "s3://bucket/prompt.zarr",
            "file:///data/prompt.zarr", "memory://prompt".
        mode: "r" reads, beside any number of others and a writer; "a" appends, and is the only one that does.
        timeout: with "a", seconds to wait for another writer to finish.
        durability: with "a", as in `create`.
        recover: believe only the last sound commit, where published lengths are damaged. A Zarr group has no others.
        verify: when committed rows and token ids are compared with their checksums. "read": each block (256 positions
            of a layer) when it is first read, attended over or viewed through this handle, which then remembers it.
            "open": all of them, here and now, if the machine crashed while a writer had the file open. "none":
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
    options = OpenOptions(
        mode=mode,
        timeout=timeout,
        durability=check_durability(durability),
        recover=recover,
        verify=verify,
        break_lock=break_lock,
        cache_bytes=cache_bytes,
        record_use=record_use,
    )
    storage = place_of(path_or_url, storage_options).open(options)
    if mode == "a" and storage.geometry.states:
        try:
            _resume(storage)
        except BaseException:
            storage.close()
            raise
    return QuantizedKvCache.of_storage(storage)


def _resume(storage: Storage) -> None:
    """Continue from the last checkpoint, and say so if positions are dropped."""
    dropped = storage.resume()
    if dropped:
        kept = storage.seq_len
        warnings.warn(
            f"{storage.path}: the states of its last {dropped} positions were not saved, so it continues from its last "
            f"checkpoint, at position {kept}",
            RuntimeWarning,
            stacklevel=3,
        )


def remove(
    path: PathLike,
    *,
    timeout: float = 0,
    storage_options: Mapping[str, Any] | None = None,
    break_lock: bool = False,
) -> None:
    """Delete a cache, unless a writer holds it. Readers that have a file open go on reading what they see.

    A symbolic link is removed itself; the cache that it names stays.

    Args:
        path: the cache, a file or a Zarr group.
        timeout: seconds to wait for a writer.
        storage_options, break_lock: as in `create`.

    Raises:
        CacheNotFoundError: there is nothing at the path.
        NotACacheError: what is there is no cache; it stays.
        CacheLockedError: a writer holds it; it stays.
    """
    place_of(path, storage_options).remove(timeout=timeout, break_lock=break_lock)


def place_of(path: PathLike, storage_options: Mapping[str, Any] | None = None) -> Place:
    """Return the place that a path or URL means, whatever storage it belongs to.

    Raises:
        NotACacheError: it can't be one.
    """
    return place_at(place_text(path), storage_options)


def file_path(path: PathLike) -> str:
    """Return the path of what must be a `.kvm` file.

    Raises:
        NotACacheError: it is, or would be, something else.
    """
    place = place_of(path)
    if place.file_path is None:
        raise NotACacheError(f"{place.url}: this works on .kvm files alone, and that is a Zarr group", path=place.url)
    return place.file_path


def check_durability(durability: str) -> Durability:
    """Return a durability that there is.

    Raises:
        KvmmapError: there is none of that name.
    """
    if durability == "publish":
        return "publish"
    if durability == "commit":
        return "commit"
    raise KvmmapError(f'durability must be "publish" or "commit", not {durability!r}')
