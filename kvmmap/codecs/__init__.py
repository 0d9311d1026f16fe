"""Row codecs: what a codec is (`base`), which there are (`registry`), and one module for each."""

from .base import RowArray, RowCodec
from .int8 import INT8
from .registry import by_id, by_name, known_ids, known_transforms, names, register

__all__ = [
    "INT8",
    "RowArray",
    "RowCodec",
    "by_id",
    "by_name",
    "known_ids",
    "known_transforms",
    "names",
    "register",
]
