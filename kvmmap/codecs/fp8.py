"""fp8-e4m3 and fp8-e5m2: the 8-bit floats of OCP's OFP8 (e4m3 without infinities), plain or with one f32 scale a row.

They are what engines hold their caches in, and are for exchanging rows with these; `int8-rotated` loses less.
"""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ..errors import NonFiniteError
from .base import Arrays, RowArray, RowCodec
from .compiled import CODES, F32_SCALES, CompiledCodec, check_scales
from .int8 import MIN_SCALE


class Fp8(CompiledCodec):
    """What the four share."""

    scaled: bool
    first_special: int
    """The code, without its sign, from which on there are infinities and NaNs."""

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        codes = RowArray("codes", CODES, (dim,))
        return (codes, RowArray("scales", F32_SCALES, ())) if self.scaled else (codes,)

    def check(self, arrays: Arrays, dim: int) -> None:
        special: NDArray[Any] = (arrays[0] & 0x7F) >= self.first_special
        if special.any():
            raise NonFiniteError(
                f"codes were not made by this codec: it stores finite numbers, and {int(special.sum())} of these are a "
                "NaN or an infinity"
            )
        if self.scaled:
            check_scales(arrays[1], MIN_SCALE)


class E4M3(Fp8):
    id, name = 4, "fp8-e4m3"
    scaled, first_special = False, 0x7F
    refused = "a number beyond 448, a NaN or an infinity"


class E5M2(Fp8):
    id, name = 5, "fp8-e5m2"
    scaled, first_special = False, 0x7C
    refused = "a number beyond 57344, a NaN or an infinity"


class E4M3Scaled(Fp8):
    id, name = 6, "fp8-e4m3-scaled"
    scaled, first_special = True, 0x7F


class E5M2Scaled(Fp8):
    id, name = 7, "fp8-e5m2-scaled"
    scaled, first_special = True, 0x7C


FP8: tuple[RowCodec, ...] = (E4M3(), E5M2(), E4M3Scaled(), E5M2Scaled())
