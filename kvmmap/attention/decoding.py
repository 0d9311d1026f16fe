"""Attention over rows of any codec: decoded piece by piece, scored in f32, merged in f64. Plain numpy, and slow.

For codecs that have no compiled kernel. It gives what the kernels give, up to f32 rounding.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..geometry import LayerGeometry
from ..row_arrays import widened
from ..rows import Rows
from .mask import Mask
from .merge import Merging

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
    grouped = (wide * scale).reshape(n, heads, q_heads // heads, dim)
    step = max(1, PIECE_NUMBERS // (heads * (dim + geometry.value_head_dim)))
    merging = Merging(out.shape)
    for first, last, start, stop in ranges.tolist():
        for low in range(start, stop, step):
            high = min(low + step, stop)
            seen = mask.visible(n, first_position + low, first_position + high)
            part, part_lse = np.zeros_like(out), np.full_like(lse, -np.inf)
            _attend_piece(
                grouped, rows.part(low, high), slice(first, last), seen, mask.softcap, geometry, part, part_lse
            )
            merging.add(part, part_lse)
    lse[...] = merging.end(out)
    return -1


def _attend_piece(
    queries: NDArray[np.float32],
    rows: Rows,
    heads: slice,
    seen: NDArray[np.bool_],
    softcap: float | None,
    geometry: LayerGeometry,
    out: NDArray[np.float32],
    lse: NDArray[np.float32],
) -> None:
    """Attend over a few rows of some heads; queries are scaled, [n, num_kv_heads, group, head_dim]."""
    keys = geometry.key_codec.decoded([array[:, heads] for array in rows.keys], geometry.head_dim)
    values = geometry.value_codec.decoded([array[:, heads] for array in rows.values], geometry.value_head_dim)
    mine = queries[:, heads].transpose(1, 2, 0, 3)  # [heads, group, n, dim]
    scores = (mine @ keys.transpose(1, 2, 0)[:, None]).astype(np.float64)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    scores = np.where(seen, scores, -np.inf)
    top = scores.max(axis=-1, keepdims=True, initial=-np.inf)
    weights = np.exp(scores - np.where(np.isfinite(top), top, 0.0))
    total = weights.sum(axis=-1, keepdims=True)
    found = weights.astype(np.float32) @ values.transpose(1, 0, 2)[:, None] / np.maximum(total, np.finfo(float).tiny)
    with np.errstate(divide="ignore"):
        logs = (np.log(total) + top)[..., 0]
    n, count, group = out.shape[0], geometry.num_kv_heads, mine.shape[1]
    out.reshape(n, count, group, -1)[:, heads] = found.transpose(2, 0, 1, 3)
    lse.reshape(n, count, group)[:, heads] = logs.transpose(2, 0, 1)
