"""One layer of a Zarr-backed cache, read: which shards its positions lie in. How they come is the reader's business."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...geometry import LayerGeometry
from ..protocols import Rows
from ..readonly import ReadOnlyLayer
from ..streaming import RowStream, WriteBytes

if TYPE_CHECKING:
    from .reader import ZarrReader


class ZarrLayer(ReadOnlyLayer):
    """One layer's rows in the group."""

    in_memory = False

    def __init__(self, storage: ZarrReader, index: int, geometry: LayerGeometry) -> None:
        self.index = index
        self.geometry = geometry
        self.capacity = storage.geometry.capacity
        self.length = storage.root.seq_len
        # Not a cycle: a writer that is simply dropped gives its lock back at once.
        self._storage: ZarrReader = weakref.proxy(storage)

    def slabs(self) -> Rows:
        return self.rows(0, self.length)

    def rows(self, start: int, stop: int) -> Rows:
        """Positions [start, stop): views where they lie in one shard, else a copy."""
        self.check()
        size = self._storage.layout.shard_tokens
        if start < stop <= start - start % size + size:
            return next(self.iter_rows(start, stop))
        whole = Rows.allocate(self.geometry, stop - start)
        for position, rows in self._placed(start, stop):
            whole.part(position - start, position - start + len(rows[0])).fill(rows)
        for array in whole:
            array.flags.writeable = False
        return whole

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield positions [start, stop) piece by piece, while the next ones are fetched."""
        for _, rows in self._placed(start, stop):
            yield rows

    def _placed(self, start: int, stop: int) -> Iterator[tuple[int, Rows]]:
        size = self._storage.layout.shard_tokens
        for shard in range(start // size, -(-stop // size)):
            self._storage.read_ahead(self.index, shard, start, stop)
            first, last = max(start, shard * size), min(stop, (shard + 1) * size)
            yield first, self._storage.shard_part(self.index, shard, first, last, streamed=stop - start > size)

    def scan(self, start: int, stop: int) -> Iterator[Rows]:
        return self.iter_rows(start, stop)

    def is_verified(self, stop: int) -> bool:
        return True

    def ensure_verified(self, ranges: NDArray[np.int64]) -> None:
        """Fetching did."""

    def prefetch(self, start: int, stop: int) -> None:
        self._storage.prefetch(self.index, start, stop)

    def stream_bytes(self, start: int, stop: int, write: WriteBytes) -> RowStream | None:
        return self._storage.stream_bytes(self.index, start, stop, write)

    def release(self, start: int, stop: int) -> None:
        """What is kept of shards is bounded as it is."""

    def version(self) -> int:
        return self._storage.version()

    def validate(self, version: int) -> None:
        self._storage.validate(version)

    def check(self) -> None:
        self._storage.check()
