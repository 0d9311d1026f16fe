"""Attention over rows of any codec: decoded piece by piece, scored in f32, merged in f64. Plain numpy, and slow.

For codecs that have no compiled kernel. It gives what the kernels give, up to f32 rounding.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..geometry import LayerGeometry
from ..recent import RecentView
from ..row_arrays import widened
from ..rows import Rows
from .mask import Mask
from .merge import Merging

LARGEST = float(np.finfo(np.float32).max)
MOST_SCORE = LARGEST * math.log(2) / 4
"""Scores beyond it count as this, as in the kernels: the difference of two must be a number."""

PIECE_NUMBERS = 1 << 20
"""Numbers of keys and values that are decoded at a time."""


def attend_decoded(
    queries: NDArray[Any],
    rows: Rows,
    ranges: NDArray[np.int64],
    mask: Mask,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
    *,
    first_position: int,
    recent: RecentView | None = None,
) -> int:
    """Attend as the compiled kernels do.

    Args:
        queries: [n, num_q_heads, head_dim], as `check_queries` returns them.
        rows: those of consecutive positions.
        ranges: int64 [r, 4]: first head, one past the last, start, stop, counted from the first of the rows.
        mask: what each query sees.
        geometry: the layer's.
        out: f32 [n, num_q_heads, value_head_dim]; the result goes there.
        lse: f32 [n, num_q_heads]; its log-sum-exp goes there.
        first_position: the position of the first of the rows.
        recent: rows in 16 bits that stand for some of the others.

    Returns:
        -1, or the flat index (query * num_q_heads + head) of the first query that holds a NaN or an infinity.
    """
    wide = widened(queries)
    finite = np.isfinite(wide).all(axis=2)
    if not finite.all():
        return int(np.argmin(finite))
    heads = geometry.num_kv_heads
    n, q_heads, dim = wide.shape
    scale = np.float32(dim**-0.5 if mask.scale is None else mask.scale)
    with np.errstate(over="ignore"):
        scaled = np.clip(wide * scale, -LARGEST, LARGEST)
    grouped = scaled.reshape(n, heads, q_heads // heads, dim)
    step = max(1, PIECE_NUMBERS // (heads * (dim + geometry.value_head_dim)))
    merging = Merging(out.shape)
    for first, last, start, stop in ranges.tolist():
        for low in range(start, stop, step):
            high = min(low + step, stop)
            seen = mask.visible(n, first_position + low, first_position + high)
            piece = rows.part(low, high)
            keys = geometry.key_codec.decoded([array[:, first:last] for array in piece.keys], dim)
            values = geometry.value_codec.decoded([array[:, first:last] for array in piece.values], out.shape[-1])
            hidden, chosen = np.zeros_like(seen), slice(first, last)
            if recent is not None:
                hidden, own_keys, own_values = _kept(recent, first_position + low, keys, values, chosen, mask, n)
                exact = seen & hidden
                merging.add(*_attend_piece(grouped, own_keys, own_values, chosen, exact, mask.softcap, out.shape))
            seen = seen & ~hidden
            merging.add(*_attend_piece(grouped, keys, values, chosen, seen, mask.softcap, out.shape))
    lse[...] = merging.end(out)
    return -1


def _kept(
    recent: RecentView,
    start: int,
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    heads: slice,
    mask: Mask,
    n: int,
) -> tuple[NDArray[np.bool_], NDArray[np.float32], NDArray[np.float32]]:
    """Return which of the positions from `start` on each query sees in 16 bits, [n, positions], and keys and values."""
    stop = start + len(keys)
    rows, length, at = recent.rows, recent.length, mask.query_start + np.arange(n)
    stands, keys, values = np.zeros((n, stop - start), bool), keys.copy(), values.copy()
    for name, target in (("keys", keys), ("values", values)):
        for position, row in rows.rows(name, start, min(stop, length), length):
            target[position - start] = row[heads]
            stands[:, position - start] = (position > at - rows.window) | rows.is_sink(position)
    return stands, keys, values


def _attend_piece(
    queries: NDArray[np.float32],
    keys: NDArray[np.float32],
    values: NDArray[np.float32],
    heads: slice,
    seen: NDArray[np.bool_],
    softcap: float | None,
    shape: tuple[int, ...],
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Attend over a few rows [rows, heads, dim] of some heads; queries are scaled, [n, num_kv_heads, group, dim]."""
    out, lse = np.zeros(shape, np.float32), np.full(shape[:-1], -np.inf, np.float32)
    mine = queries[:, heads].transpose(1, 2, 0, 3)  # [heads, group, n, dim]
    scores = np.clip(_products(mine, keys.transpose(1, 2, 0)[:, None]), -MOST_SCORE, MOST_SCORE)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    shares = (weights / np.maximum(total, np.finfo(float).tiny)).astype(np.float32)
    found = np.clip(_products(shares, values.transpose(1, 0, 2)[:, None]), -LARGEST, LARGEST)
    with np.errstate(divide="ignore"):
        logs = (np.log(total) + top)[..., 0]
    n, count, group = queries.shape[:3]
    out.reshape(n, count, group, -1)[:, heads] = found.transpose(2, 0, 1, 3)
    lse.reshape(n, count, group)[:, heads] = logs.transpose(2, 0, 1)
    return out, lse


def _products(left: NDArray[np.float32], right: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return left @ right, computed in f64 if f32 overflows."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = left @ right
    return found.astype(np.float64) if np.isfinite(found).all() else left.astype(np.float64) @ right.astype(np.float64)
