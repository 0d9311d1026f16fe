"""The base of codecs whose arithmetic is compiled: `_core` identifies them by their two bytes."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import NonFiniteError, ShapeMismatchError
from .base import Arrays, RowCodec

CODES = np.dtype(np.uint8)
F32_SCALES = np.dtype("<f4")
F16_SCALES = np.dtype("<f2")


class CompiledCodec(RowCodec):
    """A codec of the compiled core."""

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        return _core.encode_rows(self.id, self.transform, rows, dtype, tuple(out), threads)

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        _core.decode_rows(self.id, self.transform, tuple(arrays), dim, out, dtype, threads)


class RotatedCodec(CompiledCodec):
    """A codec of rows that are rotated first: random signs, then a normalised Hadamard transform of each block.

    Blocks are powers of two, as the binary digits of head_dim say: 64 and 16 of 80. `docs/format.md` specifies them.
    """

    transform = 1
    transform_name = "hadamard"

    refused = "numbers whose rotation is beyond f32, a NaN or an infinity"

    multiple: ClassVar[int] = 2
    """What head_dim must be a multiple of."""

    most: ClassVar[int] = 65_535
    """The largest head_dim."""

    def check_dim(self, dim: int) -> None:
        if dim % self.multiple or dim > self.most:
            limit = f" and at most {self.most:,}" if dim > self.most else ""
            raise ShapeMismatchError(
                f"codec {self.name} takes rows of a multiple of {self.multiple} numbers{limit}, not of {dim}: choose "
                'another codec for this head_dim, such as "int8"',
                expected=self.multiple,
                actual=dim,
            )


def check_scales(scales: NDArray[Any], least: float) -> None:
    """Refuse scales that are not finite or below `least`.

    Raises:
        NonFiniteError: there are some.
    """
    if not scales.size:
        return
    low, high = scales.min(), scales.max()  # a NaN is its own minimum, and compares as false
    if not (low >= least and high < np.inf):
        raise NonFiniteError(
            f"scales were not made by this codec: they are finite and at least {least:g}; here they go from {low} to "
            f"{high}",
            actual=(float(low), float(high)),
        )
