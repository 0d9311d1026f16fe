"""One layer's keys and values: push, extend, get, read. Quantises on the way in, dequantises on the way out.

A layer stands alone in memory, or belongs to a cache; where its slabs lie is its store's business.
"""

from __future__ import annotations

from typing import Any, Literal, NoReturn, Unpack, overload

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core
from .attention.kernel import AttendOptions
from .attention.run import attend_store
from .attention.topk import select_blocks
from .errors import EmptyCacheError, HeadOutOfRangeError, KvmmapError, NonFiniteError, PositionOutOfRangeError
from .geometry import CacheGeometry, LayerGeometry, check_range, compression_ratio, index
from .inputs import RowPair, check_pair, check_position_rows, check_quantized, where
from .quantize import as_rows, dequantize_rows, output_array
from .storage.memory import MemoryStorage
from .storage.protocols import LayerStore, Rows, Storage, not_pickled


class QuantizedKvLayer:
    """Keys and values of one transformer layer, int8 with one f32 scale per position and head.

    Args:
        capacity: positions to reserve.
        num_kv_heads: key and value heads.
        head_dim: numbers in a key row.
        value_head_dim: numbers in a value row, `head_dim` unless given.

    Made like this it lies in memory and stands alone; `cache.layers[i]` is one that belongs to a cache. A layer may
    be appended to on its own: the step is part of the cache once it has reached every layer.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
    """

    __slots__ = ("_key_shape", "_storage", "_store", "_value_shape")

    def __init__(self, capacity: int, num_kv_heads: int, head_dim: int, value_head_dim: int | None = None) -> None:
        geometry = CacheGeometry.build(
            num_layers=1,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
        )
        storage = MemoryStorage(geometry)
        self._attach(storage, storage.layers[0])

    def __reduce__(self) -> NoReturn:
        raise not_pickled(self._storage.path)

    @classmethod
    def of_store(cls, storage: Storage, store: LayerStore) -> QuantizedKvLayer:
        """Make the layer of a storage that is there already (what a cache does)."""
        layer = cls.__new__(cls)
        layer._attach(storage, store)
        return layer

    def _attach(self, storage: Storage, store: LayerStore) -> None:
        self._storage = storage
        self._store = store
        geometry = store.geometry
        self._key_shape = (geometry.num_kv_heads, geometry.head_dim)
        self._value_shape = (geometry.num_kv_heads, geometry.value_head_dim)

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
        heads, dim = self._key_shape
        return f"<QuantizedKvLayer {len(self)}/{self.capacity} positions, {heads} heads x {dim}>"

    # Appending

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
        key_rows, key_dtype = as_rows(keys)
        value_rows, value_dtype = as_rows(values)
        if key_rows.shape != self._key_shape:
            key_rows = check_position_rows(key_rows, "keys", self._key_shape, self._number())
        if value_rows.shape != self._value_shape:
            value_rows = check_position_rows(value_rows, "values", self._value_shape, self._number())
        store = self._store
        with self._storage.lock:
            position = store.begin(1)
            rows = store.stage(position, 1)
            bad = _core.quantize_rows(key_rows[None], key_dtype, rows.key_codes, rows.key_scales, 1)
            if bad >= 0:
                raise self._non_finite("keys", position, bad)
            bad = _core.quantize_rows(value_rows[None], value_dtype, rows.value_codes, rows.value_scales, 1)
            if bad >= 0:
                raise self._non_finite("values", position, bad)
            store.write(position, rows)
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
            self._store.publish(position + count)
            self._storage.appended()

    def extend_quantized(self, key_codes: Any, key_scales: Any, value_codes: Any, value_scales: Any) -> None:
        """Append positions that are quantised already, bit by bit: a lossless copy between caches.

        Args:
            key_codes: int8 [n, num_kv_heads, head_dim], none of them -128.
            key_scales: f32 [n, num_kv_heads], finite and at least 2**-23.
            value_codes: int8 [n, num_kv_heads, value_head_dim].
            value_scales: f32 [n, num_kv_heads].

        Raises:
            ShapeMismatchError, DtypeError: not such arrays.
            NonFiniteError: codes or scales that the codec never makes.
            CapacityExceededError, ReadOnlyError, ClosedError, OSError: as in `extend`.
        """
        source = check_quantized(
            Rows(key_codes, key_scales, value_codes, value_scales), self._store.geometry, self._number()
        )
        count = len(source.key_codes)
        with self._storage.lock:
            start = self._store.begin(count)
            done = 0
            while done < count:
                rows = self._store.stage(start + done, count - done)
                stop = done + len(rows.key_codes)
                rows.fill(source.part(done, stop))
                self._store.write(start + done, rows)
                done = stop
            self._store.publish(start + count)
            self._storage.appended()

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions. For a layer that stands alone; a cache truncates all of its layers.

        Raises:
            PositionOutOfRangeError: fewer are stored.
            KvmmapError: the layer belongs to a cache of several.
        """
        if len(self._storage.layers) > 1:
            raise KvmmapError("a layer of a cache is truncated with its cache: call cache.truncate()")
        _, length = check_range(0, length, len(self))
        self._storage.truncate(length)

    # Reading

    @property
    def key_codes(self) -> NDArray[np.int8]:
        """Read-only view, int8 [len, num_kv_heads, head_dim]; zero copy. Its memory stays valid as long as the array
        lives; its contents are the cache's until `truncate`. Where rows are compared with their checksums (see
        `kvmmap.open`), all of the layer's are before the first view is given, and those of a view not again; a view
        of a part costs less: `read_quantized`."""
        return self.read_quantized().key_codes

    @property
    def key_scales(self) -> NDArray[np.float32]:
        """Read-only view, f32 [len, num_kv_heads]; as `key_codes`."""
        return self.read_quantized().key_scales

    @property
    def value_codes(self) -> NDArray[np.int8]:
        """Read-only view, int8 [len, num_kv_heads, value_head_dim]; as `key_codes`."""
        return self.read_quantized().value_codes

    @property
    def value_scales(self) -> NDArray[np.float32]:
        """Read-only view, f32 [len, num_kv_heads]; as `key_codes`."""
        return self.read_quantized().value_scales

    def get_key(self, position: int, head: int) -> NDArray[np.float32]:
        """Return one dequantised key row, f32 [head_dim].

        Raises:
            PositionOutOfRangeError, HeadOutOfRangeError: there is none (negative numbers don't wrap).
        """
        version, position, head = self._store.version(), self._check_position(position), self._check_head(head)
        rows = self._store.rows(position, position + 1)
        return self._dequantize(rows.key_codes[0, head], rows.key_scales[0, head : head + 1], version)

    def get_value(self, position: int, head: int) -> NDArray[np.float32]:
        """Return one dequantised value row, f32 [value_head_dim]; raises as `get_key`."""
        version, position, head = self._store.version(), self._check_position(position), self._check_head(head)
        rows = self._store.rows(position, position + 1)
        return self._dequantize(rows.value_codes[0, head], rows.value_scales[0, head : head + 1], version)

    def get_keys_at(self, position: int) -> NDArray[np.float32]:
        """Return a position's dequantised keys, f32 [num_kv_heads, head_dim].

        Raises:
            PositionOutOfRangeError: it is not stored.
        """
        version, position = self._store.version(), self._check_position(position)
        rows = self._store.rows(position, position + 1)
        return self._dequantize(rows.key_codes[0], rows.key_scales[0], version)

    def get_values_at(self, position: int) -> NDArray[np.float32]:
        """Return a position's dequantised values, f32 [num_kv_heads, value_head_dim]; raises as `get_keys_at`."""
        version, position = self._store.version(), self._check_position(position)
        rows = self._store.rows(position, position + 1)
        return self._dequantize(rows.value_codes[0], rows.value_scales[0], version)

    def read_keys(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: DTypeLike = "float32",
        out: NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any]:
        """Dequantise the keys of positions [start, stop).

        Args:
            start: first position.
            stop: one past the last; all that are stored by default.
            dtype: "float32", "float16" or "bfloat16".
            out: where to put them, C-contiguous [stop - start, num_kv_heads, head_dim] of that dtype; new by default.
            threads: at most so many; as many as there are processors by default.

        Returns:
            [stop - start, num_kv_heads, head_dim], in C order.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
            ShapeMismatchError, DtypeError: `out` or `dtype` does not fit.
            CacheChangedError: the writer took positions back since the last `refresh`.
            CorruptCacheError: a block does not match its checksum (`verify` of `kvmmap.open`).
        """
        return self._read("key", start, stop, dtype, out, threads)

    def read_values(
        self,
        start: int = 0,
        stop: int | None = None,
        *,
        dtype: DTypeLike = "float32",
        out: NDArray[Any] | None = None,
        threads: int | None = None,
    ) -> NDArray[Any]:
        """Dequantise the values of positions [start, stop): [stop - start, num_kv_heads, value_head_dim].

        Arguments and errors are those of `read_keys`.
        """
        return self._read("value", start, stop, dtype, out, threads)

    def _read(
        self,
        which: Literal["key", "value"],
        start: int,
        stop: int | None,
        dtype: DTypeLike,
        out: NDArray[Any] | None,
        threads: int | None,
    ) -> NDArray[Any]:
        version = self._store.version()  # before the length: see `LayerStore`
        start, stop = self._check_range(start, stop)
        dim = self.head_dim if which == "key" else self.value_head_dim
        result = output_array((stop - start, self.num_kv_heads, dim), dtype, out)
        done = 0
        for rows in self._store.iter_rows(start, stop):
            codes = rows.key_codes if which == "key" else rows.value_codes
            scales = rows.key_scales if which == "key" else rows.value_scales
            dequantize_rows(codes, scales, dtype, result[done : done + len(codes)], threads=threads)
            done += len(codes)
        self._store.validate(version)  # the rows were still the cache's when they had been read
        return result

    def read_quantized(self, start: int = 0, stop: int | None = None) -> Rows:
        """Return the codes and scales of positions [start, stop): what `extend_quantized` takes.

        Returns:
            A named tuple of key_codes, int8 [n, num_kv_heads, head_dim], key_scales, f32 [n, num_kv_heads],
            value_codes and value_scales; read-only. Views, as `key_codes` is, where the rows lie in memory or in a map;
            elsewhere only these positions are fetched.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
            CacheChangedError: the writer took positions back since the last `refresh`.
            CorruptCacheError: as in `read_keys`.
        """
        version = self._store.version()
        rows = self._store.rows(*self._check_range(start, stop))
        self._store.validate(version)
        return rows

    # Attending

    @overload
    def attend(
        self, queries: Any, *, return_lse: Literal[False] = False, **options: Unpack[AttendOptions]
    ) -> NDArray[np.float32]: ...
    @overload
    def attend(
        self, queries: Any, *, return_lse: Literal[True], **options: Unpack[AttendOptions]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]: ...
    def attend(
        self,
        queries: Any,
        *,
        scale: float | None = None,
        causal: bool = True,
        query_start: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        softcap: float | None = None,
        positions: Any = None,
        out: NDArray[np.float32] | None = None,
        return_lse: bool = False,
        resident: Literal["keep", "stream"] = "keep",
        threads: int | None = None,
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Attend over the stored keys and values where they lie, without expanding them: softmax(q k^T) v, exactly.

        Query head q uses KV head q // (num_q_heads // num_kv_heads) (GQA; Ainslie et al. 2023, arXiv:2305.13245).

        Args:
            queries: [n, num_q_heads, head_dim]; num_q_heads a multiple of num_kv_heads; f32, f16 or bf16, any strides;
                numpy, torch or DLPack on the CPU.
            scale: what q . k is multiplied by; head_dim ** -0.5 by default.
            causal: query i sees no position beyond its own.
            query_start: position of the first query; len(layer) - n by default, where their own keys are stored
                already. At len(layer) or beyond, a query sees the past alone.
            window: see only so many positions up to the query's own, its own included (a sliding window).
            sinks: see so many first positions in spite of the window (Xiao et al. 2023, arXiv:2309.17453).
            softcap: scores s become softcap * tanh(s / softcap).
            positions: see only some: a pair (start, stop), a slice or range, or blocks, int [k] or
                [num_kv_heads, k].
            out: f32 [n, num_q_heads, value_head_dim] to put the result into, C-contiguous; new by default.
            return_lse: give the log-sum-exp of the scores as well, for `merge_attention`.
            resident: "stream" goes through a file larger than memory: stretch by stretch, and what is behind leaves
                this process's memory. "keep" leaves it there, for the next call. Rows in memory stay there.
            threads: at most so many; by default as many as there are processors. Results differ by f32 rounding alone.

        Returns:
            f32 [n, num_q_heads, value_head_dim]; zeros where a query sees nothing. With `return_lse`, (that, f32
            [n, num_q_heads]); natural logarithm, -inf where a query sees nothing.

        Raises:
            EmptyCacheError: nothing is stored.
            ShapeMismatchError, DtypeError: queries, `out` or `positions` don't fit.
            NonFiniteError: a NaN or an infinity in the queries; names query (`position`) and query head.
            PositionOutOfRangeError: `positions` are not all stored, or a negative number.
            CacheChangedError: the writer took positions back since the last `refresh`.
            CorruptCacheError: a block that is seen does not match its checksum (`verify` of `kvmmap.open`).
        """
        if not len(self):
            raise EmptyCacheError(f"nothing is stored{where(self._number())}: push or extend before attending")
        result = attend_store(
            self._store,
            queries,
            block_tokens=self._storage.geometry.block_tokens,
            scale=scale,
            causal=causal,
            query_start=query_start,
            window=window,
            sinks=sinks,
            softcap=softcap,
            positions=positions,
            out=out,
            resident=resident,
            threads=threads,
        )
        return result if return_lse else result[0]

    def select_blocks(
        self, query: Any, k: int, *, scale: float | None = None, per_head: bool = False
    ) -> NDArray[np.int64]:
        """Choose the blocks that a query needs most, for `attend(..., positions=...)`: attention over few of the rows.

        A block's keys are not read. What q . k is at most for any of them follows from the least and the greatest of
        each channel (Quest; Tang et al. 2024, arXiv:2406.10774), which a file keeps of blocks that were flushed. Those
        of other blocks, and of caches in memory or on Zarr, are computed from the keys on first use and kept with the
        handle, in 1/64 of the keys' bytes.

        Each query head spreads one vote over the blocks, by softmax of half its bounds; the k with the most votes are
        chosen. The last block, which holds the most recent positions and may be incomplete, is always among them.

        Args:
            query: [num_q_heads, head_dim]; num_q_heads a multiple of num_kv_heads; f32, f16 or bf16; numpy, torch or
                DLPack on the CPU.
            k: blocks to choose, at least 1; all if there are no more.
            scale: what q . k is multiplied by; head_dim ** -0.5 by default.
            per_head: choose for each KV head its own, by the votes of its query heads.

        Returns:
            Block indices in ascending order, int64 [k], or with `per_head` [num_kv_heads, k].

        Raises:
            EmptyCacheError: nothing is stored.
            ShapeMismatchError, DtypeError: not such a query, or k is not a whole number from 1 on.
            NonFiniteError: a NaN or an infinity in the query; names the query head (`head`).
            CacheChangedError: the writer took positions back since the last `refresh`.
        """
        return select_blocks(self._store, self._storage.geometry.block_tokens, query, k, scale=scale, per_head=per_head)

    # Residency

    def prefetch(self, start: int = 0, stop: int | None = None) -> None:
        """Start reading the rows of positions [start, stop) from the disk or the store, and don't wait for them.

        For rows that will be needed while this process does something else. What goes through a layer in order need
        not call it: reading ahead is done already. Rows in memory are there.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
        """
        self._store.check()
        self._store.prefetch(*self._check_range(start, stop))

    def release(self, start: int = 0, stop: int | None = None) -> None:
        """Give back the memory that the rows of positions [start, stop) of a file take in this process.

        They are read again when they are needed. Other processes keep theirs, and the system what it has read, until
        it needs the room. Views stay valid. Rows in memory, which are nowhere else, stay.

        Raises:
            PositionOutOfRangeError: not all of them are stored.
        """
        self._store.check()
        self._store.release(*self._check_range(start, stop))

    def _dequantize(self, codes: NDArray[np.int8], scales: NDArray[np.float32], version: int) -> NDArray[np.float32]:
        """Dequantise the row or the rows of one position, read since a version."""
        if codes.ndim == 1:
            row: NDArray[np.float32] = self._dequantize(codes[None], scales, version)[0]
            return row
        result = dequantize_rows(codes, scales, threads=1)
        self._store.validate(version)
        return result

    # Checking

    def check_input(self, keys: Any, values: Any) -> RowPair:
        """Return `extend`'s arguments as rows, their shapes checked."""
        return check_pair(keys, values, self._store.geometry, self._number())

    def write_rows(self, start: int, pair: RowPair) -> None:
        """Quantise and write rows at `start`, unpublished; the storage's lock is held."""
        done, count = 0, len(pair.keys)
        while done < count:
            rows = self._store.stage(start + done, count - done)
            stop = done + len(rows.key_codes)
            bad = _core.quantize_rows(pair.keys[done:stop], pair.key_dtype, rows.key_codes, rows.key_scales, 1)
            if bad >= 0:
                raise self._non_finite("keys", start + done, bad)
            bad = _core.quantize_rows(pair.values[done:stop], pair.value_dtype, rows.value_codes, rows.value_scales, 1)
            if bad >= 0:
                raise self._non_finite("values", start + done, bad)
            self._store.write(start + done, rows)
            done = stop

    def _number(self) -> int | None:
        """The layer's index, if there are others to tell it from."""
        return self._store.index if len(self._storage.layers) > 1 else None

    def _non_finite(self, name: str, start: int, row: int) -> NonFiniteError:
        position, head = start + row // self.num_kv_heads, row % self.num_kv_heads
        return NonFiniteError(
            f"{name} hold a NaN or an infinity at position {position}, head {head}{where(self._number())}; nothing was "
            "appended",
            position=position,
            head=head,
            layer=self._store.index,
        )

    def _check_range(self, start: int, stop: int | None) -> tuple[int, int]:
        length = len(self)  # once: another thread may append or truncate
        return check_range(start, length if stop is None else stop, length, layer=self._store.index)

    def _check_position(self, position: int) -> int:
        position = index(position, "position")
        if not 0 <= position < self._store.length:
            raise PositionOutOfRangeError(
                f"position {position} is not stored{where(self._number())}: there are {len(self)}, counted from 0, and "
                "negative ones do not wrap",
                position=position,
                actual=len(self),
                layer=self._store.index,
            )
        return position

    def _check_head(self, head: int) -> int:
        head = index(head, "head")
        if not 0 <= head < self.num_kv_heads:
            raise HeadOutOfRangeError(
                f"head {head} does not exist{where(self._number())}: there are {self.num_kv_heads} KV heads, counted "
                "from 0",
                head=head,
                expected=self.num_kv_heads,
                layer=self._store.index,
            )
        return head
