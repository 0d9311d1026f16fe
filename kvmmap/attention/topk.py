"""Block selection: upper bounds of scores from sketches, and how the votes of heads are combined.

What lives here: `select_blocks`. What does not: how sketches are made and kept, and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import EmptyCacheError, ShapeMismatchError
from ..geometry import LayerGeometry
from ..ranges import index
from .mask import check_mask
from .queries import check_query
from .source import RowSource

TEMPERATURE = 2.0
"""Bounds are divided by this: they exceed the scores they bound, the more the higher they are."""


Sketches = Callable[[int, int, int], Sequence[NDArray[np.uint16]]]
"""Takes how many blocks, positions in a block, and a version of the store; gives their sketches, [blocks, num_kv_heads,
2, head_dim], bf16 as uint16, in arrays that follow one another."""


def select_blocks(
    store: RowSource,
    sketches: Sketches,
    block_tokens: int,
    query: Any,
    k: int,
    *,
    scale: float | None,
    per_head: bool,
) -> NDArray[np.int64]:
    """Choose blocks of a store; arguments and errors are those of `QuantizedKvLayer.select_blocks`."""
    store.check()
    version = store.version()  # before the length: see `LayerStore`
    geometry, length = store.geometry, store.length
    rows = check_query(query, geometry, store.index)
    mask = check_mask(scale=scale, causal=True, query_start=0, window=None, sinks=0, softcap=None)
    k = index(k, "k")
    if k < 1:
        raise ShapeMismatchError(f"k must be at least 1 block, not {k}", expected=1, actual=k)
    if not length:
        raise EmptyCacheError("nothing is stored: push or extend before selecting blocks")
    blocks = -(-length // block_tokens)
    heads = geometry.num_kv_heads
    if k >= blocks:
        everything = np.arange(blocks)
        return np.tile(everything, (heads, 1)) if per_head else everything
    with np.errstate(over="ignore"):
        rows = rows * np.float32(geometry.head_dim**-0.5 if mask.scale is None else mask.scale)
    pieces = sketches(blocks - 1, block_tokens, version)
    bounds = np.concatenate([block_bounds(piece, rows, geometry) for piece in pieces], axis=1)
    store.validate(version)
    wanted = _shares(bounds).reshape(heads, -1, blocks - 1).sum(axis=1)
    if not per_head:
        wanted = wanted.sum(axis=0, keepdims=True)
    # The last block, complete or not, is part of every choice: k - 1 more are to be found.
    best = np.argsort(-wanted, axis=1, kind="stable")[:, : k - 1]
    chosen = np.concatenate([np.sort(best, axis=1), np.full((len(best), 1), blocks - 1)], axis=1)
    return chosen if per_head else chosen[0]


def block_bounds(
    sketches: NDArray[np.uint16], query: NDArray[np.float32], geometry: LayerGeometry
) -> NDArray[np.float32]:
    """Return an upper bound of q . k over the keys k of each block, sum_d max(q_d * min_d, q_d * max_d), up to the
    rounding of an f32 sum.

    Args:
        sketches: [blocks, num_kv_heads, 2, head_dim], bf16 as uint16.
        query: f32 [num_q_heads, head_dim].
        geometry: the layer's.

    Returns:
        f32 [num_q_heads, blocks].
    """
    bounds = np.empty((len(query), len(sketches)), np.float32)
    parts = np.stack([np.minimum(query, 0), np.maximum(query, 0)], axis=1)
    _core.bound_blocks(parts, sketches, geometry.num_kv_heads, geometry.head_dim, bounds)
    return bounds


def _shares(bounds: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return each query head's softmax over blocks: the share of its attention that a block may get.

    Shares of a head sum to 1, so a head with larger scores counts for no more than others, and a head that scores all
    blocks alike has little influence.
    """
    with np.errstate(invalid="ignore"):
        height = bounds.astype(np.float64) / TEMPERATURE
        top = height.max(axis=1, keepdims=True)
        height = np.where(height == top, 0.0, height - top)  # infinity less infinity would be nothing
    weights = np.exp(height)
    shares: NDArray[np.float64] = weights / weights.sum(axis=1, keepdims=True)
    return shares
