"""Shapes, strides and byte arithmetic of caches and layers. Pure: no rows, no files.

Sizes count what is reserved (the whole capacity), as `memory_bytes` does; how much of it a sparse file really
occupies is the file system's business.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .codecs import INT8, RowCodec
from .codecs.presets import Codecs, chosen_codecs, chosen_recent
from .codecs.registry import MAX_ARRAYS
from .errors import ShapeMismatchError
from .per_layer import codecs_a_layer, in_layer, one_a_layer, one_for_all
from .ranges import index
from .state_spec import CHECKPOINT_SLOTS, MAX_CHECKPOINT_SLOTS, StateSpec, aligned, check_states

BLOCK_TOKENS = 256
"""Positions in a block, the unit of checksums, of zarr chunks and of sketches."""

MAX_LAYERS = 65_535
MAX_HEADS = 65_535
MAX_HEAD_DIM = 65_535
MAX_CAPACITY = 2**40 - 1
MAX_SLAB_BYTES = 2**56
RECENT_HEAD_BYTES = 24
MAX_RECENT = 65_536
"""Positions that a recent window has at most, and sinks that there are at most."""
MAX_STATE_CAPACITY = 2**39 - 2


def _bounded(value: object, name: str, low: int, high: int) -> int:
    number = index(value, name)
    if not low <= number <= high:
        raise ShapeMismatchError(
            f"{name} must be from {low} to {high}, not {number}", expected=(low, high), actual=number
        )
    return number


@dataclass(frozen=True, slots=True)
class Slab:
    """One array of a layer, [capacity, *shape]: keys' or values', as their codec stores them."""

    name: str
    """Such as "key_codes"."""

    dtype: np.dtype[Any]
    """Little-endian."""

    shape: tuple[int, ...]
    """What a position takes: [num_kv_heads, ...]."""

    row_bytes: int
    """Bytes of a position."""


@dataclass(frozen=True, slots=True)
class LayerGeometry:
    """The shape of one layer's rows, and how they are stored."""

    num_kv_heads: int
    """Key and value heads (not query heads), 1 to 65,535; 0 for a layer without rows."""

    head_dim: int
    """Numbers in a key row, 1 to 65,535; 0 without rows."""

    value_head_dim: int
    """Numbers in a value row; the same as `head_dim` in most models."""

    key_codec: RowCodec = INT8
    """How key rows are stored."""

    value_codec: RowCodec = INT8
    """How value rows are stored."""

    key_slabs: tuple[Slab, ...] = field(init=False, repr=False, compare=False)
    """Arrays of keys, one or two."""

    slabs: tuple[Slab, ...] = field(init=False, repr=False, compare=False)
    """Arrays of keys, then of values: the order in which everything lists them."""

    position_bytes: int = field(init=False, repr=False, compare=False)
    """Bytes of one position: keys and values as they are stored."""

    def __post_init__(self) -> None:
        put = functools.partial(object.__setattr__, self)
        put("num_kv_heads", _bounded(self.num_kv_heads, "num_kv_heads", 0, MAX_HEADS))
        if not self.num_kv_heads:
            # All layers without rows are equal, whatever dims and codecs the others have.
            for name in ("head_dim", "value_head_dim"):
                put(name, 0 * _bounded(getattr(self, name), name, 0, MAX_HEAD_DIM))
            for name, value in (("key_codec", INT8), ("value_codec", INT8), ("key_slabs", ()), ("slabs", ())):
                put(name, value)
            put("position_bytes", 0)
            return
        put("head_dim", _bounded(self.head_dim, "head_dim", 1, MAX_HEAD_DIM))
        put("value_head_dim", _bounded(self.value_head_dim, "value_head_dim", 1, MAX_HEAD_DIM))
        put("key_slabs", _slabs("key", self.key_codec, self.num_kv_heads, self.head_dim))
        put("slabs", (*self.key_slabs, *_slabs("value", self.value_codec, self.num_kv_heads, self.value_head_dim)))
        put("position_bytes", sum([slab.row_bytes for slab in self.slabs]))

    @property
    def has_rows(self) -> bool:
        """False for a layer that keeps no keys and values: it has states, or shares another layer's."""
        return self.num_kv_heads > 0

    @property
    def dims(self) -> tuple[int, int, int]:
        """`num_kv_heads`, `head_dim` and `value_head_dim`: what must agree with a model, whatever the codecs."""
        return self.num_kv_heads, self.head_dim, self.value_head_dim

    @property
    def value_slabs(self) -> tuple[Slab, ...]:
        """Arrays of values, one or two."""
        return self.slabs[len(self.key_slabs) :]

    @property
    def fp32_position_bytes(self) -> int:
        """Bytes that the same position takes as f32."""
        return self.num_kv_heads * (self.head_dim + self.value_head_dim) * 4

    def slab_bytes(self, capacity: int) -> tuple[int, ...]:
        """Bytes of each of `slabs` for `capacity` positions."""
        return tuple([capacity * slab.row_bytes for slab in self.slabs])

    @property
    def recent_bytes(self) -> int:
        """Bytes of a position's record in 16 bits: its head, keys and values, rounded up to 8; 0 without rows."""
        if not self.has_rows:
            return 0
        numbers = self.num_kv_heads * (self.head_dim + self.value_head_dim)
        return RECENT_HEAD_BYTES + -(-2 * numbers // 8) * 8

    def sketch_bytes(self, blocks: int) -> int:
        """Bytes of the sketches of so many blocks: two bf16 numbers for each channel of each KV head."""
        return blocks * self.num_kv_heads * 2 * self.head_dim * 2


def _slabs(part: str, codec: RowCodec, heads: int, dim: int) -> tuple[Slab, ...]:
    codec.check_dim(dim)
    arrays = codec.arrays(dim)
    if not 1 <= len(arrays) <= MAX_ARRAYS:
        raise ShapeMismatchError(
            f"codec {codec.name} has {len(arrays)} arrays for rows of {dim}; a layer keeps 1 to {MAX_ARRAYS} of keys, "
            "and of values",
            expected=(1, MAX_ARRAYS),
            actual=len(arrays),
        )
    return tuple(
        Slab(f"{part}_{array.name}", array.dtype, (heads, *array.shape), heads * array.row_bytes) for array in arrays
    )


@dataclass(frozen=True, slots=True)
class CacheGeometry:
    """The shape of a whole cache: its layers may differ in theirs."""

    capacity: int
    """Token positions reserved in every layer, 0 to 2**40 - 1."""

    layers: tuple[LayerGeometry, ...]
    """At least one, and at least one with rows."""

    block_tokens: int = BLOCK_TOKENS
    """Positions in a block."""

    recent_window: int = 0
    """Last positions that are kept in 16 bits besides, 0 to 65,536."""

    sinks: int = 0
    """First positions that are kept in 16 bits besides, 0 to 65,536."""
    states: tuple[StateSpec, ...] = ()
    """States of fixed size, in the order in which they are stored."""

    checkpoint_slots: int = CHECKPOINT_SLOTS
    """Checkpoints of all states that are kept, 1 to 4,096; 0 without states."""

    row_layers: tuple[int, ...] = field(init=False, repr=False, compare=False)
    """Indices of the layers that have rows; at least one."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacity", _bounded(self.capacity, "capacity", 0, MAX_CAPACITY))
        object.__setattr__(self, "recent_window", _bounded(self.recent_window, "recent_window", 0, MAX_RECENT))
        object.__setattr__(self, "sinks", _bounded(self.sinks, "sinks", 0, MAX_RECENT))
        object.__setattr__(self, "block_tokens", _bounded(self.block_tokens, "block_tokens", 1, 2**20))
        _bounded(len(self.layers), "num_layers", 1, MAX_LAYERS)
        # Layers of one shape share one object mostly, and comparing shapes takes longer than all else here.
        shapes = {id(layer): layer for layer in self.layers}
        rows: Iterable[int] = range(len(self.layers))
        if not all(layer.num_kv_heads for layer in shapes.values()):
            rows = [number for number in rows if self.layers[number].has_rows]
        object.__setattr__(self, "row_layers", tuple(rows))
        self._check_states()
        for layer in shapes.values():
            largest = max(layer.slab_bytes(self.capacity), default=0)
            if largest > MAX_SLAB_BYTES:
                number = self.layers.index(layer)
                raise ShapeMismatchError(
                    f"layer {number} would need a slab of {largest:,} bytes; the limit is {MAX_SLAB_BYTES:,}: "
                    "lower the capacity",
                    expected=MAX_SLAB_BYTES,
                    actual=largest,
                    layer=number,
                )

    def _check_states(self) -> None:
        if not self.row_layers:
            raise ShapeMismatchError(
                "no layer has rows (num_kv_heads is 0 in all of them): at least one must, since positions are counted "
                "in rows",
                expected=1,
                actual=0,
            )
        if not self.states:
            object.__setattr__(self, "states", ())
            object.__setattr__(self, "checkpoint_slots", 0)
            return
        object.__setattr__(self, "states", check_states(self.states, len(self.layers)))
        slots = _bounded(self.checkpoint_slots, "checkpoint_slots", 1, MAX_CHECKPOINT_SLOTS)
        object.__setattr__(self, "checkpoint_slots", slots)
        if self.capacity > MAX_STATE_CAPACITY:
            raise ShapeMismatchError(
                f"capacity must be at most {MAX_STATE_CAPACITY:,} in a cache with states, not {self.capacity:,}",
                expected=MAX_STATE_CAPACITY,
                actual=self.capacity,
            )

    @classmethod
    def build(
        cls,
        *,
        num_layers: int,
        capacity: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        value_head_dim: int | Sequence[int] | None = None,
        key_codec: str | Sequence[str] = "int8",
        value_codec: str | Sequence[str] = "int8",
        recent_window: int = 0,
        sinks: int = 0,
        states: Iterable[StateSpec] = (),
        checkpoint_slots: int = CHECKPOINT_SLOTS,
    ) -> CacheGeometry:
        """Build a geometry from numbers and names of codecs: one for all layers, or a sequence with one a layer.

        Raises:
            ShapeMismatchError: a number out of bounds, a codec that can't have rows of a layer, or a sequence that is
                not `num_layers` long. Names the layer where layers differ.
            DtypeError: there is no such codec.
        """
        count = _bounded(num_layers, "num_layers", 1, MAX_LAYERS)

        heads = one_a_layer(num_kv_heads, count, "num_kv_heads")
        dims = one_a_layer(head_dim, count, "head_dim")
        value_dims = dims if value_head_dim is None else one_a_layer(value_head_dim, count, "value_head_dim")
        key_codecs = codecs_a_layer(key_codec, count, "key_codec")
        value_codecs = codecs_a_layer(value_codec, count, "value_codec")
        alike = all(map(one_for_all, (num_kv_heads, head_dim, value_head_dim, key_codec, value_codec)))
        shapes = zip(heads, dims, value_dims, key_codecs, value_codecs, strict=True)
        # Most layers have the shape of the one before; building each anew took much of the time of opening a cache.
        layers: list[LayerGeometry] = []
        last: tuple[Any, ...] | None = None
        for shape in shapes:
            if last is None or any(one is not other for one, other in zip(shape, last, strict=True)):
                try:
                    layers.append(LayerGeometry(*shape))
                except ShapeMismatchError as error:
                    if alike:
                        raise
                    raise in_layer(error, len(layers)) from None
            else:
                layers.append(layers[-1])
            last = shape
        return cls(
            capacity=capacity,
            layers=tuple(layers),
            recent_window=recent_window,
            sinks=sinks,
            states=tuple(states),
            checkpoint_slots=checkpoint_slots,
        )

    @classmethod
    def of_preset(
        cls,
        preset: str,
        *,
        key_codec: Codecs | None = None,
        value_codec: Codecs | None = None,
        recent_window: int | None = None,
        sinks: int | None = None,
        **shape: Any,
    ) -> CacheGeometry:
        """Build a geometry as `build` does, with a preset's codecs, window and sinks where none are given."""
        keys, values = chosen_codecs(preset, key_codec, value_codec)
        window, first = chosen_recent(preset, recent_window, sinks, keys, values)
        return cls.build(key_codec=keys, value_codec=values, recent_window=window, sinks=first, **shape)

    @property
    def num_layers(self) -> int:
        """Transformer layers."""
        return len(self.layers)

    @property
    def keeps_recent(self) -> bool:
        """True if some positions are kept in 16 bits besides."""
        return bool(self.recent_window or self.sinks)

    @property
    def recent_bytes(self) -> int:
        """Bytes of the rows in 16 bits, all layers."""
        return (self.recent_window + self.sinks) * sum(layer.recent_bytes for layer in self.layers)

    @property
    def num_kv_heads(self) -> int:
        """Key and value heads of every layer that has rows.

        Raises:
            ShapeMismatchError: layers differ; names them.
        """
        return self._of_every_layer("num_kv_heads")

    @property
    def head_dim(self) -> int:
        """Numbers in a key row of every layer. Raises as `num_kv_heads`."""
        return self._of_every_layer("head_dim")

    @property
    def value_head_dim(self) -> int:
        """Numbers in a value row of every layer. Raises as `num_kv_heads`."""
        return self._of_every_layer("value_head_dim")

    def _of_every_layer(self, name: str) -> int:
        by_number: dict[int, list[int]] = {}
        for number, layer in enumerate(self.layers):
            if not layer.has_rows:
                continue
            by_number.setdefault(getattr(layer, name), []).append(number)
        if len(by_number) == 1:
            return next(iter(by_number))
        each = "; ".join(f"{value} in {_layer_list(layers)}" for value, layers in by_number.items())
        raise ShapeMismatchError(
            f"layers differ in {name}: {each}; ask each layer, cache.layers[i].{name}",
            expected="one number for all layers",
            actual={value: tuple(layers) for value, layers in by_number.items()},
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint's tensors, as they are stored."""
        return sum([aligned(spec.nbytes) for spec in self.states])

    @property
    def num_blocks(self) -> int:
        """Complete blocks that fit into the capacity; what is left over is always a tail."""
        return self.capacity // self.block_tokens

    @property
    def memory_bytes(self) -> int:
        """Bytes of keys and values as they are stored, over the whole capacity, all layers."""
        return self.capacity * sum(layer.position_bytes for layer in self.layers)

    @property
    def fp32_memory_bytes(self) -> int:
        """Bytes of the same keys and values as f32."""
        return self.capacity * sum(layer.fp32_position_bytes for layer in self.layers)


def _layer_list(numbers: list[int]) -> str:
    """Return "layers 0, 4-7 and 9", at most eight of its parts, for ascending layer numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    parts = [str(first) if first == last else f"{first}-{last}" for first, last in runs]
    if len(parts) > 8:
        parts = [*parts[:7], f"{sum(last - first + 1 for first, last in runs[7:])} more"]
    text = parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    return f"layer{'s' if len(numbers) > 1 else ''} {text}"
