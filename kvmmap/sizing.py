"""Bytes of keys and values per token, by codec or preset, for a model's shape. Creates and opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .codecs.presets import PRESETS, Codecs, chosen_codecs, preset_recent
from .errors import ShapeMismatchError
from .geometry import CacheGeometry


@dataclass(frozen=True, slots=True, kw_only=True)
class Size:
    """What a cache of one preset takes."""

    preset: str
    """Its name."""

    key_codec: str
    """Name of the codec of keys."""

    value_codec: str
    """Name of the codec of values."""

    bytes_per_token: int
    """Keys and values of all layers at one position, scales included."""

    bits_per_number: float
    """The same for each of its numbers."""

    recent_bytes: int
    """What the last and first positions take in 16 bits besides: once, however long the cache is."""


def bytes_per_token(
    *,
    num_layers: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    value_head_dim: int | Sequence[int] | None = None,
    key_codec: Codecs | None = None,
    value_codec: Codecs | None = None,
    preset: str = "int8",
) -> int:
    """Return the bytes that keys and values of one position take in all layers, scales included.

    Checksums, sketches and metadata of a file come besides: some 1 % of it with 8 bits, and 2 % with 4.

    Args:
        num_layers, num_kv_heads, head_dim, value_head_dim, key_codec, value_codec, preset: as in `kvmmap.create`.

    Raises:
        ShapeMismatchError, DtypeError: as in `kvmmap.create`.
    """
    keys, values = chosen_codecs(preset, key_codec, value_codec)
    return _geometry(num_layers, num_kv_heads, head_dim, value_head_dim, keys, values).memory_bytes


def sizes(
    *,
    num_layers: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    value_head_dim: int | Sequence[int] | None = None,
) -> tuple[Size, ...]:
    """Return what a token takes with each preset that can have rows of this shape, in the order of `PRESETS`.

    Raises:
        ShapeMismatchError: as in `kvmmap.create`.
    """
    found = []
    for preset, (keys, values) in PRESETS.items():
        try:
            geometry = _geometry(num_layers, num_kv_heads, head_dim, value_head_dim, keys, values)
        except ShapeMismatchError:
            if preset == "int8":  # takes any head_dim: the shape itself is wrong
                raise
            continue
        window, sinks = preset_recent(preset)
        numbers = geometry.fp32_memory_bytes // 4
        found.append(
            Size(
                preset=preset,
                key_codec=keys,
                value_codec=values,
                bytes_per_token=geometry.memory_bytes,
                bits_per_number=8 * geometry.memory_bytes / numbers,
                recent_bytes=replace(geometry, recent_window=window, sinks=sinks).recent_bytes,
            )
        )
    return tuple(found)


def _geometry(
    num_layers: int,
    num_kv_heads: int | Sequence[int],
    head_dim: int | Sequence[int],
    value_head_dim: int | Sequence[int] | None,
    key_codec: Codecs,
    value_codec: Codecs,
) -> CacheGeometry:
    """Return the geometry of one position."""
    return CacheGeometry.build(
        num_layers=num_layers,
        capacity=1,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        value_head_dim=value_head_dim,
        key_codec=key_codec,
        value_codec=value_codec,
    )
