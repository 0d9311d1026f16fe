"""int8: a code a number, and one f32 scale a row (symmetric absmax quantisation; see `kvmmap.quantize_rows`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import NonFiniteError
from .base import Arrays, RowArray, RowCodec
from .registry import register

MIN_SCALE = 2.0**-23
"""The scale of a row of zeros, and the smallest there is."""

_CODES = np.dtype(np.int8)
_SCALES = np.dtype("<f4")


class Int8(RowCodec):
    """The codec of a cache unless another is asked for. Its arithmetic is compiled."""

    id = 1
    name = "int8"
    id_name = "int8-row"

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return RowArray("codes", _CODES, (dim,)), RowArray("scales", _SCALES, ())

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        return _core.quantize_rows(rows, dtype, out[0], out[1], threads)

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        _core.dequantize_rows(arrays[0], arrays[1], dim, out, dtype, threads)

    def check(self, arrays: Arrays, dim: int) -> None:
        codes, scales = arrays
        if not codes.size:
            return
        low, high = codes.min(), codes.max()
        if low < -127:
            raise _not_made("codes", low, high)
        low, high = scales.min(), scales.max()  # a NaN is its own minimum, and compares as false
        if not (low >= MIN_SCALE and high < np.inf):
            raise _not_made("scales", low, high)


def _not_made(name: str, low: Any, high: Any) -> NonFiniteError:
    return NonFiniteError(
        f"{name} were not made by this codec: codes lie in [-127, 127], scales are finite and at least 2**-23; here "
        f"they go from {low} to {high}",
        actual=(float(low), float(high)),
    )


INT8 = register(Int8())
