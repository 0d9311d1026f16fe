"""Attention over one layer's store: selects the rows that are needed, attends to them part by part, and merges.

What lives here: from a selection of positions to rows of a store. What does not: the arithmetic, and what
kind of store it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import DtypeError, KvmmapError
from ..recent import RecentRows, RecentView
from ..row_arrays import output_array
from ..rows import Rows
from ..threads import thread_count
from .kernel import attend_extents, attend_rows, hashes_blocks
from .mask import Mask, check_mask, check_positions, visible_ranges
from .merge import Merging
from .queries import check_queries
from .source import RowSource

Precision = Literal["queries", "exact"]
"""Which arithmetic attention computes with: that of the queries' dtype, or that of f32 whatever their dtype."""

Attended = tuple[NDArray[np.float32], NDArray[np.float32]]
"""out, f32 [n, num_q_heads, value_head_dim], and lse, f32 [n, num_q_heads]."""


class AttendOptions(TypedDict, total=False):
    """Keyword arguments of `QuantizedKvLayer.attend`, but for `return_lse`: for type checkers."""

    scale: float | None
    causal: bool
    query_start: int | None
    window: int | None
    sinks: int
    softcap: float | None
    positions: Any
    out: NDArray[np.float32] | None
    resident: Literal["keep", "stream"]
    threads: int | None
    chunk: RecentRows | None
    precision: Precision


def attend_store(
    store: RowSource,
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
    chunk: RecentRows | None = None,
    precision: Precision = "queries",
) -> Attended:
    """Attend over what a store holds; arguments and errors are those of `QuantizedKvLayer.attend`."""
    if resident not in ("keep", "stream"):
        raise KvmmapError(f'resident must be "keep" or "stream", not {resident!r}')
    if precision not in ("queries", "exact"):
        raise KvmmapError(f'precision must be "queries" or "exact", not {precision!r}')
    if chunk is not None and not isinstance(chunk, RecentRows):
        raise DtypeError(f"chunk must be what chunk_rows() has returned, not {type(chunk).__name__}")
    version = store.version()  # before the length: see `LayerStore`
    geometry, length = store.geometry, store.length
    rows, dtype = check_queries(queries, geometry)
    mask = check_mask(
        scale=scale,
        causal=causal,
        query_start=max(0, length - len(rows)) if query_start is None else query_start,
        window=window,
        sinks=sinks,
        softcap=softcap,
    )
    ranges = check_positions(positions, length, block_tokens, geometry.num_kv_heads)
    wanted = result = output_array((*rows.shape[:2], geometry.value_head_dim), "float32", out)
    kept = store.recent_rows() if chunk is None else chunk
    options: dict[str, Any] = {
        "threads": thread_count(threads, length * geometry.position_bytes),
        "layer": store.index,
        "recent": None if kept is None else RecentView(kept, length),
        "exact": precision == "exact",
    }
    if resident == "keep" and (store.in_memory or store.in_extents):
        if not store.is_verified(length):
            seen = visible_ranges(ranges, mask, len(rows)) if len(ranges) == 1 else ranges[:, 2:]
            if hashes_blocks(geometry):
                options["unread"] = store.unread_blocks(seen)
                if out is not None:
                    result = np.empty_like(wanted)  # what comes of damaged rows reaches nobody
            else:
                store.ensure_verified(np.array(seen, np.int64).reshape(-1, 2), options["threads"])
        if store.in_memory:
            lse = attend_rows(rows, dtype, store.slabs(), ranges, mask, geometry, result, **options)
        else:
            lse = attend_extents(rows, dtype, store.extents(), ranges, mask, geometry, result, **options)
        if result is not wanted:
            wanted[...] = result
    else:
        merging, part = Merging(result.shape), np.empty_like(result)
        for start, piece in _pieces(store, ranges, mask, len(rows), resident):
            mine = _within(ranges, start, start + len(piece[0]))
            lse = attend_rows(rows, dtype, piece, mine, mask, geometry, part, first_position=start, **options)
            merging.add(part, lse)
        lse = merging.end(result)
    store.validate(version)  # the rows were still the cache's when they had been read
    return wanted, lse


def _pieces(
    store: RowSource, ranges: NDArray[np.int64], mask: Mask, n: int, resident: Literal["keep", "stream"]
) -> Iterator[tuple[int, Rows]]:
    """Yield (first position, rows) of what the queries need; at least one piece, if an empty one."""
    found = False
    for start, stop in visible_ranges(ranges, mask, n):
        for piece in store.scan(start, stop) if resident == "stream" else store.iter_rows(start, stop):
            yield start, piece
            start += len(piece[0])
            found = True
    if not found:
        yield 0, store.rows(0, 0)


def _within(ranges: NDArray[np.int64], start: int, stop: int) -> NDArray[np.int64]:
    """Ranges cut to positions [start, stop), counted from there."""
    cut = ranges.copy()
    cut[:, 2:] = np.clip(cut[:, 2:], start, stop) - start
    return cut[cut[:, 2] < cut[:, 3]]
