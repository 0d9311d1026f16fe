"""A whole cache: create, open, push_step, commit, close. The only module that puts the others together.

A cache is a storage, its layers, and what they have in common: the length, token ids, metadata. Which storage it is
is decided in `create` and `open_cache` and known nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from .errors import (
    DtypeError,
    KvmmapError,
    LayerOutOfRangeError,
    NotACacheError,
    PositionOutOfRangeError,
    ShapeMismatchError,
)
from .format import NO_TOKEN
from .geometry import CacheGeometry, check_range, check_room, compression_ratio, index
from .layer import QuantizedKvLayer
from .metadata import Document, ModelInfo
from .quantize import as_rows
from .storage.base import Progress, Storage, VerifyReport, seq_len
from .storage.mapped import MappedReader
from .storage.memory import MemoryStorage
from .storage.resize import resize_file
from .storage.writer import METADATA_ROOM, Durability, MappedWriter

PathLike = str | os.PathLike[str]


class Layers(Sequence[QuantizedKvLayer]):
    """A cache's layers, by index from 0; negative ones don't wrap."""

    def __init__(self, storage: Storage) -> None:
        self._layers = [QuantizedKvLayer.of_store(storage, store) for store in storage.layers]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[QuantizedKvLayer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, index: int) -> QuantizedKvLayer: ...
    @overload
    def __getitem__(self, index: slice) -> list[QuantizedKvLayer]: ...
    def __getitem__(self, index: int | slice) -> QuantizedKvLayer | list[QuantizedKvLayer]:
        if isinstance(index, slice):
            return self._layers[index]
        return self._layers[self.check(index)]

    def check(self, layer: int) -> int:
        """Return `layer` if there is such a one."""
        layer = index(layer, "layer")
        if not 0 <= layer < len(self._layers):
            raise LayerOutOfRangeError(
                f"layer {layer} does not exist: there are {len(self._layers)}, counted from 0, and negative ones do not "
                "wrap",
                layer=layer,
                expected=len(self._layers),
            )
        return layer


class QuantizedKvCache:
    """The keys and values of all layers, in memory; `kvmmap.create` and `kvmmap.open` give the same over a file.

    Args:
        num_layers: transformer layers.
        capacity: positions to reserve.
        num_kv_heads: key and value heads; one number, or one a layer.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        metadata: plain JSON of your own.
        model: what made the cache.

    It is a context manager that closes. One thread at a time appends; others may read meanwhile.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
        MetadataError: metadata that is not JSON.
    """

    def __init__(
        self,
        num_layers: int,
        capacity: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        value_head_dim: int | Sequence[int] | None = None,
        *,
        metadata: Mapping[str, Any] | None = None,
        model: ModelInfo | None = None,
    ) -> None:
        geometry = CacheGeometry.build(
            num_layers=num_layers,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
        )
        document = _document(metadata, model)
        document.encode()
        self._attach(MemoryStorage(geometry, document))

    @classmethod
    def of_storage(cls, storage: Storage) -> QuantizedKvCache:
        """Make the cache of a storage that is open already."""
        cache = cls.__new__(cls)
        cache._attach(storage)
        return cache

    def _attach(self, storage: Storage) -> None:
        self._storage = storage
        self._layers = Layers(storage)

    # Dimensions

    @property
    def layers(self) -> Layers:
        """The layers, by index from 0."""
        return self._layers

    @property
    def geometry(self) -> CacheGeometry:
        """The shape of everything."""
        return self._storage.geometry

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return len(self._layers)

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer, as of the last `refresh` where another process writes."""
        return seq_len(self._storage)

    def __len__(self) -> int:
        """`seq_len`."""
        return self.seq_len

    @property
    def capacity(self) -> int:
        """Positions reserved."""
        return self._storage.geometry.capacity

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes and scales over the whole capacity, all layers."""
        return self._storage.geometry.memory_bytes

    @property
    def fp32_memory_bytes(self) -> int:
        """Bytes that the same capacity takes as f32."""
        return self._storage.geometry.fp32_memory_bytes

    @property
    def compression_ratio(self) -> float:
        """`fp32_memory_bytes` over `memory_bytes`; 1.0 at capacity 0."""
        return compression_ratio(self.fp32_memory_bytes, self.memory_bytes)

    @property
    def path(self) -> str | None:
        """Absolute path of its file; None in memory."""
        return self._storage.path

    @property
    def writable(self) -> bool:
        """True if this handle may append."""
        return self._storage.writable

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._storage.closed

    def __repr__(self) -> str:
        where = "in memory" if self.path is None else repr(self.path)
        if self.closed:
            return f"<QuantizedKvCache {where}, closed>"
        return f"<QuantizedKvCache {where}: {self.num_layers} layers, {self.seq_len}/{self.capacity} positions>"

    # What it says of itself

    @property
    def metadata(self) -> dict[str, Any]:
        """A copy of your own notes; assign to replace them (saved with the next commit).

        Raises (on assignment):
            MetadataError: not plain JSON, or more than there is room for; the old notes stay.
        """
        self._storage.check()
        return _deep_copy(self._storage.document.metadata)

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any]) -> None:
        self._storage.set_document(_document(metadata, self._storage.document.model))

    @property
    def model(self) -> ModelInfo | None:
        """What made the cache, if that was recorded; assign to replace it (saved with the next commit)."""
        self._storage.check()
        return self._storage.document.model

    @model.setter
    def model(self, model: ModelInfo | None) -> None:
        self._storage.set_document(_document(self._storage.document.metadata, model))

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len], a copy; -1 where none was given."""
        self._storage.check()
        length = self.seq_len
        ids = np.full(length, NO_TOKEN, np.int32)
        recorded = min(self._storage.token_len, length)
        ids[:recorded] = self._storage.read_tokens(recorded)
        self._storage.check()
        return ids

    @property
    def token_len(self) -> int:
        """Positions, from 0, whose token ids are recorded (as -1, where they were skipped); at most `seq_len`."""
        return min(self._storage.token_len, self.seq_len)

    # Appending

    def push_step(self, keys: Any, values: Any, token_id: int | None = None) -> None:
        """Append one position to every layer: all or nothing.

        Args:
            keys: [num_layers, num_kv_heads, head_dim]; f32, f16 or bf16; numpy, torch or DLPack on the CPU. Where
                layers differ in shape: a sequence of one array a layer.
            values: [num_layers, num_kv_heads, value_head_dim], likewise.
            token_id: the position's token, if you want it kept.

        Raises:
            ShapeMismatchError: wrong shapes, or layers that were pushed to on their own and are not level.
            DtypeError, NonFiniteError, CapacityExceededError, ReadOnlyError, ClosedError, OSError: as in `extend`.
        """
        self._append(_one_step(keys), _one_step(values), None if token_id is None else [token_id])

    def extend(self, keys: Any, values: Any, token_ids: Any = None) -> None:
        """Append many positions to every layer: all or nothing.

        Args:
            keys: [num_layers, n, num_kv_heads, head_dim]; f32, f16 or bf16; any strides; numpy, torch or DLPack on the
                CPU. Where layers differ in shape: a sequence of one array a layer.
            values: [num_layers, n, num_kv_heads, value_head_dim], likewise.
            token_ids: n whole numbers from 0 to 2**31 - 1, or None.

        Raises:
            ShapeMismatchError: wrong shapes, or layers that were pushed to on their own and are not level.
            DtypeError: something else than f32, f16 or bf16, or not on the CPU.
            NonFiniteError: a NaN or an infinity; names layer, position and head.
            CapacityExceededError: more than fits.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
            OSError: the disk is full or failing.
        """
        self._append(_per_layer(keys), _per_layer(values), token_ids)

    def _append(self, keys: Sequence[Any], values: Sequence[Any], token_ids: Any) -> None:
        for name, arrays in (("keys", keys), ("values", values)):
            if len(arrays) != self.num_layers:
                raise ShapeMismatchError(
                    f"{name} hold {len(arrays)} layers, and the cache has {self.num_layers}",
                    expected=self.num_layers,
                    actual=len(arrays),
                )
        pairs = [layer.check_input(key, value) for layer, key, value in zip(self._layers, keys, values, strict=True)]
        count = len(pairs[0][0])
        for number, pair in enumerate(pairs):
            if len(pair[0]) != count:
                raise ShapeMismatchError(
                    f"layer {number} has {len(pair[0])} positions and layer 0 has {count}: give as many to each",
                    expected=count,
                    actual=len(pair[0]),
                    layer=number,
                )
        ids = None if token_ids is None else _check_token_ids(token_ids, count)
        storage = self._storage
        with storage.lock:
            start = self._check_level(count)
            for layer, pair in zip(self._layers, pairs, strict=True):
                layer.write_rows(start, *pair)
            if ids is not None:
                self._record_tokens(start, ids)
            for store in storage.layers:
                store.publish(start + count)
            storage.appended()

    def _check_level(self, count: int) -> int:
        """Return the position that the next step gets in every layer."""
        starts = [store.begin(count) for store in self._storage.layers]
        if min(starts) != max(starts):
            raise ShapeMismatchError(
                f"layers are not level: they hold {min(starts)} to {max(starts)} positions; push to the others, or "
                f"truncate({min(starts)})",
                expected=max(starts),
                actual=min(starts),
                layer=starts.index(min(starts)),
            )
        return starts[0]

    def push_token_ids(self, token_ids: Any) -> None:
        """Record the ids of the next positions that have none: for who appends to layers one by one.

        Args:
            token_ids: n whole numbers from 0 to 2**31 - 1, for positions from `token_len` on. They may run ahead of
                the layers, and count for positions once these are complete.

        Raises:
            DtypeError, ShapeMismatchError: not such numbers.
            CapacityExceededError: more than fit.
        """
        ids = _check_token_ids(token_ids, None)
        with self._storage.lock:
            self._storage.layers[0].begin(0)
            start = self._storage.token_len
            check_room(start, len(ids), self.capacity)
            self._record_tokens(start, ids)

    def _record_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        storage = self._storage
        first = min(storage.token_len, start)
        if storage.token_len < start:
            ids = np.concatenate([np.full(start - first, NO_TOKEN, np.int32), ids])
        storage.write_tokens(first, ids)
        storage.publish_tokens(first + len(ids))

    # Life

    def flush(self) -> None:
        """Make all positions that are complete in every layer survive power loss. Nothing to do in memory.

        Raises:
            OSError: the disk is full or failing. After a failed sync the handle is poisoned: close and reopen.
            CorruptCacheError: the incomplete block that would be signed does not match its last checksum.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
        """
        self._storage.commit()

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; what was committed beyond them is durably gone on return.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            OSError, ReadOnlyError, ClosedError, CacheLockedError, PoisonedError, CorruptCacheError: as in `flush`.
        """
        self._storage.layers[0].begin(0)
        most = max(store.length for store in self._storage.layers)
        _, length = check_range(0, length, most)
        self._storage.truncate(length)

    def refresh(self) -> bool:
        """Look what other processes have published meanwhile; True if something is different.

        Raises:
            CacheChangedError: the file was replaced by another (resized): open it again.
            ClosedError: the cache is closed.
        """
        return self._storage.refresh()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Compare every committed block with its checksum.

        Args:
            progress: called with (bytes done, bytes in all) now and then.

        Returns:
            What was looked at, and what was found damaged. Nothing is raised for damage.

        Raises:
            CacheChangedError: the writer took positions back meanwhile: refresh, and verify again.
            ClosedError: the cache is closed.
        """
        return self._storage.verify(progress)

    def close(self) -> None:
        """Commit what is complete, if this handle writes, and let go of everything. Closing twice is fine.

        Views that were handed out stay valid as long as they live.

        Raises:
            OSError: the commit failed; the cache is closed all the same, as of its last commit.
        """
        self._storage.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Reading

    def get_key(self, layer: int, position: int, head: int) -> NDArray[np.float32]:
        """Return one dequantised key row, f32 [head_dim].

        Raises:
            LayerOutOfRangeError, PositionOutOfRangeError, HeadOutOfRangeError: there is none.
        """
        return self._row_layer(layer, position).get_key(position, head)

    def get_value(self, layer: int, position: int, head: int) -> NDArray[np.float32]:
        """Return one dequantised value row, f32 [value_head_dim]; raises as `get_key`."""
        return self._row_layer(layer, position).get_value(position, head)

    def _row_layer(self, layer: int, position: int) -> QuantizedKvLayer:
        found = self._layers[self._layers.check(layer)]
        length = self.seq_len
        if index(position, "position") >= length:
            # A position that only some layers have is not part of the cache.
            raise PositionOutOfRangeError(
                f"position {position} is not stored: {length} are complete in every layer",
                position=position,
                actual=length,
                layer=layer,
            )
        return found

    def facts(self) -> dict[str, Any]:
        """What the storage tells of itself: kind, sizes on disk, commit state. For `inspect`."""
        self._storage.check()
        return self._storage.facts()

    def _check(self) -> None:
        """Assert what always holds."""
        lengths = [store.length for store in self._storage.layers]
        assert self.seq_len == min(lengths)
        assert 0 <= min(lengths) <= max(lengths) <= self.capacity
        assert 0 <= self._storage.token_len <= self.capacity
        if not self.writable:
            assert min(lengths) == max(lengths)
        for layer in self._layers:
            assert layer.key_codes.shape == (len(layer), layer.num_kv_heads, layer.head_dim)
            assert not layer.key_codes.size or layer.key_codes.min() >= -127
            assert not layer.key_scales.size or layer.key_scales.min() > 0


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
) -> QuantizedKvCache:
    """Make a new cache file and open it for appending.

    Args:
        path: where; its directory must exist. The file appears whole, mode 0600, and is sparse: reserving costs no disk.
        num_layers: transformer layers.
        capacity: positions to reserve; `resize` changes it.
        num_kv_heads: key and value heads; one number, or one a layer.
        head_dim: numbers in a key row; one number, or one a layer.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        metadata: plain JSON of your own.
        model: what makes the cache, so that nothing else uses it.
        durability: "publish": appends survive the death of this process at once, and power loss from `flush` or
            `close` on. "commit": every append that completes a step survives power loss when the call returns.
        overwrite: replace a cache that is there already.
        timeout: seconds to wait for a writer of the cache that is to be replaced.
        metadata_room: bytes to reserve for model and metadata as JSON.

    Raises:
        CacheExistsError: there is something at `path`, and `overwrite` was not given or it is no cache.
        CacheNotFoundError: the directory does not exist.
        ShapeMismatchError, MetadataError: as in `QuantizedKvCache`.
        CacheLockedError: a writer holds the cache that is to be replaced.
        OSError: the file can't be made.
    """
    geometry = CacheGeometry.build(
        num_layers=num_layers,
        capacity=capacity,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
    )
    storage = MappedWriter.create(
        _local_path(path),
        geometry,
        _document(metadata, model),
        durability=_check_durability(durability),
        overwrite=overwrite,
        timeout=timeout,
        metadata_room=metadata_room,
    )
    return QuantizedKvCache.of_storage(storage)


