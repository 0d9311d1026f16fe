"""bf16 and f16: the numbers themselves in 16 bits, lossless for a model that computes in them."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import _core
from ..errors import NonFiniteError
from .base import Arrays, RowArray
from .compiled import CompiledCodec


class Float16(CompiledCodec):
    """What bf16 and f16 share: one array, and a format whose exponents of ones are infinities and NaNs."""

    dtype: np.dtype[Any]
    ggml_type: int
    """ggml's number of it."""

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return (RowArray("codes", self.dtype, (dim,)),)

    def check(self, arrays: Arrays, dim: int) -> None:
        special = _core.special_ggml(self.ggml_type, np.ascontiguousarray(arrays[0]))
        if special:
            raise NonFiniteError(
                f"codes were not made by this codec: it stores finite numbers, and {special} of these are a NaN or an "
                "infinity"
            )


class BFloat16(Float16):
    id, name = 2, "bf16"
    dtype = np.dtype("<u2")  # numpy has no bfloat16 of its own
    ggml_type = 30


class Half(Float16):
    id, name = 3, "f16"
    dtype = np.dtype("<f2")
    ggml_type = 1
    refused = "a number beyond 65504, a NaN or an infinity"


BF16 = BFloat16()
F16 = Half()
