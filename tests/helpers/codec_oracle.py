"""The row codecs in plain numpy, IEEE f32 throughout: what every kernel is compared with. Slow and plain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from helpers import oracle

F32 = np.float32
Array = NDArray[Any]

LEVELS = {
    "int3": (59.0, [14, 45, 79, 127]),
    "int4": (46.5, [6, 18, 31, 44, 58, 75, 96, 127]),
    "int5": (39.0, [3, 8, 13, 18, 24, 29, 35, 41, 47, 54, 61, 70, 79, 90, 105, 127]),
}
"""The standard deviation that a table is made for, and the upper half of its levels."""

FLOATS: dict[str, tuple[Any, float]] = {
    "bf16": (ml_dtypes.bfloat16, 0),
    "f16": (np.float16, 0),
    "fp8-e4m3": (ml_dtypes.float8_e4m3fn, 0),
    "fp8-e5m2": (ml_dtypes.float8_e5m2, 0),
    "fp8-e4m3-scaled": (ml_dtypes.float8_e4m3fn, 448),
    "fp8-e5m2-scaled": (ml_dtypes.float8_e5m2, 57344),
}
"""The dtype of the codes, and the largest of them where each row has a scale."""


def split_mix_64(seed: int) -> Callable[[], int]:
    """Return the generator's next(); in Python's whole numbers."""
    mask, state = 2**64 - 1, seed

    def following() -> int:
        nonlocal state
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    return following


def blocks(dim: int) -> list[tuple[int, int]]:
    """Return (first, size) of each block: powers of two, the largest first."""
    found, first = [], 0
    for power in reversed(range(dim.bit_length())):
        if dim >> power & 1:
            found.append((first, 1 << power))
            first += 1 << power
    return found


def factors(dim: int) -> NDArray[np.float32]:
    """Return what each number is multiplied by: its sign, and the normalisation of its block."""
    following = split_mix_64(int.from_bytes(b"kvmmap", "little"))
    bits = [word >> i & 1 for word in (following() for _ in range(-(-dim // 64))) for i in range(64)][:dim]
    signs = np.where(bits, F32(-1), F32(1))
    return np.concatenate([signs[first : first + size] * F32(size**-0.5) for first, size in blocks(dim)])


def hadamard(x: Array) -> Array:
    """The unnormalised transform of each block along the last axis, at distances 1, 2, 4, ..."""
    x = x.copy()
    for first, size in blocks(x.shape[-1]):
        h = 1
        while h < size:
            part = x[..., first : first + size].reshape(*x.shape[:-1], -1, 2, h)
            a, b = part[..., 0, :].copy(), part[..., 1, :].copy()
            part[..., 0, :], part[..., 1, :] = a + b, a - b
            x[..., first : first + size] = part.reshape(*x.shape[:-1], size)
            h *= 2
    return x


def rotate(x: Array) -> Array:
    return hadamard(x.astype(F32) * factors(x.shape[-1]))


def rotate_back(x: Array) -> Array:
    return hadamard(x.astype(F32)) * factors(x.shape[-1])


def row_sum(terms: Array) -> Array:
    """Sum along the last axis in f32: 16 partial sums, then those at distances 8, 4, 2, 1."""
    sums = np.zeros((*terms.shape[:-1], 16), F32)
    for first in range(0, terms.shape[-1], 16):
        part = terms[..., first : first + 16]
        sums[..., : part.shape[-1]] += part
    for step in (8, 4, 2, 1):
        sums[..., :step] += sums[..., step : 2 * step]
    return sums[..., 0]


def levels_of(name: str) -> NDArray[np.int8]:
    """Return the table: level of code."""
    if name == "int6":
        return (4 * np.arange(64) - 126).astype(np.int8)
    upper = np.array(LEVELS[name][1])
    return np.concatenate([-upper[::-1], upper]).astype(np.int8)


def level_codes(name: str, numbers: Array) -> NDArray[np.uint8]:
    """Return the code of the level nearest to each whole number."""
    if name == "int6":
        return ((numbers.astype(int) + 128) >> 2).astype(np.uint8)
    upper = np.array(LEVELS[name][1])
    k = (np.abs(numbers.astype(int))[..., None] > (upper[1:] + upper[:-1]) / 2).sum(-1)
    return np.where(numbers < 0, len(upper) - 1 - k, len(upper) + k).astype(np.uint8)


def bits_of(name: str) -> int:
    return int(name[3])


def pack(name: str, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """[n, dim] codes -> [n, dim * bits / 8] bytes."""
    bits = bits_of(name)
    planes = {3: [(0, 2), (2, 1)], 4: [(0, 4)], 5: [(0, 4), (4, 1)], 6: [(0, 4), (4, 2)]}[bits]
    parts = []
    for low, width in planes:
        field = codes >> low & (1 << width) - 1
        if width == 1:
            parts.append(np.packbits(field, axis=-1, bitorder="little"))
        else:
            per_byte = 8 // width
            split = field.reshape(len(codes), per_byte, -1)
            parts.append(sum(split[:, k] << k * width for k in range(per_byte)).astype(np.uint8))
    return np.concatenate(parts, axis=-1)


def unpack(name: str, packed: NDArray[np.uint8], dim: int) -> NDArray[np.uint8]:
    bits = bits_of(name)
    first = 2 if bits == 3 else 4
    low = packed[:, : dim * first // 8]
    codes = np.concatenate([low >> k * first & (1 << first) - 1 for k in range(8 // first)], axis=-1)
    rest = packed[:, dim * first // 8 :]
    if bits in (3, 5):
        codes |= np.unpackbits(rest, axis=-1, bitorder="little") << first
    if bits == 6:
        codes |= np.concatenate([rest >> 2 * k & 3 for k in range(4)], axis=-1) << 4
    return codes


def encode(name: str, x: Array) -> tuple[Array, Array | None]:
    """[n, dim] finite f32, f16 or bf16 -> (codes as bytes, scales or None)."""
    wide = x.astype(F32)
    name, rotated, _ = name.partition("-rotated")
    if rotated:
        wide = rotate(wide)
    if name == "int8":
        return oracle.quantize(wide)
    if name in FLOATS:
        dtype, largest = FLOATS[name]
        if not largest:
            return wide.astype(dtype).view(np.uint8), None
        scales = np.maximum(np.abs(wide).max(-1, initial=F32(0)) / F32(largest), F32(2.0**-23))
        return (wide / scales[:, None]).astype(dtype).view(np.uint8), scales
    return _encode_levels(name, wide)


def _encode_levels(name: str, x: Array) -> tuple[Array, Array]:
    if name == "int6":
        size, aim = np.abs(x).max(-1), F32(127)
    else:
        size, aim = np.sqrt(row_sum(x * x) / F32(x.shape[-1])), F32(LEVELS[name][0])
    nothing = size < F32(2.0**-32)
    quotients = x * (aim / np.where(nothing, F32(1), size))[:, None]
    numbers = np.clip(oracle.round_half_away(np.clip(quotients, -127, 127)), -127, 127)
    codes = level_codes(name, np.where(nothing[:, None], 0, numbers).astype(np.int8))
    levels = levels_of(name)[codes].astype(F32)
    squares = (levels.astype(np.int64) ** 2).sum(-1).astype(F32)
    scales = np.where(nothing, F32(0), row_sum(x * levels) / squares)
    return pack(name, codes), scales.astype(np.float16)


def decode(name: str, codes: Array, scales: Array | None, dim: int) -> NDArray[np.float32]:
    """The inverse of `encode`, as f32 [n, dim]."""
    name, rotated, _ = name.partition("-rotated")
    if name in FLOATS:
        wide = codes.view(FLOATS[name][0]).astype(F32)
        return wide if scales is None else wide * scales[:, None]
    if name == "int8":
        wide = oracle.dequantize(codes, scales)
    else:
        wide = levels_of(name)[unpack(name, codes, dim)].astype(F32) * scales.astype(F32)[:, None]
    return rotate_back(wide) if rotated else wide
