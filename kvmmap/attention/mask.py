"""Which positions a query attends to: causal order, windows, sinks and selections; as ranges, or as a mask.

What lives here: `Mask` and the checks of what callers say. What does not: scores, and where rows lie.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..arrays import as_numpy
from ..errors import DtypeError, PositionOutOfRangeError, ShapeMismatchError
from ..ranges import check_range, index

_BEYOND = 1 << 48
"""A position after all that a cache can hold."""


class Mask(NamedTuple):
    """Which positions a query attends to, and how scores become weights."""

    scale: float | None = None
    """Factor of q . k; head_dim ** -0.5 if None."""

    causal: bool = True
    """A query attends to no position after its own."""

    query_start: int = 0
    """Position of the first query."""

    window: int | None = None
    """Positions attended to, up to and including the query's own; all if None."""

    sinks: int = 0
    """First positions, attended to whatever the window."""

    softcap: float | None = None
    """Scores s become softcap * tanh(s / softcap)."""

    def visible(self, queries: int, start: int, stop: int) -> NDArray[np.bool_]:
        """Return which of positions [start, stop) each of the first `queries` queries sees, [queries, stop - start]."""
        at = self.query_start + np.arange(queries)[:, None]
        positions = np.arange(start, stop)[None, :]
        seen = np.ones((queries, stop - start), bool)
        if self.window is not None:
            seen &= (positions > at - self.window) | (positions < self.sinks)
        if self.causal:
            seen &= positions <= at
        return seen


def check_mask(
    *,
    scale: float | None,
    causal: bool,
    query_start: int,
    window: int | None,
    sinks: int,
    softcap: float | None,
) -> Mask:
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
    if scale is not None and not _is_finite(scale):
        raise ShapeMismatchError(f"scale must be a finite number, not {scale!r:.40}", expected="float", actual=scale)
    if softcap is not None and not (_is_finite(softcap) and softcap > 0):
        raise ShapeMismatchError(
            f"softcap must be a finite number above 0, not {softcap!r:.40}", expected="float", actual=softcap
        )
    query_start, sinks = min(query_start, _BEYOND), min(sinks, _BEYOND)  # numbers that the compiled core takes
    return Mask(scale, bool(causal), query_start, window and min(window, _BEYOND), sinks, softcap)


def _is_finite(value: object) -> bool:
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):  # no number, or one that no float holds
        return False


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
        # A block named twice counts once, and neighbours are one range.
        unique = np.unique(row)
        breaks = np.flatnonzero(np.diff(unique) != 1) + 1
        for run in np.split(unique, breaks):
            stop = min((int(run[-1]) + 1) * block_tokens, length)
            ranges.append((head, head_end, int(run[0]) * block_tokens, stop))
    return np.array(ranges, np.int64)


def visible_ranges(ranges: NDArray[np.int64], mask: Mask, n: int) -> list[tuple[int, int]]:
    """Return the ranges [start, stop) of positions that some of `n` queries sees, in order, with gaps between.

    Args:
        ranges: as `check_positions` returns them.
        mask: what each query sees.
        n: queries.
    """
    if mask.window is None and len(ranges) == 1:  # the usual case
        ((_, _, start, stop),) = ranges.tolist()
        if mask.causal:
            stop = min(stop, mask.query_start + n)
        return [(start, stop)] if start < stop else []
    end = mask.query_start + n if mask.causal else int(ranges[:, 3].max(initial=0))
    begin = 0 if mask.window is None else max(0, mask.query_start - mask.window + 1)
    seen: list[tuple[int, int]] = []
    for start, stop in sorted({(start, min(stop, end)) for start, stop in ranges[:, 2:].tolist()}):
        for low, high in ((start, min(stop, mask.sinks, begin)), (max(start, begin), stop)):
            if low < high and seen and low <= seen[-1][1]:
                seen[-1] = seen[-1][0], max(seen[-1][1], high)
            elif low < high:
                seen.append((low, high))
    return seen
