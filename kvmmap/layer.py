"""One layer's keys and values, and attention over them. Appending is `LayerWriter`'s, and reading `LayerReader`'s.

A layer stands alone in memory, or belongs to a cache; where its slabs lie is its store's business.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NoReturn, Unpack, overload

import numpy as np
from numpy.typing import NDArray

from .attention.run import AttendOptions, Precision, attend_store
from .attention.topk import select_blocks
from .decode_step import DecodeStep
from .errors import EmptyCacheError
from .geometry import CacheGeometry
from .inputs import require_rows, where
from .layer_writer import LayerWriter
from .recent import RecentRows
from .storage.memory import MemoryStorage
from .storage.protocols import LayerStore, Storage
from .storage.refusals import not_pickled
from .storage.sketches import layer_sketches


class QuantizedKvLayer(LayerWriter):
    """Keys and values of one transformer layer, each position and head a row, stored by a codec.

    Args:
        capacity: positions to reserve.
        num_kv_heads: key and value heads.
        head_dim: numbers in a key row.
        value_head_dim: numbers in a value row, `head_dim` unless given.
        key_codec, value_codec: names of the codecs of keys and of values; the preset's unless given.
        preset: a pair of codecs, as in `kvmmap.create`: "int8" has one f32 scale per position and head.
        recent_window, sinks: last and first positions to keep in 16 bits besides, 0 to 65,536; the preset's unless
            given.

    Made like this it lies in memory and stands alone; `cache.layers[i]` is one that belongs to a cache. A layer may
    be appended to on its own: the step is part of the cache once it has reached every layer.

    Raises:
        ShapeMismatchError: a number that is not a whole one, or out of bounds.
        DtypeError: there is no such codec, or no such preset.
    """

    __slots__ = ()

    def __init__(
        self,
        capacity: int,
        num_kv_heads: int,
        head_dim: int,
        value_head_dim: int | None = None,
        *,
        key_codec: str | None = None,
        value_codec: str | None = None,
        preset: str = "int8",
        recent_window: int | None = None,
        sinks: int | None = None,
    ) -> None:
        geometry = CacheGeometry.of_preset(
            preset,
            num_layers=1,
            capacity=capacity,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            key_codec=key_codec,
            value_codec=value_codec,
            recent_window=recent_window,
            sinks=sinks,
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
        chunk: RecentRows | None = None,
        precision: Precision = "queries",
    ) -> NDArray[np.float32] | tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Compute exact attention, softmax(q k^T) v, over the stored keys and values without expanding them.

        Query head q uses KV head q // (num_q_heads // num_kv_heads) (GQA; Ainslie et al. 2023, arXiv:2305.13245).

        Args:
            queries: [n, num_q_heads, head_dim]; num_q_heads a multiple of num_kv_heads; f32, f16 or bf16, any strides;
                numpy, torch or DLPack on the CPU.
            scale: factor of q . k; head_dim ** -0.5 by default.
            causal: a query attends to no position after its own.
            query_start: position of the first query. The default, len(layer) - n, is right where the queries' own keys
                are stored already. From len(layer) on, queries attend to earlier positions only.
            window: attend only to this many positions up to and including the query's own (a sliding window).
            sinks: attend to this many first positions whatever the window (Xiao et al. 2023, arXiv:2309.17453).
            softcap: scores s become softcap * tanh(s / softcap).
            positions: attend only to these: a pair (start, stop), a slice or range, or blocks, int [k] or
                [num_kv_heads, k].
            out: f32 [n, num_q_heads, value_head_dim] to put the result into, C-contiguous; new by default.
            return_lse: also return the log-sum-exp of the scores, for `merge_attention`.
            resident: "stream" reads a file larger than memory: range by range, releasing the memory of each range
                after use. "keep" leaves rows in memory, for the next call. Has no effect on a cache in memory.
            threads: the most threads to use; by default those of KVMMAP_NUM_THREADS, or all processors. Results differ
                only by f32 rounding.
            chunk: what `chunk_rows` has returned of the queries' own positions. With a recent window, each query then
                sees the last positions before itself in 16 bits. Without it, those that the window still has: of a
                chunk longer than the window, only the last queries see them.
            precision: "queries" computes with the precision of the queries' dtype: f32 queries lose about 2e-7 of the
                largest number of the result, f16 and bf16 ones less than rounding them to 16 bits has lost. "exact"
                computes as for f32 queries, whatever the dtype; for 16 bits that takes up to half as long again.

        Returns:
            f32 [n, num_q_heads, value_head_dim]; zeros where a query attends to nothing. With `return_lse`, (that, f32
            [n, num_q_heads]); natural logarithm, -inf where a query attends to nothing.

        Raises:
            EmptyCacheError: nothing is stored.
            ShapeMismatchError, DtypeError: queries, `out` or `positions` don't fit.
            NonFiniteError: a NaN or an infinity in the queries; names query (`position`) and query head.
            PositionOutOfRangeError: `positions` are not all stored, or a negative number.
            CacheChangedError: the writer truncated since the last `refresh`.
            CorruptCacheError: a block that is attended to does not match its checksum (`verify` of `kvmmap.open`).
        """
        if not self._has_rows:
            require_rows(self._store.geometry, self._label)
        if not self._store.length:
            raise EmptyCacheError(f"nothing is stored{where(self._label)}: push or extend before attending")
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
            chunk=chunk,
            precision=precision,
        )
        return result if return_lse else result[0]

    def decode_step(self, tensor: type, dtypes: tuple[Any, Any, Any]) -> DecodeStep | None:
        """Return a shorter way for the steps of a model that decodes, or None where there is none: in memory, on Zarr,
        in a library's segment, with codecs that are not compiled, or where the layer can't be appended to.

        Args:
            tensor: the class of the tensors.
            dtypes: what these have as `dtype` for f32, f16 and bf16.
        """
        step = self._store.make_step(tensor, dtypes) if self._has_rows else None
        return None if step is None else DecodeStep(self._storage, self._store, step)

    def select_blocks(
        self, query: Any, k: int, *, scale: float | None = None, per_head: bool = False
    ) -> NDArray[np.int64]:
        """Select the blocks with the highest bounds on attention scores, for `attend(..., positions=...)`.

        Keys of a block are not read. An upper bound of q . k follows from the minimum and maximum of each channel
        (Quest; Tang et al. 2024, arXiv:2406.10774), which a file stores for flushed blocks. For other blocks, and for
        caches in memory or on Zarr, they are computed from the keys on first use and kept with the handle, in 1/64 of
        the keys' bytes.

        Each query head spreads one vote over the blocks, by softmax of half its bounds; the k with the most votes are
        chosen. The last block, which holds the most recent positions and may be incomplete, is always among them.

        Args:
            query: [num_q_heads, head_dim]; num_q_heads a multiple of num_kv_heads; f32, f16 or bf16; numpy, torch or
                DLPack on the CPU.
            k: blocks to select, at least 1; all blocks if there are fewer.
            scale: factor of q . k; head_dim ** -0.5 by default.
            per_head: select blocks for each KV head separately, by the votes of its query heads.

        Returns:
            Block indices in ascending order, int64 [k], or with `per_head` [num_kv_heads, k].

        Raises:
            EmptyCacheError: nothing is stored.
            ShapeMismatchError, DtypeError: not such a query, or k is not a whole number from 1 on.
            NonFiniteError: a NaN or an infinity in the query; names the query head (`head`).
            CacheChangedError: the writer truncated since the last `refresh`.
        """
        if not self._has_rows:
            require_rows(self._store.geometry, self._label)
        sketches = functools.partial(layer_sketches, self._store)
        block_tokens = self._storage.geometry.block_tokens
        return select_blocks(self._store, sketches, block_tokens, query, k, scale=scale, per_head=per_head)
