"""Appending to one layer: push, extend, extend_quantized. Rows are encoded on the way in.

Checks come first, then everything is encoded and written, and only then published: what fails appends nothing.
"""

from __future__ import annotations

from typing import Any, NoReturn

from ._core import RecentRings
from .checks import non_finite
from .encoding import pair_encoder
from .errors import KvmmapError
from .inputs import RowPair, check_position_rows, check_quantized, refuse_shapes, require_rows
from .layer_reader import LayerReader
from .ranges import check_range
from .recent import RecentRows
from .row_arrays import as_rows
from .storage.protocols import LayerStore, Storage


class LayerWriter(LayerReader):
    """The appending half of `QuantizedKvLayer`."""

    __slots__ = (
        "_append",
        "_encode",
        "_has_rows",
        "_keeps_recent",
        "_key_shape",
        "_rings",
        "_value_shape",
    )

    def _attach(self, storage: Storage, store: LayerStore) -> None:
        super().__init__(storage, store)
        geometry = store.geometry
        self._key_shape = (geometry.num_kv_heads, geometry.head_dim)
        self._value_shape = (geometry.num_kv_heads, geometry.value_head_dim)
        self._encode = pair_encoder(geometry)
        self._append = store.append_position if store.appends_positions else None
        self._has_rows = geometry.has_rows
        self._keeps_recent = storage.geometry.keeps_recent and geometry.has_rows
        self._rings: RecentRings | None = None  # where a pushed position is kept while it is encoded

    def push(self, keys: Any, values: Any) -> None:
        """Append one position.

        Args:
            keys: [num_kv_heads, head_dim] or flat; f32, f16 or bf16; numpy, torch or any DLPack exporter on the CPU.
            values: [num_kv_heads, value_head_dim] or flat, likewise.

        Raises:
            ShapeMismatchError, DtypeError, NonFiniteError, CapacityExceededError, ReadOnlyError, ClosedError: and
                nothing was appended.
            OSError: the disk is full or failing; nothing was appended.
        """
        if not self._has_rows:
            require_rows(self._store.geometry, self._label)
        key_rows, key_dtype = as_rows(keys)
        value_rows, value_dtype = as_rows(values)
        if key_rows.shape != self._key_shape:
            key_rows = check_position_rows(key_rows, "keys", self._key_shape, self._label)
        if value_rows.shape != self._value_shape:
            value_rows = check_position_rows(value_rows, "values", self._value_shape, self._label)
        store = self._store
        with self._storage.lock:
            position = store.begin(1)
            if self._append is not None:
                bad = self._append(position, key_rows, key_dtype, value_rows, value_dtype)
                if bad != -1:
                    self._refuse(bad, position)
                store.publish(position + 1)
                self._storage.appended()
                return
            rows = store.stage(position, 1)
            kept = self._rings
            if kept is None and self._keeps_recent and store.in_place:
                kept = self._rings = store.rings()
            bad = self._encode(key_rows, key_dtype, value_rows, value_dtype, rows, kept, position)
            if bad != -1:
                self._refuse(bad, position)
            store.write(position, rows)
            if self._keeps_recent and kept is None:
                store.keep(position, key_rows, key_dtype, value_rows, value_dtype)
            store.publish(position + 1)
            self._storage.appended()

    def extend(self, keys: Any, values: Any) -> None:
        """Append many positions, all or none.

        Args:
            keys: [n, num_kv_heads, head_dim]; f32, f16 or bf16, any strides; numpy, torch or DLPack on the CPU.
            values: [n, num_kv_heads, value_head_dim], likewise.

        Raises:
            ShapeMismatchError, DtypeError, NonFiniteError, CapacityExceededError, ReadOnlyError, ClosedError: and
                nothing was appended.
            OSError: the disk is full or failing; nothing was appended.
        """
        pair = self.check_input(keys, values)
        with self._storage.lock:
            count = len(pair.keys)
            position = self._store.begin(count)
            self.write_rows(position, pair)
            self.keep_rows(position, pair)
            self._store.publish(position + count)
            self._storage.appended()

    def extend_quantized(self, *arrays: Any) -> None:
        """Append positions that are encoded already, bit by bit: a lossless copy between caches.

        Args:
            arrays: keys' and then values', as `read_quantized` returns them. Of int8 rows they are key codes, int8
                [n, num_kv_heads, head_dim], none of them -128, key scales, f32 [n, num_kv_heads], finite and at least
                2**-23, value codes and value scales.

        Raises:
            ShapeMismatchError, DtypeError: not such arrays.
            NonFiniteError: arrays that the codec never makes.
            CapacityExceededError, ReadOnlyError, ClosedError, OSError: as in `extend`.
        """
        require_rows(self._store.geometry, self._label)
        source = check_quantized(arrays, self._store.geometry, self._label)
        count = len(source[0])
        with self._storage.lock:
            start = self._store.begin(count)
            done = 0
            while done < count:
                rows = self._store.stage(start + done, count - done)
                stop = done + len(rows[0])
                rows.fill(source.part(done, stop))
                self._store.write(start + done, rows)
                done = stop
            self._store.publish(start + count)
            self._storage.appended()

    def extend_from(self, source: LayerReader, start: int = 0, stop: int | None = None) -> None:
        """Append positions [start, stop) of another layer of the same shape and codecs, bit by bit, with what it keeps
        of them in 16 bits.

        Raises:
            PositionOutOfRangeError, CacheChangedError, CorruptCacheError: as in `read_quantized` of the source.
            ShapeMismatchError, DtypeError: it has other shapes or codecs.
            CapacityExceededError, ReadOnlyError, ClosedError, OSError: as in `extend`.
        """
        rows = source.read_quantized(start, stop)
        with self._storage.lock:
            at = len(self)
            self.extend_quantized(*rows)
            kept = source.recent_rows()
            if kept is not None:
                self._store.take_recent(kept, start, start + rows.num_positions, at)

    def chunk_rows(self, keys: Any, values: Any) -> RecentRows | None:
        """Return what `attend` takes as `chunk`, for the queries of positions that are about to be appended.

        It holds as much of them in 16 bits, in memory. Call it before `extend`, whose arguments these are.

        Returns:
            None if the cache has no recent window.
        """
        kept = self._store.recent_rows()
        if kept is None or not kept.window:
            return None
        return kept.with_chunk(self._store.geometry, len(self), *self.check_input(keys, values))

    def check_input(self, keys: Any, values: Any) -> RowPair:
        """Return `extend`'s arguments as rows, their shapes checked."""
        if not self._has_rows:
            require_rows(self._store.geometry, self._label)
        key_rows, key_dtype = as_rows(keys)
        value_rows, value_dtype = as_rows(values)
        fits = key_rows.shape[1:] == self._key_shape and value_rows.shape[1:] == self._value_shape
        pair = RowPair(key_rows, key_dtype, value_rows, value_dtype)
        if not fits or len(key_rows) != len(value_rows):
            refuse_shapes(pair, self._store.geometry, self._label)
        return pair

    def write_rows(self, start: int, pair: RowPair) -> None:
        """Encode and write rows at `start`, unpublished; the storage's lock is held."""
        keys, key_dtype, values, value_dtype = pair
        store, done, count = self._store, 0, len(keys)
        while done < count:
            rows = store.stage(start + done, count - done)
            stop = done + len(rows[0])
            some, others = (keys, values) if stop - done == count else (keys[done:stop], values[done:stop])
            bad = self._encode(some, key_dtype, others, value_dtype, rows, None, start + done)
            if bad != -1:
                self._refuse(bad, start + done)
            store.write(start + done, rows)
            done = stop

    def _refuse(self, bad: int, start: int) -> NoReturn:
        """Raise for the row that an encoder has refused, of positions from `start` on."""
        name, row = ("keys", bad) if bad >= 0 else ("values", -2 - bad)
        raise non_finite(self._store, name, start, row, self._label)

    def keep_rows(self, start: int, pair: RowPair) -> None:
        """Keep rows that were written at `start` in 16 bits besides, if the cache does; the storage's lock is held."""
        if self._keeps_recent:
            self._store.keep(start, *pair)

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions. For a layer that stands alone; a cache truncates all of its layers.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            KvmmapError: the layer belongs to a cache of several.
        """
        if len(self._storage.layers) > 1:
            raise KvmmapError("a layer of a cache is truncated with its cache: call cache.truncate()")
        _, length = check_range(0, length, len(self))
        self._storage.truncate(length if not self._storage.geometry.states else self._storage.checkpoints.last(length))
