"""Layer entries of a superblock, decoded."""

from __future__ import annotations

import functools

from ..codecs import RowCodec
from ..codecs.registry import by_id, known_ids, known_transforms
from ..errors import VersionMismatchError
from ..geometry import LayerGeometry
from .records import LAYER_ENTRY


def decode_layers(data: memoryview, path: str) -> tuple[LayerGeometry, ...]:
    """Return one object a shape, which all layers of that shape share."""
    size, whole = LAYER_ENTRY.size, bytes(data)
    entries = [whole[start : start + size] for start in range(0, len(whole), size)]
    shapes: dict[bytes, LayerGeometry] = {}
    for entry in dict.fromkeys(entries):
        heads, dim, value_dim, key, key_transform, value, value_transform = LAYER_ENTRY.struct.unpack(entry)
        number = entries.index(entry)
        key_codec = _codec("key", (key, key_transform), number, path)
        value_codec = _codec("value", (value, value_transform), number, path)
        shapes[entry] = _shape(heads, dim, value_dim, key_codec, value_codec)
    return tuple([shapes[entry] for entry in entries])


@functools.lru_cache(maxsize=64)
def _shape(heads: int, dim: int, value_dim: int, key_codec: RowCodec, value_codec: RowCodec) -> LayerGeometry:
    return LayerGeometry(heads, dim, value_dim, key_codec, value_codec)


def _codec(part: str, place: tuple[int, int], layer: int, path: str) -> RowCodec:
    id, transform = place
    codec = by_id(id, transform)
    if codec is not None:
        return codec
    what, known, value = "codec", known_ids(), id
    if id in known:
        what, known, value = "transform", known_transforms(id), transform
    raise VersionMismatchError(
        f"{path}: layer {layer} has {part} {what} {value}, and this kvmmap knows {known}: use a newer kvmmap",
        path=path,
        expected=tuple(known),
        actual=value,
        layer=layer,
    )
