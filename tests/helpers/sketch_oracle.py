"""Sketches and their bounds in plain numpy: the reference for the kernels."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def sketch(codes: NDArray[np.int8], scales: NDArray[np.float32], block_tokens: int) -> NDArray[np.uint16]:
    """Return bf16 bits [blocks, heads, 2, dim] of whole blocks."""
    with np.errstate(over="ignore"):
        keys = codes.astype(np.float32) * scales[..., None]
    blocks = keys.reshape(-1, block_tokens, *keys.shape[1:])
    return np.stack([toward(blocks.min(axis=1), -1), toward(blocks.max(axis=1), 1)], axis=2)


def toward(x: NDArray[np.float32], sign: int) -> NDArray[np.uint16]:
    """Round f32 to bf16 bits, toward -infinity or +infinity."""
    kept = (x.view(np.uint32) >> 16).astype(np.uint16)  # toward zero
    wide = widen(kept)
    further = wide < x if sign > 0 else wide > x
    return kept + further.astype(np.uint16)


def widen(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def bounds(query: NDArray[np.float32], sketches: NDArray[np.uint16]) -> NDArray[np.float64]:
    """Return sum_d max(q_d * min_d, q_d * max_d) in f64, [q_heads, blocks]."""
    wide = widen(sketches).astype(np.float64).repeat(len(query) // sketches.shape[1], axis=1)
    q = query.astype(np.float64)[None]
    return np.maximum(q * wide[:, :, 0], q * wide[:, :, 1]).sum(axis=-1).T
