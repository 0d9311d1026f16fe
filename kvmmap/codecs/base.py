"""The interface of row codecs, which encode the numbers of a row as arrays of bytes, and decode them.

A row is the `dim` numbers of one head at one position, of keys or of values. Codecs know rows and arrays of them; they
do not know files, layers, or positions. Everything that stores, copies, checks or draws rows derives the arrays that a
layer has from `RowCodec.arrays`, so a new codec is one module that defines a subclass and calls `register`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

Arrays = Sequence[NDArray[Any]]
"""One array for each `RowArray` of a codec, in its order; the leading axes are those of the rows."""


@dataclass(frozen=True, slots=True)
class RowArray:
    """One array that a codec stores for rows of one dim."""

    name: str
    """Such as "codes": with "key_" or "value_" before it, the array's name in a layer."""

    dtype: np.dtype[Any]
    """Little-endian, and one of Python's buffer protocol: bfloat16 is stored as uint16."""

    shape: tuple[int, ...]
    """What one row takes in it: (dim,) for a code a number, () for a number a row."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.dtype.itemsize * math.prod(self.shape)


class RowCodec(ABC):
    """One way to store rows. Instances have no state; there is one of each, in the registry.

    Dtypes of rows are numbered as in `kvmmap.row_arrays`: 0 for f32, 1 for f16, 2 for bf16 (as uint16).
    """

    id: ClassVar[int]
    """The codec's byte in a `.kvm` file's layer entry, 1 to 255."""

    transform: ClassVar[int] = 0
    """The transform's byte there: 0 for none. A codec is known by both bytes."""

    name: ClassVar[str]
    """What users call it, such as "int8"."""

    id_name: ClassVar[str]
    """What `id` alone is called, in reports; `name` unless several transforms share it."""

    transform_name: ClassVar[str] = "none"
    """What `transform` is called, in reports."""

    offered: ClassVar[bool] = True
    """Whether messages name it among those to choose from."""

    refused: ClassVar[str] = "a NaN or an infinity"
    """What rows must not hold, in words, as `encode` finds it."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "id_name" not in cls.__dict__ and "name" in cls.__dict__:
            cls.id_name = cls.name

    @abstractmethod
    def arrays(self, dim: int) -> tuple[RowArray, ...]:
        """Return the arrays that rows of `dim` numbers are stored in: one or two."""

    def check_dim(self, dim: int) -> None:
        """Raise ShapeMismatchError if rows of `dim` numbers can't be stored."""

    @abstractmethod
    def encode(self, rows: NDArray[Any], dtype: int, out: Arrays, threads: int) -> int:
        """Encode rows.

        Args:
            rows: [n, heads, dim], as `as_rows` returns them: any strides but for the last axis, which is contiguous.
            dtype: their dtype's number.
            out: C-contiguous arrays to fill, [n, heads, *shape] each.
            threads: at most so many.

        Returns:
            -1, or the flat index (position * heads + head) of the first row that holds what is `refused`; `out` then
            holds anything.
        """

    @abstractmethod
    def decode(self, arrays: Arrays, dim: int, out: NDArray[Any], dtype: int, threads: int) -> None:
        """Decode rows into `out`, C-contiguous [..., dim], f32, f16 or the bits of bf16 by the dtype's number.

        The arrays are C-contiguous and have out's leading axes. f16 and bf16 are what f32 rounds to.
        """

    def check(self, arrays: Arrays, dim: int) -> None:
        """Check arrays that come from outside, of the right shapes and dtypes.

        Raises:
            NonFiniteError: they hold what `encode` never writes. The message begins with the array's name, and
                `actual` has what was found.
        """

    def decoded(self, arrays: Arrays, dim: int, threads: int = 1) -> NDArray[np.float32]:
        """Return rows as new f32, [..., dim]."""
        first, spec = arrays[0], self.arrays(dim)[0]
        out = np.empty((*first.shape[: first.ndim - len(spec.shape)], dim), np.float32)
        self.decode([np.ascontiguousarray(array) for array in arrays], dim, out, 0, threads)
        return out

    def bits_per_number(self, dim: int) -> float:
        """Return the bits that a number takes in rows of `dim`, scales and the like included."""
        return 8 * sum(array.row_bytes for array in self.arrays(dim)) / dim

    def __repr__(self) -> str:
        return f"<codec {self.name}>"
