"""The codecs there are, by name and by the two bytes that stand for one in a file."""

from __future__ import annotations

import copyreg
from typing import Any

from ..errors import DtypeError
from .base import RowCodec

_by_name: dict[str, RowCodec] = {}
_by_id: dict[tuple[int, int], RowCodec] = {}

MAX_ARRAYS = 2
"""Arrays that a codec may have: a `.kvm` file has two sections for a layer's keys, and two for its values."""


def register(codec: RowCodec) -> RowCodec:
    """Make a codec known, and return it. To register it again changes nothing.

    Raises:
        ValueError: another codec has its name or its bytes, or bytes that can't be.
    """
    place = codec.id, codec.transform
    if _by_name.get(codec.name) is codec:
        return codec
    if codec.name in _by_name or place in _by_id:
        raise ValueError(f"codec {codec.name!r} ({codec.id}, {codec.transform}): its name or its bytes are taken")
    if not (1 <= codec.id <= 255 and 0 <= codec.transform <= 255):
        raise ValueError(f"codec {codec.name!r}: its bytes must be from 1 and from 0 to 255, not {place}")
    _by_name[codec.name] = _by_id[place] = codec
    copyreg.pickle(type(codec), _named)  # there is one of each: copies and other processes look it up
    return codec


def _named(codec: RowCodec) -> tuple[Any, tuple[str]]:
    return by_name, (codec.name,)


def by_name(name: str) -> RowCodec:
    """Return the codec of a name.

    Raises:
        DtypeError: there is none.
    """
    if not isinstance(name, str):
        raise DtypeError(
            f"a codec is named by a string, or codecs by a list of one a layer, and not by {name!r}",
            expected=offered(),
            actual=str(name),
        )
    codec = _by_name.get(name)
    if codec is None:
        raise DtypeError(
            f"there is no codec {name!r}: this kvmmap has {', '.join(offered())}", expected=offered(), actual=str(name)
        )
    return codec


def chosen(name: str) -> RowCodec:
    """Return the codec that a user names: as `by_name`, or as reports name one whose rows are not transformed.

    Raises:
        DtypeError: there is none.
    """
    if isinstance(name, str) and name not in _by_name:
        for codec in _by_name.values():
            if (codec.id_name, codec.transform_name) == (name, "none"):
                return codec
    return by_name(name)


def by_id(id: int, transform: int) -> RowCodec | None:
    """Return the codec of two bytes in a file, None if there is none."""
    return _by_id.get((id, transform))


def names() -> tuple[str, ...]:
    """Return the names of all codecs."""
    return tuple(_by_name)


def offered() -> tuple[str, ...]:
    """Return the names of the codecs that a user may want to choose."""
    return tuple(name for name, codec in _by_name.items() if codec.offered)


def known_ids() -> dict[int, str]:
    """Return the codec bytes that are known, with their names."""
    return {codec.id: codec.id_name for codec in _by_name.values()}


def known_transforms(id: int) -> dict[int, str]:
    """Return the transform bytes that are known beside a codec byte, with their names."""
    return {codec.transform: codec.transform_name for codec in _by_name.values() if codec.id == id}


def shown_name(id_name: str, transform_name: str) -> str:
    """Return what to call a codec of which a report has the names of its two bytes: its own if rows are transformed."""
    if transform_name == "none":
        return id_name
    known = {(codec.id_name, codec.transform_name): codec.name for codec in _by_name.values()}
    return known.get((id_name, transform_name), f"{id_name} after {transform_name}")
