"""Attention over quantised rows: arguments checked, the compiled kernels called, partial results merged.

What lives here: shapes, dtypes and ranges, and errors in words. What does not: where the rows lie (they come as
arrays), and the arithmetic, which is `_core`'s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..arrays import as_numpy
from ..errors import DtypeError, NonFiniteError, PositionOutOfRangeError, ShapeMismatchError
from ..geometry import LayerGeometry, check_range, index
from ..quantize import as_rows

_F32 = np.dtype(np.float32)


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


class Sight(NamedTuple):
    """Which positions a query sees, and how scores become weights."""

    scale: float | None = None
    """What q . k is multiplied by; head_dim ** -0.5 if None."""

    causal: bool = True
    """Not beyond the query's own position."""

    query_start: int = 0
    """Position of the first query."""

    window: int | None = None
    """Positions that are seen, up to the query's own; all if None."""

    sinks: int = 0
    """Positions from 0 that are seen in spite of the window."""

    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""


def check_queries(queries: Any, geometry: LayerGeometry) -> tuple[NDArray[Any], int]:
    """Return queries as the kernels take them, [n, num_q_heads, head_dim], with their dtype's number.

    Raises:
        DtypeError, ShapeMismatchError: they are not such numbers.
    """
    rows, dtype = as_rows(queries)
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    if rows.ndim != 3 or rows.shape[2] != dim or rows.shape[1] == 0 or rows.shape[1] % heads:
        raise ShapeMismatchError(
            f"queries must be [n, num_q_heads, {dim}] with num_q_heads a multiple of the {heads} KV heads, not "
            f"{list(rows.shape)}",
            expected=("n", f"k * {heads}", dim),
            actual=rows.shape,
        )
    return rows, dtype


def check_sight(
    *,
    scale: float | None,
    causal: bool,
    query_start: int,
    window: int | None,
    sinks: int,
    softcap: float | None,
) -> Sight:
    """Return the arguments of `attend` that say what is seen, if they make sense."""
    query_start = index(query_start, "query_start")
    sinks = index(sinks, "sinks")
    if query_start < 0 or sinks < 0:
        raise PositionOutOfRangeError(
            f"query_start and sinks must not be negative: they are {query_start} and {sinks}",
            position=min(query_start, sinks),
        )
    if window is not None and (window := index(window, "window")) < 1:
        raise PositionOutOfRangeError(f"window must be at least 1 position, or None, not {window}", position=window)
    for name, number, low in (("scale", scale, -math.inf), ("softcap", softcap, 0.0)):
        if number is not None and not (math.isfinite(number) and number > low):
            raise ValueError(f"{name} must be a finite number{' above 0' if low == 0 else ''}, not {number!r}")
    return Sight(scale, bool(causal), query_start, window, sinks, softcap)


def check_positions(positions: Any, length: int, block_tokens: int, num_kv_heads: int) -> NDArray[np.int64]:
    """Return a selection of positions as ranges, int64 [r, 4]: first head, one past the last, start, stop.

    Args:
        positions: None (all), a pair (start, stop), a slice or range of step 1, or whole numbers of blocks, [k] or
            [num_kv_heads, k].
        length: positions stored.
        block_tokens: positions in a block.
        num_kv_heads: KV heads.

    Raises:
        PositionOutOfRangeError: not all of them are stored.
        ShapeMismatchError, DtypeError: not such a selection.
    """
    if positions is None:
        return np.array([[0, num_kv_heads, 0, length]], np.int64)
    if isinstance(positions, slice | range) and positions.step not in (None, 1):
        raise ShapeMismatchError(
            f"positions must have a step of 1, not {positions.step}", expected=1, actual=positions.step
        )
    if isinstance(positions, slice):
        positions = (positions.start or 0, length if positions.stop is None else positions.stop)
    elif isinstance(positions, range):
        positions = (positions.start, max(positions.start, positions.stop))
    if isinstance(positions, tuple):
        if len(positions) != 2:
            raise ShapeMismatchError("positions must be a pair (start, stop)", expected=2, actual=len(positions))
        start, stop = check_range(positions[0], positions[1], length)
        return np.array([[0, num_kv_heads, start, stop]], np.int64)
    return _block_ranges(positions, length, block_tokens, num_kv_heads)


