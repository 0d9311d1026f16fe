"""ggml's types of numbers, as far as a KV cache may have them, and rows of them in both directions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ... import _core
from ...codecs import RowCodec, by_name
from ...codecs.ggml import BLOCK, GROUP, TYPES, blocks_codec
from ...errors import DtypeError, NonFiniteError
from ...row_arrays import as_rows


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One type."""

    name: str
    """As llama.cpp's options call it."""

    number: int
    """What files call it."""

    block: int
    """Numbers that are stored together."""

    block_bytes: int
    """Bytes of these."""

    @property
    def quantized(self) -> bool:
        """True for blocks with a scale."""
        return self.block > 1

    def row_bytes(self, count: int) -> int:
        """Bytes of so many numbers, whole blocks."""
        return count // self.block * self.block_bytes


KV_TYPES = {
    found.name: found
    for found in (
        GgmlType("f32", 0, 1, 4),
        GgmlType("f16", 1, 1, 2),
        GgmlType("bf16", 30, 1, 2),
        *(GgmlType(name, number, BLOCK, size) for name, number, size in TYPES),
    )
}
"""Types that are read and written, by name."""

_OTHERS = {
    9: "q8_1",
    10: "q2_K",
    11: "q3_K",
    12: "q4_K",
    13: "q5_K",
    14: "q6_K",
    15: "q8_K",
    20: "iq4_nl",
    24: "i8",
    28: "f64",
    39: "mxfp4",
    40: "nvfp4",
}


def kv_type(number: int, path: str) -> GgmlType:
    """Return the type of a number in a file.

    Raises:
        DtypeError: a type that is not read; names it.
    """
    for found in KV_TYPES.values():
        if found.number == number:
            return found
    name = _OTHERS.get(number, "unknown")
    raise DtypeError(
        f"{path}: its rows are of ggml's type {number} ({name}), and kvmmap reads {', '.join(KV_TYPES)}: save the "
        "state "
        "with one of these as the type of keys and values",
        expected=tuple(KV_TYPES),
        actual=name,
    )


def kv_type_named(name: str) -> GgmlType:
    """Return the type of a name.

    Raises:
        DtypeError: there is none of that name.
    """
    if name not in KV_TYPES:
        raise DtypeError(
            f"there is no type {name!r} of keys and values: choose one of {', '.join(KV_TYPES)}",
            expected=tuple(KV_TYPES),
            actual=name,
        )
    return KV_TYPES[name]


@dataclass(frozen=True, slots=True)
class RowForm:
    """How a layer's rows of keys, or of values, lie in a state."""

    type: GgmlType

    group: int
    """Numbers that are rotated together before they are packed; 0 for none."""

    pairs: bool
    """Whether RoPE's pairs of numbers lie side by side."""

    @classmethod
    def of_keys(cls, type: GgmlType, head_dim: int, *, rotated: bool, pairs: bool) -> RowForm:
        """Return how keys lie: those of quantised types are rotated in groups as large as head_dim has."""
        whole = head_dim & -head_dim
        return cls(type, whole if rotated and type.quantized and head_dim % GROUP == 0 else 0, pairs)

    @classmethod
    def of_values(cls, type: GgmlType, head_dim: int, *, rotated: bool) -> RowForm:
        """Return how values lie: those of quantised types are rotated in groups of 64."""
        return cls(type, GROUP if rotated and type.quantized and head_dim % GROUP == 0 else 0, False)

    def codec(self, head_dim: int) -> RowCodec:
        """Return the codec that keeps such rows without a loss."""
        if self.type.quantized:
            return blocks_codec(self.type.name, head_dim, group=self.group, interleaved=self.pairs)
        return by_name(self.type.name)

    def decode(self, rows: NDArray[np.uint8], heads: int, head_dim: int) -> NDArray[Any]:
        """Return rows as numbers, in the order of transformers' checkpoints.

        Args:
            rows: [n, row_bytes], C-contiguous.
            heads, head_dim: what a row consists of.

        Returns:
            [n, heads, head_dim]: f16 and bf16 of rows that are such, else f32.
        """
        bits = {"f16": 1, "bf16": 2}.get(self.type.name, 0)
        out = np.empty((len(rows), heads, head_dim), np.float32 if bits == 0 else np.uint16)
        if out.size:
            _core.decode_ggml(self.type.number, self.group, self.pairs, rows, head_dim, out, bits, 1)
        if bits == 2:
            import ml_dtypes

            return out.view(ml_dtypes.bfloat16)
        return out.view(np.float16) if bits else out

    def encode(self, rows: NDArray[Any], *, layer: int, start: int) -> NDArray[np.uint8]:
        """Return numbers, [n, heads, head_dim], as rows of bytes, [n, row_bytes].

        Raises:
            NonFiniteError: a number that the type can't hold.
        """
        bits, dtype = as_rows(rows)
        n, heads, head_dim = bits.shape
        out = np.empty((n, self.type.row_bytes(heads * head_dim)), np.uint8)
        bad = _core.encode_ggml(self.type.number, self.group, self.pairs, bits, dtype, out, 1)
        if bad >= 0:
            raise NonFiniteError(
                f"position {start + bad // heads} of layer {layer}, head {bad % heads}, has numbers that "
                f"{self.type.name} "
                "can't hold: export another type",
                position=start + bad // heads,
                head=bad % heads,
                layer=layer,
            )
        return out
