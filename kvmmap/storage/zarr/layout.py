"""The keys of a Zarr-backed cache within its group, and the metadata of its arrays. Pure: bytes, no storage."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

from ...errors import ShapeMismatchError
from ...format import NO_TOKEN, num_slots
from ...geometry import CacheGeometry, LayerGeometry
from ...state_spec import StateSpec
from ..libraries import zarr

SHARD_BLOCKS = 32
"""Blocks in a shard: 8,192 positions, so that a layer of 128k tokens is 64 objects."""

MAX_SHARD_BYTES = 2**32
"""A layer's rows in one shard, eight times what 128 heads x 256 take. Who reads a shard makes room for all of it."""

ROOT_KEY = "zarr.json"

RECENT_ARRAY = "recent_rows"
"""The array of a layer's rows in 16 bits, as records."""

COMPRESSORS: dict[str | None, int | None] = {None: None, "zstd": 3}
"""Names that users give, and zstd's level."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Keys and shapes, all following from the geometry."""

    geometry: CacheGeometry

    shard_blocks: int
    """Blocks in a shard, at least 1."""

    compressor: str | None
    """A key of COMPRESSORS."""

    @classmethod
    def plan(cls, geometry: CacheGeometry, compressor: str | None, shard_blocks: int = SHARD_BLOCKS) -> Layout:
        """Choose for a new cache: shards no longer than the capacity.

        Raises:
            ShapeMismatchError: not even one block makes a shard.
        """
        needed = -(-geometry.capacity // geometry.block_tokens)
        fitting = MAX_SHARD_BYTES // cls(geometry, 1, compressor).shard_bytes
        if not fitting:
            raise ShapeMismatchError(
                f"{geometry.block_tokens} positions of a layer are over {MAX_SHARD_BYTES:,} bytes, and a Zarr group "
                "has at least so many in one object: make a .kvm file",
                expected=MAX_SHARD_BYTES,
            )
        return cls(geometry, max(1, min(shard_blocks, needed, fitting)), compressor)

    @property
    def shard_tokens(self) -> int:
        """Positions in a shard."""
        return self.shard_blocks * self.geometry.block_tokens

    @property
    def shard_bytes(self) -> int:
        """Bytes of a shard's rows, of the layer that has the largest."""
        return self.shard_tokens * max(layer.position_bytes for layer in self.geometry.layers)

    @property
    def level(self) -> int | None:
        """zstd's level, or None."""
        return COMPRESSORS[self.compressor]

    def data_key(self, layer: int, array: str, shard: int) -> str:
        """Key of a shard of one of a layer's arrays, by its name in the geometry."""
        return f"layers/{layer}/{array}/c/{shard}" + _first_chunk(self.geometry.layers[layer], array)

    def recent_key(self, layer: int) -> str:
        """Key of a layer's rows in 16 bits, one chunk."""
        return f"layers/{layer}/{RECENT_ARRAY}/c/0/0"

    def tokens_key(self, chunk: int) -> str:
        """Key of a chunk of token ids, `shard_tokens` long."""
        return f"token_ids/c/{chunk}"

    def sums_key(self, chunk: int) -> str:
        """Key of a chunk of block checksums: those of a shard's blocks, [shard_blocks, num_layers]."""
        return f"block_checksums/c/{chunk}/0"

    def state_key(self, spec: StateSpec, slot: int) -> str:
        """Key of a state in a checkpoint slot: a chunk of the state's array."""
        return f"states/{spec.layer}/{spec.name}/c/{slot}" + "/0" * len(spec.shape)

    def arrays_metadata(self) -> dict[str, bytes]:
        """Return the zarr.json of all groups below the root and of all arrays, by key, as zarr-python makes them."""
        geometry, layers = self.geometry, self.geometry.num_layers
        found = {"layers/zarr.json": _group()}
        for layer, shape in enumerate(geometry.layers):
            found[f"layers/{layer}/zarr.json"] = _group()
            for name, metadata in _layer_arrays(self, shape).items():
                found[f"layers/{layer}/{name}/zarr.json"] = metadata
        tokens = self.shard_tokens
        found["token_ids/zarr.json"] = _array((geometry.capacity,), "<i4", (tokens,), NO_TOKEN, ("position",))
        blocks = (geometry.num_blocks, layers)
        names = ("block", "layer")
        found["block_checksums/zarr.json"] = _array(blocks, "<u8", (self.shard_blocks, layers), 0, names)
        for spec in geometry.states:
            found["states/zarr.json"] = found[f"states/{spec.layer}/zarr.json"] = _group()
            found[f"states/{spec.layer}/{spec.name}/zarr.json"] = _state_array(spec, num_slots(geometry))
        return found


@functools.lru_cache(maxsize=64)
def _first_chunk(shape: LayerGeometry, array: str) -> str:
    """What a shard's key has for the axes that are not split."""
    slab = next(slab for slab in shape.slabs if slab.name == array)
    return "/0" * len(slab.shape)


def _group() -> bytes:
    return json.dumps({"zarr_format": 3, "node_type": "group", "attributes": {}}).encode()


@functools.lru_cache(maxsize=64)
def _layer_arrays(layout: Layout, shape: LayerGeometry) -> dict[str, bytes]:
    """The metadata of a layer's arrays; the same for all layers of one shape."""
    found = {}
    for slab in shape.slabs:
        axes = ("position", "kv_head", "dim", *(f"dim_{axis}" for axis in range(1, len(slab.shape) - 1)))
        chunk = (layout.geometry.block_tokens, *slab.shape)
        shard = (layout.shard_tokens, *slab.shape)
        whole = (layout.geometry.capacity, *slab.shape)
        found[slab.name] = _array(whole, slab.dtype.str, chunk, 0, axes[: len(whole)], shard, layout.level)
    if layout.geometry.keeps_recent and shape.has_rows:
        records = (layout.geometry.sinks + layout.geometry.recent_window, shape.recent_bytes)
        found[RECENT_ARRAY] = _array(records, "|u1", records, 0, ("slot", "byte"))
    return found


def _state_array(spec: StateSpec, slots: int) -> bytes:
    """The metadata of a state's array, [checkpoint slot, *shape]. Zarr has no bfloat16: its bits are stored as u2."""
    dtype = "<u2" if spec.dtype == "bfloat16" else spec.numpy_dtype.str
    axes = ("checkpoint_slot", *(f"dim_{axis}" for axis in range(len(spec.shape))))
    attributes = {"dtype": "bfloat16"} if spec.dtype == "bfloat16" else {}
    return _array((slots, *spec.shape), dtype, (1, *spec.shape), 0, axes, attributes=attributes)


def _array(
    shape: tuple[int, ...],
    dtype: str,
    chunk: tuple[int, ...],
    fill: int,
    axes: tuple[str, ...],
    shard: tuple[int, ...] | None = None,
    level: int | None = None,
    attributes: dict[str, str] | None = None,
) -> bytes:
    """Let zarr-python make an array nowhere, and return the metadata that it wrote."""
    library = zarr()
    nowhere: dict[str, Any] = {}
    library.create_array(
        library.storage.MemoryStore(nowhere),
        shape=shape,
        dtype=dtype,
        chunks=chunk,
        shards=shard,
        compressors=None if level is None else library.codecs.ZstdCodec(level=level),
        filters=None,
        fill_value=fill,
        dimension_names=axes,
        attributes=attributes,
        zarr_format=3,
    )
    metadata: bytes = nowhere[ROOT_KEY].to_bytes()
    return metadata
