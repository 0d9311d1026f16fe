"""Attention over rows in memory: by the compiled kernel of the codecs that they are stored by, or by decoding them.

What lives here: which way is taken. What does not: where the rows lie (they come as arrays), which of them are needed,
and the arithmetic.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..codecs import COMPILED, INT8, RowCodec
from ..errors import NonFiniteError
from ..geometry import LayerGeometry
from ..recent import RecentView
from ..rows import Rows
from .decoding import attend_decoded
from .mask import Mask
from .merge import Merging
from .source import Unread

_F32 = np.dtype(np.float32)

_BLOCK_DIFFERS = -2
"""What a kernel returns where an unread block does not match its checksum."""

_BLOCKS_MATCH = -3
"""What a kernel returns where all unread blocks match, and it has not noted that."""

Kernel = Callable[..., int]
"""A function with the arguments of `_core.attend`."""


def _kernel(keys: RowCodec, values: RowCodec) -> Kernel:
    """Return the compiled kernel of a pair; that of int8 as it is, whose calls count where rows are few."""
    if keys is INT8 and values is INT8:
        return _core.attend  # whose default they are
    return functools.partial(_core.attend, codecs=(keys.id, keys.transform, values.id, values.transform))


KERNELS: dict[tuple[RowCodec, RowCodec], Kernel] = {
    (keys, values): _kernel(keys, values) for keys in COMPILED for values in COMPILED
}
"""The compiled kernel for keys of one codec and values of another. Other pairs are decoded piece by piece."""


def hashes_blocks(geometry: LayerGeometry) -> bool:
    """True if attention over such rows can compute the checksums of blocks as it reads them."""
    return (geometry.key_codec, geometry.value_codec) in KERNELS


def attend_rows(
    queries: NDArray[Any],
    dtype: int,
    rows: Rows,
    ranges: NDArray[np.int64],
    mask: Mask,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    *,
    first_position: int = 0,
    threads: int = 1,
    layer: int | None = None,
    recent: RecentView | None = None,
    exact: bool = False,
    unread: Sequence[Unread | None] = (),
) -> NDArray[np.float32]:
    """Attend over rows that lie in memory.

    Args:
        queries: as `check_queries` returns them.
        dtype: their dtype's number.
        rows: those of consecutive positions, C-contiguous. What the ranges
            don't name is not touched.
        ranges: as `check_positions` returns them, counted from the first of the rows.
        mask: what each query sees.
        geometry: the layer's.
        out: f32 [n, num_q_heads, value_head_dim], C-contiguous; the result goes there.
        first_position: the position of the first of the rows.
        threads: at most so many; no more are started than the rows keep busy.
        layer: its index, for messages.
        recent: rows in 16 bits that stand for some of the coded ones, if the layer keeps them.
        exact: with the arithmetic of f32 queries, whatever the dtype of these.
        unread: blocks whose checksums are compared meanwhile, where `hashes_blocks`.

    Returns:
        The log-sum-exp of the scores, f32 [n, num_q_heads].

    Raises:
        NonFiniteError: the queries hold a NaN or an infinity.
        CorruptCacheError, CacheChangedError: an unread block does not match its checksum. `out` holds anything then.
    """
    n, q_heads, _ = queries.shape
    lse = np.empty((n, q_heads), _F32)
    kernel = KERNELS.get((geometry.key_codec, geometry.value_codec))
    if kernel is None:
        bad = attend_decoded(
            queries, rows, ranges, mask, geometry, out, lse, first_position=first_position, recent=recent
        )
    else:
        bad = _call(
            kernel,
            queries,
            dtype,
            rows,
            ranges,
            mask,
            geometry,
            out,
            lse,
            first_position,
            threads,
            recent,
            exact,
            unread,
        )
    if bad >= 0:
        raise _non_finite(bad, q_heads, layer)
    return lse


def attend_extents(
    queries: NDArray[Any],
    dtype: int,
    extents: Sequence[tuple[int, Rows]],
    ranges: NDArray[np.int64],
    mask: Mask,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    *,
    threads: int = 1,
    layer: int | None = None,
    recent: RecentView | None = None,
    exact: bool = False,
    unread: Sequence[Unread | None] = (),
) -> NDArray[np.float32]:
    """As `attend_rows`, over rows that lie in memory in several extents.

    Args:
        extents: (first position, rows), in order, from position 0 on; each has the rows up to the next one's first, and
            may have more. The last one has all that follow.
        unread: an entry for each of them, or none at all.
    """
    n, q_heads, _ = queries.shape
    lse = np.empty((n, q_heads), _F32)
    kernel = KERNELS.get((geometry.key_codec, geometry.value_codec))
    if kernel is not None:
        bad = _call(
            kernel, queries, dtype, tuple(extents), ranges, mask, geometry, out, lse, 0, threads, recent, exact, unread
        )
        if bad >= 0:
            raise _non_finite(bad, q_heads, layer)
        return lse
    merging, part = Merging(out.shape), np.empty_like(out)
    edges = [*(start for start, _ in extents[1:]), int(ranges[:, 3].max(initial=0))]
    for (start, rows), stop in zip(extents, edges, strict=True):
        mine = ranges.copy()
        mine[:, 2:] = np.clip(mine[:, 2:], start, max(start, stop)) - start
        mine = mine[mine[:, 2] < mine[:, 3]]
        bad = attend_decoded(queries, rows, mine, mask, geometry, part, lse, first_position=start, recent=recent)
        if bad >= 0:
            raise _non_finite(bad, q_heads, layer)
        merging.add(part, lse)
    return merging.end(out)


def _call(
    kernel: Kernel,
    queries: NDArray[Any],
    dtype: int,
    rows: tuple[Any, ...],
    ranges: NDArray[np.int64],
    mask: Mask,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    first_position: int,
    threads: int,
    recent: RecentView | None,
    exact: bool,
    unread: Sequence[Unread | None],
) -> int:
    scale, causal, query_start, window, sinks, softcap = mask
    arguments = (
        queries,
        dtype,
        rows,
        geometry.num_kv_heads,
        geometry.value_head_dim,
        first_position,
        ranges,
        geometry.head_dim**-0.5 if scale is None else scale,
        softcap or 0.0,
        query_start,
        causal,
        window or 0,
        sinks,
        out,
        lse,
        threads,
    )
    if recent is None and not unread:
        return kernel(*arguments, exact=exact)
    more: dict[str, Any] = {}
    if recent is not None:
        more["recent"] = recent.rows.arguments(recent.length)
    if not unread:
        return kernel(*arguments, exact=exact, **more)
    of_extents = tuple([None if some is None else some.arguments for some in unread])
    bad = kernel(*arguments, exact=exact, unread=of_extents, **more)
    if bad == _BLOCK_DIFFERS:
        for some in unread:
            if some is not None:
                some.verify(threads)
        return kernel(*arguments, exact=exact, **more)  # it was right when it was read again
    if bad == _BLOCKS_MATCH:
        for some in unread:
            if some is not None:
                some.note()
        return -1
    return bad


def _non_finite(bad: int, q_heads: int, layer: int | None) -> NonFiniteError:
    query, head = divmod(bad, q_heads)
    return NonFiniteError(
        f"queries hold a NaN or an infinity at query {query}, head {head}",
        position=query,
        head=head,
        layer=layer,
    )
