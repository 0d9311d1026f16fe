"""Whole numbers, ranges of positions, and room for more, checked alike everywhere."""

from __future__ import annotations

import operator

from .errors import CapacityExceededError, PositionOutOfRangeError, ShapeMismatchError


def index(value: object, name: str) -> int:
    """Return `value` as an int; anything that is not a whole number is a ShapeMismatchError naming `name`."""
    if type(value) is int:
        return value
    if isinstance(value, bool):
        raise ShapeMismatchError(f"{name} must be a whole number, not {value!r}", expected="int", actual=value)
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ShapeMismatchError(
            f"{name} must be a whole number, not {value!r}", expected="int", actual=value
        ) from None


def compression_ratio(fp32_bytes: int, quantized_bytes: int) -> float:
    """f32 bytes over stored bytes; 1.0 where both are 0."""
    return fp32_bytes / quantized_bytes if quantized_bytes else 1.0


def check_room(length: int, count: int, capacity: int, *, layer: int | None = None) -> None:
    """Refuse an append of `count` positions at `length` that goes past `capacity`."""
    if length + count > capacity:
        raise CapacityExceededError(
            f"capacity is {capacity} positions, {length} are stored, and {count} more do not fit; nothing was "
            "appended: create the cache with a larger capacity, or kvmmap.resize() its file",
            capacity=capacity,
            position=length,
            expected=capacity - length,
            actual=count,
            layer=layer,
        )


def check_range(start: int, stop: int, length: int, *, layer: int | None = None) -> tuple[int, int]:
    """Return [start, stop) as ints if it lies within `length` stored positions."""
    start, stop = index(start, "start"), index(stop, "stop")
    if not 0 <= start <= stop <= length:
        bad = start if not 0 <= start <= length else stop
        where = "" if layer is None else f" in layer {layer}"
        raise PositionOutOfRangeError(
            f"positions [{start}, {stop}) are not all stored{where}: there are {length}, counted from 0, and negative "
            "ones do not wrap",
            position=bad,
            actual=length,
            layer=layer,
        )
    return start, stop
