"""f32, and ggml's blocks of 4, 5 and 8 bits: rows kept bit by bit as llama.cpp has them in a KV cache.

They are for exchanging caches with llama.cpp without a further loss, and for numbers that no 16-bit format holds.
There is no compiled attention over them: rows are decoded piece by piece.

A quantised KV cache of llama.cpp may be transformed, and the codec undoes it when it decodes. The transform's byte is
16 plus what is done to a row before it is packed: 1 for Hadamard transforms of groups of 64 numbers, 2 for those of the
largest power of two that divides head_dim, and 4 for RoPE's pairs side by side (the order that GGUF files give the
keys of many models), which is done first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..errors import NonFiniteError, ShapeMismatchError
from .base import Arrays, RowArray, RowCodec
from .compiled import CODES, F32_SCALES
from .registry import by_name

BLOCK = 32
"""Numbers of a block."""

GROUP = 64
"""Numbers that llama.cpp rotates together, at least."""

ROTATED, ROTATED_WHOLE, INTERLEAVED, TRANSFORMED = 1, 2, 4, 16
"""Parts of the transform's byte."""

_SUFFIXES = {0: "", ROTATED: "-rotated64", ROTATED_WHOLE: "-rotated"}


class F32(RowCodec):
    """The numbers themselves."""

    id, name = 32, "f32"
    ggml_type = 0

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return (RowArray("codes", F32_SCALES, (dim,)),)

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        return _core.encode_ggml(self.ggml_type, 0, False, rows, dtype, out[0], threads)

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        if out.size:
            _core.decode_ggml(self.ggml_type, 0, False, arrays[0], dim, out, dtype, threads)

    def check(self, arrays: Arrays, dim: int) -> None:
        special = _core.special_ggml(self.ggml_type, np.ascontiguousarray(arrays[0]))
        if special:
            raise NonFiniteError(f"codes hold {special} NaNs or infinities, and f32 stores finite numbers")


class Blocks(RowCodec):
    """Blocks of 32 numbers of one of ggml's types, with one transform."""

    offered = False
    refused = "numbers that need a scale beyond f16, a NaN or an infinity"

    def __init__(self, id: int, type_name: str, ggml_type: int, block_bytes: int, transform: int) -> None:
        kind = transform & ~(TRANSFORMED | INTERLEAVED)
        pairs = "-pairs" if transform & INTERLEAVED else ""
        done = f"{_SUFFIXES[kind]}{pairs}"
        put = self.__dict__.update  # which are constants of other codecs' classes
        put(id=id, transform=transform, name=f"{type_name}{done}", id_name=type_name)
        put(transform_name=f"ggml{done}" if transform else "none")
        self.ggml_type = ggml_type
        self._block_bytes = block_bytes
        self._kind, self._interleaved = kind, bool(transform & INTERLEAVED)

    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        return (RowArray("codes", CODES, (dim // BLOCK * self._block_bytes,)),)

    def check_dim(self, dim: int) -> None:
        multiple = GROUP if self._kind else BLOCK
        if dim % multiple:
            raise ShapeMismatchError(
                f"codec {self.name} takes rows of a multiple of {multiple} numbers, not of {dim}",
                expected=multiple,
                actual=dim,
            )

    def group(self, dim: int) -> int:
        """Return how many numbers are rotated together, 0 for none."""
        return {0: 0, ROTATED: GROUP, ROTATED_WHOLE: dim & -dim}[self._kind]

    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        dim = rows.shape[-1]
        return _core.encode_ggml(self.ggml_type, self.group(dim), self._interleaved, rows, dtype, out[0], threads)

    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        if out.size:
            _core.decode_ggml(self.ggml_type, self.group(dim), self._interleaved, arrays[0], dim, out, dtype, threads)

    def check(self, arrays: Arrays, dim: int) -> None:
        special = _core.special_ggml(self.ggml_type, np.ascontiguousarray(arrays[0]))
        if special:
            raise NonFiniteError(
                f"codes have {special} scales that are a NaN or an infinity, which {self.name} never has"
            )


TYPES = (("q8_0", 8, 34), ("q4_0", 2, 18), ("q4_1", 3, 20), ("q5_0", 6, 22), ("q5_1", 7, 24))
"""Names, ggml's numbers, bytes of a block, and how many f16 numbers it begins with; their codec bytes are 33 and so
on."""

TRANSFORMS = (0, *(TRANSFORMED | kind | pairs for kind in _SUFFIXES for pairs in (0, INTERLEAVED) if kind | pairs))
"""Bytes of all transforms."""

BLOCKS: tuple[RowCodec, ...] = tuple(
    Blocks(id, name, number, size, transform)
    for id, (name, number, size) in enumerate(TYPES, 33)
    for transform in TRANSFORMS
)
PLAIN_F32 = F32()


def blocks_codec(type_name: str, head_dim: int, *, group: int, interleaved: bool) -> RowCodec:
    """Return the codec of rows in ggml's blocks.

    Args:
        type_name: such as "q8_0".
        head_dim: numbers of a row.
        group: numbers that are rotated together: 0 for none, 64, or the largest power of two that divides `head_dim`.
        interleaved: whether RoPE's pairs lie side by side.
    """
    kind = 0 if not group else ROTATED if group == GROUP else ROTATED_WHOLE
    assert group in (0, GROUP, head_dim & -head_dim)
    return by_name(f"{type_name}{_SUFFIXES[kind]}{'-pairs' if interleaved else ''}")
