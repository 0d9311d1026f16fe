"""int8-rotated: rows are rotated and then stored as `int8` stores them, at a third of its loss and the same size."""

from __future__ import annotations

from .base import Arrays, RowArray
from .compiled import RotatedCodec
from .int8 import INT8


class Int8Rotated(RotatedCodec):
    """int8 of rotated rows: outliers of single channels are spread over the row before its scale is chosen."""

    id = INT8.id
    name = "int8-rotated"
    id_name = INT8.id_name

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return INT8.arrays(dim)

    def check(self, arrays: Arrays, dim: int) -> None:
        INT8.check(arrays, dim)


INT8_ROTATED = Int8Rotated()
