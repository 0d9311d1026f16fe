"""The row codec in plain numpy, IEEE f32 throughout: the reference for every kernel."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

F32 = np.float32


def quantize(x: NDArray) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """[..., head_dim] finite f32, f16 or bf16 -> (codes, scales)."""
    wide = np.asarray(x).astype(F32)
    absmax = np.abs(wide).max(axis=-1, initial=F32(0))
    scales = np.maximum(absmax / F32(127), F32(2.0**-23))
    codes = np.clip(round_half_away(wide / scales[..., None]), -127, 127)
    return codes.astype(np.int8), scales


def round_half_away(q: NDArray[np.float32]) -> NDArray[np.float32]:
    whole = np.trunc(q)
    return whole + np.where(np.abs(q - whole) >= 0.5, np.copysign(F32(1), q), F32(0))


def dequantize(codes: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):
        return codes.astype(F32) * scales[..., None]
