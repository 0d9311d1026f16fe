"""Stored rows decoded on a device: codes and scales are transferred as they are, and become numbers there.

Torch operations in the order that `docs/format.md` specifies, in f32, so that every device gives the numbers that the
compiled core gives. Knows codecs and tensors; no caches or files.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...codecs import RowCodec

_SIGN_SEED = 0x70616D6D766B
_WORD = (1 << 64) - 1

_UPPER_LEVELS = {
    3: (14, 45, 79, 127),
    4: (6, 18, 31, 44, 58, 75, 96, 127),
    5: (3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127),
}
"""The upper halves of the symmetric tables of levels, by bits a code."""

_FLOATS = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8-e4m3": torch.float8_e4m3fn,
    "fp8-e5m2": torch.float8_e5m2,
    "fp8-e4m3-scaled": torch.float8_e4m3fn,
    "fp8-e5m2-scaled": torch.float8_e5m2,
}

_BITS = {"int3-rotated": 3, "int4-rotated": 4, "int5-rotated": 5, "int6-rotated": 6}


def can_decode(codec: RowCodec) -> bool:
    """True if rows of a codec are decoded on the device; others are decoded by the codec, and transferred then."""
    return codec.name in _FLOATS or codec.name in _BITS or codec.name in ("int8", "int8-rotated")


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array's numbers as a tensor on a device; never a view of the array."""
    kinds = {np.dtype(np.uint16): np.dtype(np.int16)}  # torch computes with few unsigned types
    array = array.view(kinds.get(array.dtype, array.dtype))
    host = torch.empty(array.shape, dtype=_DTYPES[array.dtype.name], pin_memory=device.type == "cuda")
    np.copyto(host.numpy(), array)
    return host.to(device, non_blocking=True)


_DTYPES = {
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def decode(codec: RowCodec, arrays: Sequence[torch.Tensor], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Decode rows.

    Args:
        codec: one that `can_decode`.
        arrays: those of the codec, [n, num_kv_heads, ...] each, on one device.
        dim: numbers a row.
        dtype: of the result.

    Returns:
        [n, num_kv_heads, dim] on that device, rounded from f32 to the nearest, ties to even.
    """
    codes = arrays[0]
    if codec.name in _FLOATS:
        rows = codes.view(_FLOATS[codec.name])
        return (rows.float() * arrays[1][..., None] if len(arrays) > 1 else rows).to(dtype)
    if codec.name in _BITS:
        codes = _levels(_BITS[codec.name], codes.device)[_unpacked(codes, _BITS[codec.name], dim).long()]
    rows = codes.float() * arrays[1].float()[..., None]
    return (rows if codec.name == "int8" else rotated_back(rows)).to(dtype)


def _unpacked(packed: torch.Tensor, bits: int, dim: int) -> torch.Tensor:
    """[..., dim * bits / 8] -> [..., dim], codes: planes of two or four bits, then of one or two."""
    low = 2 if bits == 3 else 4
    split = low * dim // 8
    codes = _plane(packed[..., :split], low)
    if bits == 6:
        codes = codes | _plane(packed[..., split:], 2) << 4
    elif bits > low:
        single = packed[..., split:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
        codes = codes | single.flatten(-2) << low
    return codes


def _plane(packed: torch.Tensor, width: int) -> torch.Tensor:
    """The codes of a plane: byte j holds codes j, j + p, j + 2p, ..., from its lowest bits up."""
    return torch.cat([packed >> shift & (1 << width) - 1 for shift in range(0, 8, width)], dim=-1)


@lru_cache
def _levels(bits: int, device: torch.device) -> torch.Tensor:
    if bits == 6:
        table = [4 * code - 126 for code in range(64)]
    else:
        upper = _UPPER_LEVELS[bits]
        table = [-level for level in reversed(upper)] + list(upper)
    return torch.tensor(table, dtype=torch.float32, device=device)


def rotated_back(rows: torch.Tensor) -> torch.Tensor:
    """Undo the rotation of rows, f32 [..., dim]: a Hadamard transform of each block, then the factors."""
    dim = rows.shape[-1]
    blocks, start = [], 0
    while start < dim:
        size = 1 << (dim - start).bit_length() - 1
        blocks.append(_transformed(rows[..., start : start + size]))
        start += size
    return torch.cat(blocks, dim=-1) * _factors(dim, rows.device)


def _transformed(block: torch.Tensor) -> torch.Tensor:
    size, step = block.shape[-1], 1
    while step < size:
        pairs = block.unflatten(-1, (size // (2 * step), 2, step))
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        block = torch.stack([low + high, low - high], dim=-2).flatten(-3)
        step *= 2
    return block


@lru_cache
def _factors(dim: int, device: torch.device) -> torch.Tensor:
    """What each number of a row is multiplied with: f32 [dim]."""
    negative = [word >> bit & 1 for word in _words(-(-dim // 64)) for bit in range(64)][:dim]
    sizes: list[int] = []
    while len(sizes) < dim:
        size = 1 << (dim - len(sizes)).bit_length() - 1
        sizes += [size] * size
    factors = np.float32(np.asarray(sizes, np.float64) ** -0.5) * np.where(negative, -1, 1).astype(np.float32)
    return torch.from_numpy(factors).to(device)


def _words(count: int) -> list[int]:
    """The first numbers of SplitMix64 (Steele, Lea and Flood, 2014)."""
    state, words = _SIGN_SEED, []
    for _ in range(count):
        state = state + 0x9E3779B97F4A7C15 & _WORD
        word = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
        words.append(word ^ word >> 31)
    return words