def open_cache(
    path_or_url: PathLike,
    mode: Literal["r", "a"] = "r",
    *,
    timeout: float = 0,
    durability: Durability = "publish",
    recover: bool = False,
) -> QuantizedKvCache:
    """Open a cache, in constant time.

    Args:
        path_or_url: the path of a `.kvm` file.
        mode: "r" reads, beside any number of others and a writer; "a" appends, and is the only one that does.
        timeout: with "a", seconds to wait for another writer to finish.
        durability: with "a", as in `create`.
        recover: believe only the last sound commit, where published lengths are damaged.

    Raises:
        CacheNotFoundError: there is nothing at the path.
        NotACacheError, VersionMismatchError, CorruptCacheError: what is there can't be used.
        CacheLockedError: another writer holds it.
        OSError: it can't be read, or with "a" written.
    """
    path = _local_path(path_or_url)
    storage: Storage
    if mode == "r":
        storage = MappedReader.open(path, recover=recover)
    elif mode == "a":
        storage = MappedWriter.open_locked(
            path, timeout=timeout, durability=_check_durability(durability), recover=recover
        )
    else:
        raise KvmmapError(f'mode must be "r" (read) or "a" (append), not {mode!r}')
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
    resize_file(_local_path(path), index(capacity, "capacity"), timeout=timeout, progress=progress)