def _block_ranges(blocks: Any, length: int, block_tokens: int, num_kv_heads: int) -> NDArray[np.int64]:
    array = as_numpy(blocks, "blocks")
    if array.size == 0:
        return np.empty((0, 4), np.int64)
    if array.dtype.kind not in "iu":
        raise DtypeError(f"blocks must be whole numbers, not {array.dtype}", expected="int64", actual=str(array.dtype))
    if array.ndim not in (1, 2) or (array.ndim == 2 and len(array) != num_kv_heads):
        raise ShapeMismatchError(
            f"blocks must be [k], or [{num_kv_heads}, k] for each KV head its own, not {list(array.shape)}",
            expected=("k", (num_kv_heads, "k")),
            actual=array.shape,
        )
    num_blocks = -(-length // block_tokens)
    if array.min() < 0 or array.max() >= num_blocks:
        bad = int(array.min() if array.min() < 0 else array.max())
        raise PositionOutOfRangeError(
            f"block {bad} does not exist: {length} positions make {num_blocks} blocks, counted from 0",
            position=bad * block_tokens,
            actual=length,
        )
    rows = [(0, num_kv_heads, array)] if array.ndim == 1 else [(h, h + 1, row) for h, row in enumerate(array)]
    ranges = []
    for head, head_end, row in rows:
        # A block named twice counts once, and neighbours are one stretch.
        unique = np.unique(row)
        breaks = np.flatnonzero(np.diff(unique) != 1) + 1
        for stretch in np.split(unique, breaks):
            stop = min((int(stretch[-1]) + 1) * block_tokens, length)
            ranges.append((head, head_end, int(stretch[0]) * block_tokens, stop))
    return np.array(ranges, np.int64)


def visible_ranges(ranges: NDArray[np.int64], sight: Sight, n: int) -> list[tuple[int, int]]:
    """Return the stretches [start, stop) of positions that some of `n` queries sees, in order, with gaps between.

    Args:
        ranges: as `check_positions` returns them.
        sight: what each query sees.
        n: queries.
    """
    end = sight.query_start + n if sight.causal else int(ranges[:, 3].max(initial=0))
    begin = 0 if sight.window is None else max(0, sight.query_start - sight.window + 1)
    stretches: list[tuple[int, int]] = []
    for start, stop in sorted({(int(start), min(int(stop), end)) for start, stop in ranges[:, 2:]}):
        for low, high in ((start, min(stop, sight.sinks, begin)), (max(start, begin), stop)):
            if low < high and stretches and low <= stretches[-1][1]:
                stretches[-1] = stretches[-1][0], max(stretches[-1][1], high)
            elif low < high:
                stretches.append((low, high))
    return stretches


def attend_rows(
    queries: NDArray[Any],
    dtype: int,
    rows: tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]],
    ranges: NDArray[np.int64],
    sight: Sight,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    *,
    first_position: int = 0,
    threads: int = 1,
    layer: int | None = None,
) -> NDArray[np.float32]:
    """Attend over rows that lie in memory.

    Args:
        queries: as `check_queries` returns them.
        dtype: their dtype's number.
        rows: key codes, key scales, value codes, value scales of consecutive positions, C-contiguous. What the ranges
            don't name is not touched.
        ranges: as `check_positions` returns them, counted from the first of the rows.
        sight: what each query sees.
        geometry: the layer's.
        out: f32 [n, num_q_heads, value_head_dim], C-contiguous; the result goes there.
        first_position: the position of the first of the rows.
        threads: at most so many; no more are started than the rows keep busy.
        layer: its index, for messages.

    Returns:
        The log-sum-exp of the scores, f32 [n, num_q_heads].
    """
    n, q_heads, dim = queries.shape
    lse = np.empty((n, q_heads), _F32)
    bad = _core.attend(
        queries,
        dtype,
        rows,
        geometry.num_kv_heads,
        geometry.value_head_dim,
        first_position,
        ranges,
        dim**-0.5 if sight.scale is None else sight.scale,
        sight.softcap or 0.0,
        sight.query_start,
        sight.causal,
        sight.window or 0,
        sight.sinks,
        out,
        lse,
        threads,
    )
    if bad >= 0:
        query, head = divmod(bad, q_heads)
        raise NonFiniteError(
            f"queries hold a NaN or an infinity at query {query}, head {head}",
            position=query,
            head=head,
            layer=layer,
        )
    return lse


def merge_attention(
    outputs: Sequence[NDArray[np.float32]], lses: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Combine attention over disjoint sets of keys into attention over all of them, exactly.

        lse = log(sum_i e^lse_i),   out = sum_i e^(lse_i - lse) * out_i

    (Flash-Decoding; Dao et al. 2023.) The parts may come from different caches, such as a shared prefix and a private
    tail, or from other code that gives its log-sum-exp.

    Args:
        outputs: a part each, f32 [..., value_head_dim], all of one shape.
        lses: the parts' log-sum-exp, f32 [...], natural logarithm; -inf where a part saw nothing.

    Returns:
        out, f32 [..., value_head_dim], and lse, f32 [...]; zeros and -inf where no part saw anything.

    Raises:
        ShapeMismatchError: there are no parts, or their shapes differ.
        DtypeError: a part is no array whose values lie in plain memory (a masked array, a functional tensor).
    """
    if not outputs or len(outputs) != len(lses):
        raise ShapeMismatchError(
            f"give at least one output, and as many lses: there are {len(outputs)} and {len(lses)}",
            expected=len(outputs),
            actual=len(lses),
        )
    outputs = [as_numpy(output, "outputs") for output in outputs]
    lses = [as_numpy(lse, "lses") for lse in lses]
    shape = outputs[0].shape
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != shape or lse.shape != shape[:-1]:
            raise ShapeMismatchError(
                f"all outputs must be {list(shape)} and all lses {list(shape[:-1])}; one pair is "
                f"{list(output.shape)} and {list(lse.shape)}",
                expected=shape,
                actual=output.shape,
            )
    merging = Merging(shape)
    for output, lse in zip(outputs, lses, strict=True):
        merging.add(output, lse)
    result = np.empty(shape, _F32)
    return result, merging.end(result)


class Merging:
    """What `merge_attention` does, part by part: as much memory for any number of parts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = shape[:-1]
        # What lies where in it, `_core` knows; it begins with the largest lse so far.
        self._state = np.zeros((*shape[:-1], 2 + shape[-1]))
        self._state[..., 0] = -np.inf

    def add(self, output: NDArray[np.float32], lse: NDArray[np.float32]) -> None:
        """Take a part in."""
        _core.merge_part(self._state, np.ascontiguousarray(output, _F32), np.ascontiguousarray(lse, _F32))

    def end(self, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put what comes of all parts so far into `out`, C-contiguous, and return the lse."""
        lse = np.empty(self._rows, _F32)
        _core.merge_end(self._state, out, lse)
        return lse
