"""Rows in 16 bits, by plain numpy: which stand for the coded ones, their record in a file, and attention with them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import xxhash

import kvmmap


def halves(rows: np.ndarray) -> np.ndarray:
    """What is kept of a position's rows, as f32: f16, or bfloat16 where they are beyond."""
    with np.errstate(over="ignore"):
        found = rows.astype(np.float16).astype(np.float32)
        return found if np.isfinite(found).all() else rows.astype(ml_dtypes.bfloat16).astype(np.float32)


def kept(length: int, window: int, sinks: int) -> np.ndarray:
    """Which positions have such rows, all having been appended with them."""
    positions = np.arange(length)
    return (positions >= length - window) | (positions < sinks)


def best(coded: np.ndarray, rows: np.ndarray, window: int, sinks: int) -> np.ndarray:
    """What reading gives: of each position the best that is stored."""
    found = coded.copy()
    for position in np.flatnonzero(kept(len(rows), window, sinks)):
        found[position] = halves(rows[position])
    return found


def attend(
    layer: kvmmap.QuantizedKvLayer,
    queries: np.ndarray,
    stands: Callable[[int, np.ndarray], np.ndarray],
    *,
    query_start: int | None = None,
    causal: bool = True,
    window: int | None = None,
    sinks: int = 0,
    softcap: float | None = None,
    positions: tuple[int, int] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Attention in f64, over the coded rows and, where `stands(query position, positions)`, those that are read."""
    rows, shape = layer.read_quantized(), layer.geometry
    coded = (
        shape.key_codec.decoded(rows.keys, shape.head_dim),
        shape.value_codec.decoded(rows.values, shape.value_head_dim),
    )
    exact = layer.read_keys(), layer.read_values()
    n, q_heads, dim = queries.shape
    group, length = q_heads // shape.num_kv_heads, len(layer)
    start = length - n if query_start is None else query_start
    out, lse = np.zeros((n, q_heads, shape.value_head_dim)), np.full((n, q_heads), -np.inf)
    at = np.arange(length)
    for i in range(n):
        q = start + i
        seen = np.ones(length, bool)
        if causal:
            seen &= at <= q
        if window is not None:
            seen &= (at > q - window) | (at < sinks)
        if positions is not None:
            seen &= (at >= positions[0]) & (at < positions[1])
        if not seen.any():
            continue
        which = stands(q, at)[:, None, None]
        keys, values = (np.where(which, e, c).astype(np.float64) for e, c in zip(exact, coded, strict=True))
        for head in range(q_heads):
            scores = keys[:, head // group] @ queries[i, head].astype(np.float64) * dim**-0.5
            if softcap is not None:
                scores = softcap * np.tanh(scores / softcap)
            top = scores[seen].max()
            weights = np.where(seen, np.exp(scores - top), 0.0)
            out[i, head] = weights @ values[:, head // group] / weights.sum()
            lse[i, head] = np.log(weights.sum()) + top
    return out, lse


def record(layer: kvmmap.QuantizedKvLayer, position: int, form: int, keys: np.ndarray, values: np.ndarray) -> bytes:
    """The record of a position, as docs/format.md specifies it; keys and values are the 16-bit numbers' bits."""

    def digest(*words: int) -> int:
        return xxhash.xxh64_intdigest(struct.pack(f"<{len(words)}Q", *words))

    def of(array: Any) -> int:
        return xxhash.xxh64_intdigest(np.ascontiguousarray(array).tobytes())

    row = digest(*[of(array[position]) for array in layer.read_quantized()])
    tag = position + 1 | form << 40 | form << 48
    data = struct.pack("<3Q", tag, row, digest(tag, row, of(keys), of(values))) + keys.tobytes() + values.tobytes()
    return data + bytes(-len(data) % 8)
