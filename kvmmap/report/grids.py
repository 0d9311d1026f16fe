"""Scales over layers, heads and positions, coarse enough to be drawn: those of int8, whatever the codec is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..layer import QuantizedKvLayer
from .gathering import int8_parts


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleGrid:
    """One layer's mean scales."""

    layer: int
    """Which one, from 0."""

    edges: NDArray[np.int64]
    """Positions between the bins, [bins + 1]: bin i is [edges[i], edges[i + 1])."""

    keys: NDArray[np.float32]
    """[num_kv_heads, bins]: the mean scale of a head's key rows in a bin of positions."""

    values: NDArray[np.float32]
    """[num_kv_heads, bins], likewise."""


def scale_grids(cache: QuantizedKvCache, bins: int, layers: list[int] | None = None) -> list[ScaleGrid]:
    """Average scales over at most `bins` ranges of positions of about equal length; no bins of an empty cache.

    Args:
        cache: an open cache.
        bins: at least 1.
        layers: only these, by index; all by default.

    Raises:
        LayerOutOfRangeError: there is no such layer.
        CacheChangedError: the writer truncated meanwhile: refresh, and try again.
    """
    length = cache.seq_len
    edges = np.linspace(0, length, min(bins, length) + 1).round().astype(np.int64)
    wanted = range(cache.num_layers) if layers is None else layers
    return [_grid(cache.layers[number], number, edges) for number in wanted if cache.layers[number].geometry.has_rows]


def _grid(layer: QuantizedKvLayer, number: int, edges: NDArray[np.int64]) -> ScaleGrid:
    bins = len(edges) - 1
    keys, values = np.zeros((bins, layer.num_kv_heads)), np.zeros((bins, layer.num_kv_heads))
    for start, rows in int8_parts(layer, int(edges[-1])):
        stop = start + len(rows.key_scales)
        first, last = np.searchsorted(edges, [start, stop - 1], side="right") - 1  # the bins that it reaches
        begins = np.maximum(edges[first : last + 1], start) - start
        keys[first : last + 1] += np.add.reduceat(rows.key_scales, begins, axis=0, dtype=np.float64)
        values[first : last + 1] += np.add.reduceat(rows.value_scales, begins, axis=0, dtype=np.float64)
    counts = np.diff(edges)[:, None]
    return ScaleGrid(
        layer=number,
        edges=edges,
        keys=(keys / counts).T.astype(np.float32),
        values=(values / counts).T.astype(np.float32),
    )
