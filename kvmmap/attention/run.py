"""Attention over one layer's rows, wherever they lie: which of them are needed, taken piece by piece, and merged.

What lives here: the way from a selection of positions to the pieces of a store. What does not: the arithmetic, and what
kind of store it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..errors import KvmmapError
from ..quantize import output_array, thread_count
from ..storage.protocols import LayerStore, Rows
from .kernel import (
    Merging,
    Sight,
    attend_rows,
    check_positions,
    check_queries,
    check_sight,
    visible_ranges,
)

Attended = tuple[NDArray[np.float32], NDArray[np.float32]]
"""out, f32 [n, num_q_heads, value_head_dim], and lse, f32 [n, num_q_heads]."""


def attend_store(
    store: LayerStore,
    queries: Any,
    *,
    block_tokens: int,
    scale: float | None,
    causal: bool,
    query_start: int | None,
    window: int | None,
    sinks: int,
    softcap: float | None,
    positions: Any,
    out: NDArray[np.float32] | None,
    resident: Literal["keep", "stream"],
    threads: int | None,
) -> Attended:
    """Attend over what a store holds; arguments and errors are those of `QuantizedKvLayer.attend`."""
    if resident not in ("keep", "stream"):
        raise KvmmapError(f'resident must be "keep" or "stream", not {resident!r}')
    version = store.version()  # before the length: see `LayerStore`
    geometry, length = store.geometry, store.length
    rows, dtype = check_queries(queries, geometry)
    sight = check_sight(
        scale=scale,
        causal=causal,
        query_start=max(0, length - len(rows)) if query_start is None else query_start,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    ranges = check_positions(positions, length, block_tokens, geometry.num_kv_heads)
    result = output_array((*rows.shape[:2], geometry.value_head_dim), "float32", out)
    most = thread_count(threads, length * geometry.position_bytes)
    if store.in_memory and resident == "keep":
        if not store.is_verified(length):
            seen = visible_ranges(ranges, sight, len(rows)) if len(ranges) == 1 else ranges[:, 2:]
            store.ensure_verified(np.array(seen, np.int64).reshape(-1, 2))
        slabs = store.slabs()
        lse = attend_rows(rows, dtype, slabs, ranges, sight, geometry, result, threads=most, layer=store.index)
    else:
        merging, part = Merging(result.shape), np.empty_like(result)
        for start, piece in _pieces(store, ranges, sight, len(rows), resident):
            mine = _within(ranges, start, start + len(piece.key_codes))
            lse = attend_rows(
                rows,
                dtype,
                piece,
                mine,
                sight,
                geometry,
                part,
                first_position=start,
                threads=most,
                layer=store.index,
            )
            merging.add(part, lse)
        lse = merging.end(result)
    store.validate(version)  # the rows were still the cache's when they had been read
    return result, lse


def _pieces(
    store: LayerStore, ranges: NDArray[np.int64], sight: Sight, n: int, resident: Literal["keep", "stream"]
) -> Iterator[tuple[int, Rows]]:
    """Yield (first position, rows) of what the queries need; at least one piece, if an empty one."""
    found = False
    for start, stop in visible_ranges(ranges, sight, n):
        for piece in store.scan(start, stop) if resident == "stream" else store.iter_rows(start, stop):
            yield start, piece
            start += len(piece.key_codes)
            found = True
    if not found:
        yield 0, store.rows(0, 0)


def _within(ranges: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Ranges cut to positions [start, stop), counted from there."""
    cut = ranges.copy()
    cut[:, 2:] = np.clip(cut[:, 2:], start, stop) - start
    return cut[cut[:, 2] < cut[:, 3]]
