"""bf16 and f16: the numbers themselves in 16 bits, lossless for a model that computes in them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NonFiniteError
from .base import Arrays, RowArray
from .compiled import CompiledCodec


class Float16(CompiledCodec):
    """What bf16 and f16 share: one array, and a format whose exponents of ones are infinities and NaNs."""

    dtype: np.dtype[Any]
    infinity: int
    """The bits of infinity."""

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return (RowArray("codes", self.dtype, (dim,)),)

    def check(self, arrays: Arrays, dim: int) -> None:
        bits: NDArray[Any] = arrays[0].view(np.uint16) & 0x7FFF
        special = int((bits >= self.infinity).sum())
        if special:
            raise NonFiniteError(
                f"codes were not made by this codec: it stores finite numbers, and {special} of these are a NaN or an "
                "infinity"
            )


class BFloat16(Float16):
    id, name = 2, "bf16"
    dtype = np.dtype("<u2")  # numpy has no bfloat16 of its own
    infinity = 0x7F80


class Half(Float16):
    id, name = 3, "f16"
    dtype = np.dtype("<f2")
    infinity = 0x7C00
    refused = "a number beyond 65504, a NaN or an infinity"


BF16 = BFloat16()
F16 = Half()