def compact(path: PathLike, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Drop the capacity that is not used: `resize` to the positions stored."""
    resize_file(_local_path(path), None, timeout=timeout, progress=progress)


def _local_path(path: PathLike) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        text = os.fsdecode(text)
    if "://" in text:
        raise NotACacheError(f"{text}: URLs are not supported by this version; give a file's path", path=text)
    return text


def _check_durability(durability: str) -> Durability:
    if durability == "publish":
        return "publish"
    if durability == "commit":
        return "commit"
    raise KvmmapError(f'durability must be "publish" or "commit", not {durability!r}')


def _document(metadata: Mapping[str, Any] | None, model: ModelInfo | None) -> Document:
    return Document(model, {} if metadata is None else metadata)  # type: ignore[arg-type]


def _deep_copy(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _deep_copy(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_deep_copy(inner) for inner in value]
    return value


def _per_layer(x: Any) -> Sequence[Any]:
    """Split [num_layers, ...] into one array a layer; a sequence of arrays is that already."""
    if isinstance(x, list | tuple):
        return x
    rows, _ = as_rows(x)
    if rows.ndim != 4:
        raise ShapeMismatchError(
            f"must be [num_layers, n, num_kv_heads, head_dim], or a sequence of one array a layer, not {list(rows.shape)}",
            expected=("num_layers", "n", "num_kv_heads", "head_dim"),
            actual=rows.shape,
        )
    return [x[number] for number in range(len(rows))]


def _one_step(x: Any) -> Sequence[Any]:
    """Split [num_layers, num_kv_heads, head_dim] into one [1, num_kv_heads, head_dim] a layer."""
    if isinstance(x, list | tuple):
        return [as_rows(array)[0][None] for array in x]
    rows, _ = as_rows(x)
    if rows.ndim != 3:
        raise ShapeMismatchError(
            f"must be [num_layers, num_kv_heads, head_dim], or a sequence of one array a layer, not {list(rows.shape)}",
            expected=("num_layers", "num_kv_heads", "head_dim"),
            actual=rows.shape,
        )
    return [x[number : number + 1] for number in range(len(rows))]


def _check_token_ids(token_ids: Any, count: int | None) -> NDArray[np.int32]:
    ids = np.asarray(token_ids)
    if ids.size == 0:
        ids = ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        raise DtypeError(f"token ids must be whole numbers, not {ids.dtype}", expected="int32", actual=str(ids.dtype))
    if ids.ndim != 1 or (count is not None and len(ids) != count):
        wanted = "n" if count is None else count
        raise ShapeMismatchError(
            f"token ids must be [{wanted}], one a position, not {list(ids.shape)}",
            expected=(wanted,),
            actual=ids.shape,
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < 2**31):
        raise ShapeMismatchError(
            f"token ids must lie in [0, 2**31), not from {ids.min()} to {ids.max()}",
            expected=(0, 2**31 - 1),
            actual=(int(ids.min()), int(ids.max())),
        )
    return ids.astype(np.int32)
