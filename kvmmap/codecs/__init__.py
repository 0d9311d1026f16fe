"""Row codecs: what a codec is (`base`), which there are (`registry`), and one module for each."""

from .base import RowArray, RowCodec
from .float16 import BF16, F16
from .fp8 import FP8
from .ggml import BLOCKS, PLAIN_F32
from .int8 import INT8
from .int8_rotated import INT8_ROTATED
from .lloyd_max import LEVELS
from .registry import by_id, by_name, chosen, known_ids, known_transforms, names, register, shown_name

COMPILED: tuple[RowCodec, ...] = (INT8, INT8_ROTATED, BF16, F16, *FP8, *LEVELS)
"""Codecs that the compiled core knows; each of them has attention with each other one in place."""

for _codec in (*COMPILED, PLAIN_F32, *BLOCKS):
    register(_codec)

__all__ = [
    "COMPILED",
    "INT8",
    "RowArray",
    "RowCodec",
    "by_id",
    "by_name",
    "chosen",
    "known_ids",
    "known_transforms",
    "names",
    "register",
    "shown_name",
]
