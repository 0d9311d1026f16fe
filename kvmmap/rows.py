"""Rows of some positions of one layer: the arrays of keys and then of values, as their codecs store them.

Everything that stores or copies rows goes by the order and names that the geometry has. What an array holds is its
codec's business.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from .codecs import RowCodec
from .geometry import LayerGeometry

_new = tuple.__new__

_LINE = 64
"""Bytes of a cache line. numpy starts large arrays 16 bytes behind one: each load of 64 bytes would touch two."""


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    memory = np.zeros(math.prod(shape) * dtype.itemsize + _LINE, np.uint8)
    start: int = -memory.__array_interface__["data"][0] % _LINE
    return np.ndarray(shape, dtype, memory, start)


class Rows(tuple[NDArray[Any], ...]):
    """Arrays of as many positions, [n, num_kv_heads, ...] each: keys', then values'.

    There is a subclass for each pair of codecs, whose attributes have the arrays' names: of int8 rows `key_codes`, int8
    [n, num_kv_heads, head_dim], `key_scales`, f32 [n, num_kv_heads], `value_codes` and `value_scales`.
    """

    __slots__ = ()

    _fields: ClassVar[tuple[str, ...]] = ()
    """Names of the arrays."""

    _num_keys: ClassVar[int] = 0
    """Arrays of keys."""

    @classmethod
    def _make(cls, arrays: Iterable[NDArray[Any]]) -> Self:
        return tuple.__new__(cls, arrays)

    @staticmethod
    def of(geometry: LayerGeometry, arrays: Iterable[NDArray[Any]]) -> Rows:
        """Make rows of arrays, in the geometry's order."""
        return _kind_of(geometry)._make(arrays)

    @staticmethod
    def allocate(geometry: LayerGeometry, count: int) -> Rows:
        """Make zeroed arrays for `count` positions, each at the start of a cache line."""
        return Rows.of(geometry, [_zeros((count, *slab.shape), slab.dtype) for slab in geometry.slabs])

    @staticmethod
    def empty(geometry: LayerGeometry, count: int) -> Rows:
        """Make arrays for `count` positions that hold anything."""
        return Rows.of(geometry, [np.empty((count, *slab.shape), slab.dtype) for slab in geometry.slabs])

    @staticmethod
    def over(geometry: LayerGeometry, memory: Any, count: int, offsets: Sequence[int]) -> Rows:
        """Make views of a buffer that has an array of `count` positions at each offset, in bytes."""
        return Rows.viewer(geometry, memory, count)(offsets)

    @staticmethod
    def viewer(geometry: LayerGeometry, memory: Any, count: int) -> Callable[[Sequence[int]], Rows]:
        """Return what makes such views from the offsets, of one layer after the other of the same shape."""
        make = _kind_of(geometry)._make
        arrays = [((count, *slab.shape), slab.dtype) for slab in geometry.slabs]

        def view(offsets: Sequence[int]) -> Rows:
            return make(
                [
                    np.ndarray(shape, dtype, memory, offset)
                    for (shape, dtype), offset in zip(arrays, offsets, strict=True)
                ]
            )

        return view

    @staticmethod
    def of_bytes(geometry: LayerGeometry, parts: Iterable[Any]) -> Rows:
        """Make views of one buffer an array, each with the bytes of as many positions."""
        return Rows.of(
            geometry,
            [
                np.frombuffer(part, slab.dtype).reshape(-1, *slab.shape)
                for slab, part in zip(geometry.slabs, parts, strict=True)
            ],
        )

    @property
    def num_positions(self) -> int:
        """Positions that they are of; 0 of a layer without rows."""
        return len(self[0]) if self else 0

    @property
    def keys(self) -> tuple[NDArray[Any], ...]:
        """The arrays of keys."""
        return self[: self._num_keys]

    @property
    def values(self) -> tuple[NDArray[Any], ...]:
        """The arrays of values."""
        return self[self._num_keys :]

    def part(self, start: int, stop: int) -> Self:
        """Views of positions [start, stop)."""
        positions = slice(start, stop)
        if len(self) == 4:  # as with int8, where a position is appended in microseconds
            a, b, c, d = self
            return _new(type(self), (a[positions], b[positions], c[positions], d[positions]))
        return _new(type(self), [array[positions] for array in self])

    def read_only(self) -> Self:
        """Make these arrays read-only, and return them."""
        for array in self:
            array.flags.writeable = False
        return self

    def named(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield each array with its name."""
        yield from zip(self._fields, self, strict=True)

    def fill(self, source: Rows) -> None:
        """Copy rows of the same shapes in."""
        for array, other in zip(self, source, strict=True):
            np.copyto(array, other)

    def __getattr__(self, name: str) -> NDArray[Any]:
        raise AttributeError(f"these rows have no array {name!r}: they have {', '.join(self._fields)}")


def _kind_of(geometry: LayerGeometry) -> type[Rows]:
    return _kind(geometry.key_codec, geometry.value_codec, tuple([slab.name for slab in geometry.slabs]))


@functools.cache
def _kind(key_codec: RowCodec, value_codec: RowCodec, names: tuple[str, ...]) -> type[Rows]:
    accessors = {name: property(operator.itemgetter(number)) for number, name in enumerate(names)}
    own = {"__slots__": (), "_fields": names, "_num_keys": sum(name.startswith("key_") for name in names)}
    return type("Rows", (Rows,), own | accessors)


def zero_rows(geometry: LayerGeometry, count: int) -> Rows:
    """Return what the codecs make of `count` positions of zeros."""
    rows = Rows.allocate(geometry, count)
    for codec, arrays, dim in (
        (geometry.key_codec, rows.keys, geometry.head_dim),
        (geometry.value_codec, rows.values, geometry.value_head_dim),
    ):
        codec.encode(np.zeros((count, geometry.num_kv_heads, dim), np.float32), 0, arrays, 1)
    return rows
