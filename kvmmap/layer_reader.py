"""One layer, read: its dimensions, its rows decoded or as they are stored, and which of them are in memory.

Where its slabs lie is its store's business, and what is in them its codecs'.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike, NDArray

from .checks import check_head, check_position, check_stored_range
from .codecs import RowCodec
from .errors import DtypeError
from .geometry import LayerGeometry
from .inputs import require_rows
from .ranges import compression_ratio, index
from .recent import RecentRows
from .row_arrays import as_bits, output_array, target_dtype
from .rows import Rows
from .storage.protocols import LayerStore, Storage
from .threads import thread_count


class _Part(NamedTuple):
    """Keys or values: how they are stored, and where in `Rows`."""

    name: str
    codec: RowCodec
    dim: int
    arrays: slice


@functools.lru_cache
def _parts(key_codec: RowCodec, key_dim: int, value_codec: RowCodec, value_dim: int, key_arrays: int) -> list[_Part]:
    """Return keys and values of a shape. Layers of one cache share them mostly, and are made one after the other."""
    keys = _Part("keys", key_codec, key_dim, slice(0, key_arrays))
    return [keys, _Part("values", value_codec, value_dim, slice(key_arrays, None))]


class LayerReader:
    """The reading half of `QuantizedKvLayer`."""

    __slots__ = ("_keys", "_label", "_storage", "_store", "_values")

    def __init__(self, storage: Storage, store: LayerStore) -> None:
        self._storage = storage
        self._store = store
        # In messages: the layer's index, if there are others to tell it from.
        self._label = store.index if storage.geometry.num_layers > 1 else None
        shape = store.geometry
        self._keys, self._values = _parts(
            shape.key_codec, shape.head_dim, shape.value_codec, shape.value_head_dim, len(shape.key_slabs)
        )

    # Dimensions

    def __len__(self) -> int:
        """Positions stored, as of the last `refresh` where another process writes."""
        return self._store.length

    @property
    def geometry(self) -> LayerGeometry:
        """The shape of its rows."""
        return self._store.geometry

    @property
    def capacity(self) -> int:
        """Positions reserved."""
        return self._store.capacity

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads."""
        return self._store.geometry.num_kv_heads

    @property
    def head_dim(self) -> int:
        """Numbers in a key row."""
        return self._store.geometry.head_dim

    @property
    def value_head_dim(self) -> int:
        """Numbers in a value row."""
        return self._store.geometry.value_head_dim

    @property
    def memory_bytes(self) -> int:
        """Bytes of codes and scales over the whole capacity."""
        return self.capacity * self.geometry.position_bytes

    @property
    def fp32_memory_bytes(self) -> int:
        """Bytes that the same capacity takes as f32."""
        return self.capacity * self.geometry.fp32_position_bytes

    @property
    def compression_ratio(self) -> float:
        """`fp32_memory_bytes` over `memory_bytes`; 1.0 at capacity 0."""
        return compression_ratio(self.fp32_memory_bytes, self.memory_bytes)

    def __repr__(self) -> str:
        size = f"{self.num_kv_heads} heads x {self.head_dim}"
        return f"<QuantizedKvLayer {len(self)}/{self.capacity} positions, {size}>"

    # Rows as they are stored

    @property
    def key_codes(self) -> NDArray[np.int8]:
        """Read-only view of int8 key codes, [len, num_kv_heads, head_dim]; zero copy.

        The memory stays valid as long as the array lives; the contents are the cache's until `truncate`. If reads are
        verified (see `kvmmap.open`), all of the layer's blocks are verified before the first view is returned. A view
        of a part costs less: `read_quantized`.

        Raises:
            DtypeError: keys are stored by another codec.
        """
        return self._array("key_codes")

    @property
    def key_scales(self) -> NDArray[np.float32]:
        """Read-only view, f32 [len, num_kv_heads]; as `key_codes`."""
        return self._array("key_scales")

    @property
    def value_codes(self) -> NDArray[np.int8]:
        """Read-only view, int8 [len, num_kv_heads, value_head_dim]; as `key_codes`."""
        return self._array("value_codes")

    @property
    def value_scales(self) -> NDArray[np.float32]:
        """Read-only view, f32 [len, num_kv_heads]; as `key_codes`."""
        return self._array("value_scales")

    def read_quantized(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return the arrays of positions [start, stop) as they are stored: what `extend_quantized` takes.

        Returns:
            A tuple of the keys' and then the values' arrays, with their names as attributes; read-only. Of int8 they
            are key_codes, int8 [n, num_kv_heads, head_dim], key_scales, f32 [n, num_kv_heads], value_codes and
            value_scales. Views, as `key_codes` is, of a cache in memory or a mapped file; elsewhere only these
            positions are fetched.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
            CacheChangedError: the writer truncated since the last `refresh`.
            CorruptCacheError: as in `read_keys`.
        """
        version = self._store.version()
        rows = self._store.rows(*check_stored_range(self._store, start, stop))
        self._store.validate(version)
        return rows

    def recent_rows(self) -> RecentRows | None:
        """Return what is kept in 16 bits, for this package and its extensions; None if nothing is."""
        return self._store.recent_rows()

    def _array(self, name: str) -> NDArray[Any]:
        rows = self.read_quantized()
        if name not in rows._fields:
            raise DtypeError(
                f"this layer has no {name}: it stores keys by {self.geometry.key_codec.name} and values by "
                f"{self.geometry.value_codec.name}, as {', '.join(rows._fields)}; read_quantized() returns these",
                expected=rows._fields,
                actual=name,
                layer=self._store.index,
            )
        array: NDArray[Any] = getattr(rows, name)
        return array

    # Rows, decoded

    def get_key(self, position: int, head: int) -> NDArray[np.float32]:
        """Return one decoded key row, f32 [head_dim].

        Raises:
            PositionOutOfRangeError, HeadOutOfRangeError: there is none (negative numbers don't wrap).
        """
        row: NDArray[np.float32] = self._one_position(self._keys, position, head)[0]
        return row

    def get_value(self, position: int, head: int) -> NDArray[np.float32]:
        """Return one decoded value row, f32 [value_head_dim]; raises as `get_key`."""
        row: NDArray[np.float32] = self._one_position(self._values, position, head)[0]
        return row

    def get_keys_at(self, position: int) -> NDArray[np.float32]:
        """Return a position's decoded keys, f32 [num_kv_heads, head_dim].

        Raises:
            PositionOutOfRangeError: it is not stored.
        """
        return self._one_position(self._keys, position)

    def get_values_at(self, position: int) -> NDArray[np.float32]:
        """Return a position's decoded values, f32 [num_kv_heads, value_head_dim]; raises as `get_keys_at`."""
        return self._one_position(self._values, position)

    def read_keys(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: DTypeLike = "float32",
        out: NDArray[Any] | None = None,
        threads: int | None = None,
        length: int | None = None,
    ) -> NDArray[Any]:
        """Decode the keys of positions [start, stop): of each the best that is stored.

        Where the cache keeps the last and first positions in 16 bits (`recent_window`, `sinks`), these are what is
        returned, as the newest query attends to them.

        Args:
            start: first position.
            stop: one past the last; all that are stored by default.
            dtype: "float32", "float16" or "bfloat16".
            out: where to put them, C-contiguous [stop - start, num_kv_heads, head_dim] of that dtype; new by default.
            threads: at most so many; by default those of KVMMAP_NUM_THREADS, or all processors.
            length: positions of the whole sequence, where others that follow are kept elsewhere: the recent window ends
                there. By default, as many as are stored.

        Returns:
            [stop - start, num_kv_heads, head_dim], in C order.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
            ShapeMismatchError, DtypeError: `out` or `dtype` does not fit.
            CacheChangedError: the writer truncated since the last `refresh`.
            CorruptCacheError: a block does not match its checksum (`verify` of `kvmmap.open`).
        """
        return self._read(self._keys, start, stop, dtype, out, threads, length)

    def read_values(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: DTypeLike = "float32",
        out: NDArray[Any] | None = None,
        threads: int | None = None,
        length: int | None = None,
    ) -> NDArray[Any]:
        """Decode the values of positions [start, stop): [stop - start, num_kv_heads, value_head_dim].

        Arguments and errors are those of `read_keys`.
        """
        return self._read(self._values, start, stop, dtype, out, threads, length)

    def _one_position(self, part: _Part, position: int, head: int | None = None) -> NDArray[np.float32]:
        store = self._store
        if not store.geometry.num_kv_heads:
            require_rows(store.geometry, self._label)
        version = store.version()  # before the length: see `LayerStore`
        position = check_position(store, position, self._label)
        heads = slice(None)
        if head is not None:
            head = check_head(store, head, self._label)
            heads = slice(head, head + 1)
        rows = store.rows(position, position + 1)
        arrays = [array[0, heads] for array in rows[part.arrays]]
        result = np.empty((len(arrays[0]), part.dim), np.float32)
        part.codec.decode(arrays, part.dim, result, 0, 1)
        kept = store.recent_rows()
        if kept is not None:
            for _, row in kept.rows(part.name, position, position + 1, store.length):
                result[:] = row[heads]
        store.validate(version)  # the rows were still the cache's when they had been read
        return result

    def _read(
        self,
        part: _Part,
        start: int,
        stop: int | None,
        dtype: DTypeLike,
        out: NDArray[Any] | None,
        threads: int | None,
        length: int | None,
    ) -> NDArray[Any]:
        require_rows(self.geometry, self._label)
        if length is not None:
            length = index(length, "length")
        version = self._store.version()
        start, stop = check_stored_range(self._store, start, stop)
        result = output_array((stop - start, self.num_kv_heads, part.dim), dtype, out)
        bits, number, done = as_bits(result), target_dtype(dtype)[1], 0
        for rows in self._store.iter_rows(start, stop):
            target = bits[done : done + len(rows[0])]
            most = thread_count(threads, target.size)
            part.codec.decode(rows[part.arrays], part.dim, target, number, most)
            done += len(rows[0])
        kept = self._store.recent_rows()
        if kept is not None:
            newest = self._store.length if length is None else max(length, self._store.length)
            kept.overlay(part.name, start, stop, newest, bits, number)
        self._store.validate(version)
        return result

    # Residency

    def prefetch(self, start: int = 0, stop: int | None = None) -> None:
        """Start reading the rows of positions [start, stop) from the disk or the store, without waiting.

        Use it for rows that will be needed while this process does something else. Sequential reads prefetch by
        themselves. Has no effect on rows in memory.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
        """
        self._store.check()
        self._store.prefetch(*check_stored_range(self._store, start, stop))

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Release the memory that the rows of positions [start, stop) of a file take in this process.

        They are read again when needed. Pages of other processes and the system's page cache are not affected. Views
        stay valid. Has no effect on a cache in memory.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
        """
        self._store.check()
        self._store.release(*check_stored_range(self._store, start, stop))
