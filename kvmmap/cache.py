"""A whole cache: push_step, extend, flush, truncate, close. A storage, its layers, and what they have in common.

Which kind of storage it is, is not known here: `opening` decides that.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, NoReturn, Self, overload

import numpy as np
from numpy.typing import NDArray

from .errors import LayerOutOfRangeError, PositionOutOfRangeError, ShapeMismatchError
from .format import NO_TOKEN
from .geometry import CacheGeometry, check_range, check_room, compression_ratio, index
from .inputs import check_quantized, check_token_ids, one_step, per_layer
from .layer import QuantizedKvLayer
from .metadata import ModelInfo, document
from .storage.memory import MemoryStorage
from .storage.protocols import Progress, Storage, VerifyReport, not_pickled, seq_len


class Layers(Sequence[QuantizedKvLayer]):
    """A cache's layers, by index from 0; negative ones don't wrap."""

    def __init__(self, storage: Storage) -> None:
        self._layers = [QuantizedKvLayer.of_store(storage, store) for store in storage.layers]

    def __len__(self) -> int:
        return len(self._layers)

    def __iter__(self) -> Iterator[QuantizedKvLayer]:
        return iter(self._layers)

    @overload
    def __getitem__(self, layer: int) -> QuantizedKvLayer: ...
    @overload
    def __getitem__(self, layer: slice) -> list[QuantizedKvLayer]: ...
    def __getitem__(self, layer: int | slice) -> QuantizedKvLayer | list[QuantizedKvLayer]:
        if isinstance(layer, slice):
            return self._layers[layer]
        return self._layers[self.check(layer)]

    def check(self, layer: int) -> int:
        """Return `layer` if there is such a one."""
        layer = index(layer, "layer")
        if not 0 <= layer < len(self._layers):
            raise LayerOutOfRangeError(
                f"layer {layer} does not exist: there are {len(self._layers)}, counted from 0, and "
                "negative ones do not wrap",
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
        key_codec, value_codec: names of the codecs that keys and values are stored by; one for all, or one a layer.
        metadata: plain JSON of your own.
        model: what made the cache.

    It is a context manager that closes. One thread at a time appends; others may read meanwhile.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
        DtypeError: there is no such codec.
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
        key_codec: str | Sequence[str] = "int8",
        value_codec: str | Sequence[str] = "int8",
        metadata: Mapping[str, Any] | None = None,
        model: ModelInfo | None = None,
    ) -> None:
        geometry = CacheGeometry.build(
            num_layers=num_layers,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            key_codec=key_codec,
            value_codec=value_codec,
        )
        notes = document(metadata, model)
        notes.encode()
        self._attach(MemoryStorage(geometry, notes))

    def __reduce__(self) -> NoReturn:
        raise not_pickled(self.path)

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
    def num_kv_heads(self) -> int:
        """Key and value heads of every layer.

        Raises:
            ShapeMismatchError: layers differ; names them. `layers[i].num_kv_heads` is one layer's.
        """
        return self._storage.geometry.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Numbers in a key row of every layer. Raises as `num_kv_heads`."""
        return self._storage.geometry.head_dim

    @property
    def value_head_dim(self) -> int:
        """Numbers in a value row of every layer. Raises as `num_kv_heads`."""
        return self._storage.geometry.value_head_dim

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
    def storage(self) -> Storage:
        """Where its rows lie: for this package's own modules, and who extends it."""
        return self._storage

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
        return copy.deepcopy(self._storage.document.metadata)

    @metadata.setter
    def metadata(self, metadata: Mapping[str, Any]) -> None:
        self._storage.set_document(document(metadata, self._storage.document.model))

    @property
    def model(self) -> ModelInfo | None:
        """What made the cache, if that was recorded; assign to replace it (saved with the next commit)."""
        self._storage.check()
        return self._storage.document.model

    @model.setter
    def model(self, model: ModelInfo | None) -> None:
        self._storage.set_document(document(self._storage.document.metadata, model))

    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Token ids, int32 [seq_len], a copy; -1 where none was given."""
        storage = self._storage
        storage.check()
        version = storage.version()
        length = self.seq_len
        recorded = min(storage.token_len, length)
        found = storage.read_tokens(recorded)
        storage.validate(version)
        ids = np.full(length, NO_TOKEN, np.int32)
        ids[:recorded] = found
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
        self._append(one_step(keys), one_step(values), None if token_id is None else [token_id])

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
        self._append(per_layer(keys), per_layer(values), token_ids)

    def _append(self, keys: Sequence[Any], values: Sequence[Any], token_ids: Any) -> None:
        for name, arrays in (("keys", keys), ("values", values)):
            if len(arrays) != self.num_layers:
                raise ShapeMismatchError(
                    f"{name} hold {len(arrays)} layers, and the cache has {self.num_layers}",
                    expected=self.num_layers,
                    actual=len(arrays),
                )
        pairs = [layer.check_input(key, value) for layer, key, value in zip(self._layers, keys, values, strict=True)]
        count = len(pairs[0].keys)
        for number, pair in enumerate(pairs):
            if len(pair.keys) != count:
                raise ShapeMismatchError(
                    f"layer {number} has {len(pair.keys)} positions and layer 0 has {count}: give as many to each",
                    expected=count,
                    actual=len(pair.keys),
                    layer=number,
                )
        ids = None if token_ids is None else check_token_ids(token_ids, count)
        storage = self._storage
        with storage.lock:
            start = self._check_level(count)
            for layer, pair in zip(self._layers, pairs, strict=True):
                layer.write_rows(start, pair)
            if ids is not None:
                self._record_tokens(start, ids)
            storage.publish_step(start + count)
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

    def push_token_ids(self, token_ids: Any, start: int | None = None) -> None:
        """Record token ids of positions that have none: for who appends to layers one by one.

        Args:
            token_ids: n whole numbers from 0 to 2**31 - 1. They may run ahead of the layers, and count for positions
                once these are complete.
            start: the first one's position, `token_len` by default. Positions that are skipped get -1 for good.

        Raises:
            DtypeError, ShapeMismatchError: not such numbers.
            PositionOutOfRangeError: `start` has an id already.
            CapacityExceededError: more than fit.
        """
        ids = check_token_ids(token_ids, None)
        with self._storage.lock:
            self._storage.layers[0].begin(0)
            recorded = self._storage.token_len
            start = recorded if start is None else index(start, "start")
            if start < recorded:
                raise PositionOutOfRangeError(
                    f"position {start} has its token id already: those of {recorded} positions are recorded",
                    position=start,
                    actual=recorded,
                )
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
            check_quantized(layer.read_quantized(), layer.geometry, None)
