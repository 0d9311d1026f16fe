"""What callers give for all layers at once or for each: numbers and names of codecs, and errors that name the layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from .codecs import RowCodec, chosen
from .codecs.presets import Codecs
from .errors import DtypeError, ShapeMismatchError

T = TypeVar("T", int, str)
InLayer = TypeVar("InLayer", DtypeError, ShapeMismatchError)


def one_a_layer(value: T | Sequence[T], count: int, name: str) -> list[T]:
    """Return a value for each of `count` layers, from one for all or a sequence of as many.

    Raises:
        ShapeMismatchError: a sequence of another length.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ShapeMismatchError(
            f"{name} has {len(value)} entries for {count} layers: give one for all, or one a layer",
            expected=count,
            actual=len(value),
        )
    return list(value)


def one_for_all(value: object) -> bool:
    """True of what is no list: a number, or the name of a codec."""
    return isinstance(value, str | bytes) or not isinstance(value, Sequence)  # bytes are no list of numbers here


def codecs_a_layer(names: Codecs, count: int, name: str) -> list[RowCodec]:
    """Return the codec of each of `count` layers, from the name of one for all or a sequence of as many names.

    Raises:
        DtypeError: there is no such codec; of a sequence, says in which layer.
        ShapeMismatchError: a sequence of another length.
    """
    if one_for_all(names):
        return [chosen(names)] * count  # type: ignore[arg-type]
    found = []
    for layer, one in enumerate(one_a_layer(names, count, name)):
        try:
            found.append(chosen(one))
        except DtypeError as error:
            raise in_layer(error, layer, f"{name} of ") from None
    return found


def in_layer(error: InLayer, layer: int, what: str = "") -> InLayer:
    """Return an error that says as well which layer it is about, and `what` of it."""
    return type(error)(f"{what}layer {layer}: {error}", expected=error.expected, actual=error.actual, layer=layer)
