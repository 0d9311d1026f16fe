"""How two caches differ: where first, and by how much.

Rows of one codec are compared as stored bytes, and as numbers only where bytes differ; rows of two codecs as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..codecs import RowCodec
from ..errors import ShapeMismatchError
from ..geometry import LayerGeometry
from ..storage.protocols import Progress
from .gathering import read_parts
from .states import first_different_checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class PartDifference:
    """Keys, or values, of one layer."""

    first: int | None
    """The first position whose codes or scales differ, or numbers where codecs differ; None if none does."""

    rows: int
    """Rows compared: positions times heads."""

    different_rows: int
    """Rows whose codes or scale differ, or numbers where codecs differ."""

    largest: float
    """The largest absolute difference of two numbers."""

    mean: float
    """The mean absolute difference, over all rows compared."""

    relative: float
    """Root mean square of the differences over that of the first cache's numbers; 0.0 where both are zero."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerDifference:
    """One layer."""

    index: int
    """Which one, from 0."""

    keys: PartDifference
    """How its keys differ."""

    values: PartDifference
    """How its values differ."""

    @property
    def first(self) -> int | None:
        """The first position that differs in keys or values."""
        return _earliest(self.keys.first, self.values.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheDifference:
    """Two caches of the same shape."""

    lengths: tuple[int, int]
    """Positions stored in each."""

    compared: int
    """Positions that both have; only these are compared."""

    first_token: int | None
    """The first of them whose token ids differ (-1, not recorded, is an id here); None if none does."""

    same_about: bool
    """True if model and metadata are the same."""

    layers: tuple[LayerDifference, ...]
    """One a layer, in order."""

    first_checkpoint: int | None = None
    """The first position at which both have a checkpoint, with other states; None if there is none."""

    @property
    def first(self) -> int | None:
        """The first position that differs in any layer."""
        return _earliest(*(layer.first for layer in self.layers))

    @property
    def same(self) -> bool:
        """True if length, token ids, every row, and the states of checkpoints that both have are the same; model and
        metadata need not be."""
        differing = (self.first_token, self.first, self.first_checkpoint)
        return self.lengths[0] == self.lengths[1] and differing == (None, None, None)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON types."""
        plain = asdict(self) | {"first": self.first, "same": self.same}
        plain["lengths"] = list(self.lengths)
        plain["layers"] = [
            layer | {"first": told.first} for layer, told in zip(plain["layers"], self.layers, strict=True)
        ]
        return plain


def compare(a: QuantizedKvCache, b: QuantizedKvCache, *, progress: Progress | None = None) -> CacheDifference:
    """Compare what two caches hold, as far as both go, in bounded memory.

    Capacity, storage, commits and rows in 16 bits don't count: a cache and its resized copy are the same. Caches of
    other codecs are compared by the numbers that their rows stand for: what `kvmmap.copy` has lost, for example.

    Raises:
        ShapeMismatchError: their layers have other numbers of heads, or other dimensions.
        CacheChangedError: a writer truncated meanwhile: refresh, and compare again.
        ClosedError: one of them is closed.
    """
    dims = [[layer.dims for layer in cache.geometry.layers] for cache in (a, b)]
    if dims[0] != dims[1] or a.states != b.states:
        raise _unlike(a, b)
    length = min(a.seq_len, b.seq_len)
    total = length * sum(layer.position_bytes for layer in a.geometry.layers)
    done, layers = 0, []
    for number in range(a.num_layers):
        geometry, other = a.geometry.layers[number], b.geometry.layers[number]
        keys = _Differences((geometry.key_codec, other.key_codec), geometry.num_kv_heads, geometry.head_dim)
        values = _Differences((geometry.value_codec, other.value_codec), geometry.num_kv_heads, geometry.value_head_dim)
        mine, others = (read_parts(cache.layers[number], length) for cache in (a, b))
        for (start, x), (_, y) in zip(mine, others, strict=True) if geometry.has_rows else ():
            keys.add(start, x.keys, y.keys)
            values.add(start, x.values, y.values)
            done += x.num_positions * geometry.position_bytes
            if progress:
                progress(done, total)
        layers.append(LayerDifference(index=number, keys=keys.result(), values=values.result()))
    ids = np.flatnonzero(a.token_ids[:length] != b.token_ids[:length])
    return CacheDifference(
        lengths=(a.seq_len, b.seq_len),
        compared=length,
        first_token=int(ids[0]) if len(ids) else None,
        same_about=(a.model, a.metadata) == (b.model, b.metadata),
        layers=tuple(layers),
        first_checkpoint=first_different_checkpoint(a, b),
    )


class _Differences:
    """What differs in one part of one layer, counted part by part."""

    def __init__(self, codecs: tuple[RowCodec, RowCodec], heads: int, dim: int) -> None:
        self.codecs = codecs
        self.heads = heads
        self.dim = dim
        self.first: int | None = None
        self.positions = 0
        self.different = 0
        self.numbers = 0
        self.largest = 0.0
        self.sum = 0.0
        self.squares = 0.0
        self.power = 0.0

    def add(self, start: int, mine: Sequence[NDArray[Any]], others: Sequence[NDArray[Any]]) -> None:
        codec, other_codec = self.codecs
        numbers = codec.decoded(mine, self.dim)
        self.positions += len(numbers)
        self.numbers += numbers.size
        self.power += float(np.square(numbers, dtype=np.float64).sum())
        theirs = None
        if codec is other_codec:
            different = np.zeros(numbers.shape[:2], bool)
            for one, other in zip(mine, others, strict=True):
                different |= (_as_bytes(one) != _as_bytes(other)).any(axis=-1)
        else:
            theirs = other_codec.decoded(others, self.dim)
            different = (numbers != theirs).any(axis=-1)
        if not different.any():
            return
        if theirs is None:
            theirs = codec.decoded(others, self.dim)
        if self.first is None:
            self.first = start + int(different.any(axis=1).argmax())
        self.different += int(different.sum())
        off = np.subtract(numbers, theirs, dtype=np.float64)
        np.abs(off, out=off)
        self.largest = max(self.largest, float(off.max()))
        self.sum += float(off.sum())
        self.squares += float(np.square(off, out=off).sum())

    def result(self) -> PartDifference:
        numbers = max(self.numbers, 1)
        return PartDifference(
            first=self.first,
            rows=self.positions * self.heads,
            different_rows=self.different,
            largest=self.largest,
            mean=self.sum / numbers,
            relative=math.sqrt(self.squares / self.power) if self.power else 0.0,
        )


def _as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """Rows of an array, [n, heads, ...], as bytes [n, heads, bytes]."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(*array.shape[:2], -1)


def _earliest(*positions: int | None) -> int | None:
    return min((position for position in positions if position is not None), default=None)


def _unlike(a: QuantizedKvCache, b: QuantizedKvCache) -> ShapeMismatchError:
    """Describe the difference between two shapes."""
    numbers = f"{a.num_layers} layers, and {b.num_layers}"
    what = next(_shapes(a, b)) if a.num_layers == b.num_layers else numbers
    return ShapeMismatchError(
        f"the caches have different shapes ({what}), so their rows can't be compared",
        expected=a.geometry.layers,
        actual=b.geometry.layers,
    )


def _shapes(a: QuantizedKvCache, b: QuantizedKvCache) -> Iterator[str]:
    for number, (mine, others) in enumerate(zip(a.geometry.layers, b.geometry.layers, strict=True)):
        if mine.dims != others.dims:
            yield f"layer {number} has {_shape(mine)}, and {_shape(others)}"
    yield f"they have {len(a.states)} states, and {len(b.states)}, or others"


def _shape(layer: LayerGeometry) -> str:
    return f"{layer.num_kv_heads} KV heads x {layer.head_dim} (values {layer.value_head_dim})"
