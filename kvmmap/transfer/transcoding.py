"""A storage as it would be with other codecs: what a copy that transcodes reads from.

Rows are decoded and encoded again part by part, so memory stays bounded however long the cache is. What that loses is
measured on the way. Keys or values whose codec stays the same pass as they are, bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..checks import non_finite
from ..codecs import RowCodec
from ..errors import ReadOnlyError
from ..geometry import CacheGeometry
from ..recent import RecentRows
from ..storage.protocols import LayerStore, Rows, Storage
from ..storage.readonly import ReadOnlyStorage

PART_NUMBERS = 2**20
"""Numbers of keys or values of a layer that are decoded at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodecLoss:
    """What keys or values of one layer lost by being transcoded: |new - old| / |old| of each row, in the L2 norm."""

    mean: float
    """Mean over all rows that were transcoded; 0 where the codec stayed the same."""

    worst: float
    """Loss of the row that lost most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerLoss:
    """What one layer lost by being transcoded."""

    keys: CodecLoss
    """Loss of its keys."""

    values: CodecLoss
    """Loss of its values."""


class _Tally:
    """Adds up the losses of rows."""

    def __init__(self) -> None:
        self.rows = 0
        self.total = 0.0
        self.worst = 0.0

    def add(self, old: NDArray[np.float32], new: NDArray[np.float32]) -> None:
        size = np.linalg.norm(old.astype(np.float64), axis=-1)
        error = np.linalg.norm(np.subtract(new, old, dtype=np.float64), axis=-1)
        relative = np.divide(error, size, out=np.zeros_like(error), where=size > 0)
        self.rows += relative.size
        self.total += float(relative.sum())
        self.worst = max(self.worst, float(relative.max(initial=0.0)))

    @property
    def loss(self) -> CodecLoss:
        return CodecLoss(mean=self.total / self.rows if self.rows else 0.0, worst=self.worst)


class TranscodedLayer(LayerStore):
    """A layer's rows by other codecs. Reads only."""

    def __init__(self, storage: TranscodedStorage, index: int, source: LayerStore) -> None:
        super().__init__(storage, index)
        self.index = source.index  # as errors name it
        self.length = source.length
        self._source = source
        self._tallies = _Tally(), _Tally()

    @property
    def loss(self) -> LayerLoss:
        """What the rows that were read have lost."""
        keys, values = self._tallies
        return LayerLoss(keys=keys.loss, values=values.loss)

    def rows(self, start: int, stop: int) -> Rows:
        made = Rows.empty(self.geometry, stop - start)
        done = 0
        for rows in self.iter_rows(start, stop):
            made.part(done, done + rows.num_positions).fill(rows)
            done += rows.num_positions
        return made

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        geometry = self.geometry
        numbers = geometry.num_kv_heads * max(geometry.head_dim, geometry.value_head_dim)
        most = max(1, PART_NUMBERS // max(1, numbers))
        for rows in self._source.iter_rows(start, stop):
            for first in range(0, rows.num_positions, most):
                yield self._transcode(start + first, rows.part(first, min(first + most, rows.num_positions)))
            start += rows.num_positions

    def write(self, start: int, rows: Rows) -> None:
        self._storage.check_writable()

    def recent_rows(self) -> RecentRows | None:
        return self._source.recent_rows()  # in 16 bits, whatever the codecs

    def prefetch(self, start: int, stop: int) -> None:
        self._source.prefetch(start, stop)

    def _transcode(self, position: int, rows: Rows) -> Rows:
        """Return stored rows by the other codecs; what they lose is added up."""
        old, new = self._source.geometry, self.geometry
        keys, values = self._tallies
        arrays: list[NDArray[np.generic]] = []
        for name, given, codec, target, dim, tally in (
            ("keys", rows.keys, old.key_codec, new.key_codec, new.head_dim, keys),
            ("values", rows.values, old.value_codec, new.value_codec, new.value_head_dim, values),
        ):
            if codec is target:
                arrays += given
            else:
                made, bad = _through(given, codec, target, dim, tally)
                if bad >= 0:
                    raise non_finite(self, name, position, bad, self.index)
                arrays += made
        return Rows.of(new, arrays)


def _through(
    given: tuple[NDArray[np.generic], ...], codec: RowCodec, target: RowCodec, dim: int, tally: _Tally
) -> tuple[list[NDArray[np.generic]], int]:
    """Encode rows of one codec by another; return the arrays, and the first row that can't be, or -1."""
    numbers = codec.decoded(given, dim)
    made: list[NDArray[np.generic]] = [
        np.empty((*numbers.shape[:-1], *array.shape), array.dtype) for array in target.arrays(dim)
    ]
    bad = target.encode(numbers, 0, made, 1)
    if bad < 0:
        tally.add(numbers, target.decoded(made, dim))
    return made, bad


class TranscodedStorage(ReadOnlyStorage):
    """A storage whose rows are by other codecs. Reads only, and closes nothing.

    Args:
        source: what it reads.
        layers: those of the source that it has.
        geometry: of these layers, with other codecs.
    """

    kind = "transcoded"

    def __init__(self, source: Storage, layers: Sequence[int], geometry: CacheGeometry) -> None:
        super().__init__(replace(geometry, capacity=0), source.document, source.path)  # no room for token ids
        self.geometry = geometry
        self.checkpoints = source.checkpoints
        self._source = source
        self.token_len = source.token_len
        self.layers: list[TranscodedLayer] = [
            TranscodedLayer(self, index, source.layers[layer]) for index, layer in enumerate(layers)
        ]

    def refuse_write(self) -> NoReturn:
        raise ReadOnlyError("a transcoded view of a cache is read only", path=self.path)

    def commit(self) -> None:
        self.refuse_write()

    def check(self) -> None:
        self._source.check()

    def version(self) -> int:
        return self._source.version()

    def validate(self, version: int) -> None:
        self._source.validate(version)

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        return self._source.read_tokens(count)

    def verify_rows(self, start: int, stop: int) -> None:
        self._source.verify_rows(start, stop)

    def identity(self) -> str | None:
        return self._source.identity()
