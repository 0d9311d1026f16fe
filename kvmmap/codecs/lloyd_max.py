"""int3- to int6-rotated: rotated rows as levels of a fixed table, packed, with one f16 scale a row.

Rotated rows are nearly Gaussian, so the tables of 3 to 5 bits hold the levels of least squared error for a Gaussian
(Max, "Quantizing for minimum distortion", IRE Transactions on Information Theory, 1960; Lloyd, "Least squares
quantization in PCM", 1982) as int8 values; that of 6 bits has even levels. The scale is the one of least squared error
for the levels that were chosen.
"""

from __future__ import annotations

from .base import Arrays, RowArray, RowCodec
from .compiled import CODES, F16_SCALES, RotatedCodec, check_scales


class Levels(RotatedCodec):
    """What the codecs of 3 to 6 bits share; a subclass says how many bits."""

    multiple = 8
    most = 4096
    bits: int
    refused = "numbers that need a scale beyond f16 (in the millions), a NaN or an infinity"

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return RowArray("codes", CODES, (dim * self.bits // 8,)), RowArray("scales", F16_SCALES, ())

    def check(self, arrays: Arrays, dim: int) -> None:
        check_scales(arrays[1], 0.0)  # every code is a level


class Int3Rotated(Levels):
    id, bits, name = 8, 3, "int3-rotated"
    id_name = "int3-levels"


class Int4Rotated(Levels):
    id, bits, name = 9, 4, "int4-rotated"
    id_name = "int4-levels"


class Int5Rotated(Levels):
    id, bits, name = 10, 5, "int5-rotated"
    id_name = "int5-levels"


class Int6Rotated(Levels):
    id, bits, name = 11, 6, "int6-rotated"
    id_name = "int6-levels"


LEVELS: tuple[RowCodec, ...] = (Int3Rotated(), Int4Rotated(), Int5Rotated(), Int6Rotated())
