"""One layer of a Zarr-backed cache, read: which shards its positions are in. The shard cache fetches them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...recent import RecentRows
from ..protocols import Rows
from ..readonly import ReadOnlyLayer, ReadOnlyStorage
from ..streaming import RowStream, WriteBytes
from .handle import GroupHandle
from .recent_rows import load_recent
from .shard_cache import ShardCache


class ZarrLayer(ReadOnlyLayer):
    """One layer's rows in the group.

    Args:
        storage: the storage that the layer belongs to.
        index: the layer's number.
        handle: the open group.
        shards: its fetched shards.
    """

    in_memory = False

    def __init__(self, storage: ReadOnlyStorage, index: int, handle: GroupHandle, shards: ShardCache) -> None:
        self._bind(storage, index, handle.geometry)
        self._handle = handle
        self._shards = shards
        self._loaded: tuple[int, int] | None = None
        """The length and version of the rows in 16 bits that are in memory."""

    def recent_rows(self) -> RecentRows | None:
        recent = self.recent
        if recent is not None and self._loaded != (self.length, self._handle.truncations):
            with self._handle.fetch_lock:
                self._load_recent(recent, self.length, self._handle.truncations)
        return recent

    def _load_recent(self, recent: RecentRows, length: int, version: int) -> None:
        if self._loaded is not None and self._loaded[1] != version:
            recent.clear()  # positions may have other rows since
        with self._handle.watching_closing():
            load_recent(self._handle, self.index, recent, self.rows, length)
        self._loaded = length, version

    @property
    def length(self) -> int:
        """Positions stored, as this handle sees them."""
        return self._handle.lengths[self.index]

    @length.setter
    def length(self, length: int) -> None:
        self._handle.lengths[self.index] = length

    def rows(self, start: int, stop: int) -> Rows:
        """Return positions [start, stop): views where they are in one shard, else a copy."""
        self.check()
        size = self._handle.layout.shard_tokens
        if start < stop <= start - start % size + size:
            return next(self.iter_rows(start, stop))
        whole = Rows.empty(self.geometry, stop - start)
        for position, rows in self._placed(start, stop):
            whole.part(position - start, position - start + len(rows[0])).fill(rows)
        for array in whole:
            array.flags.writeable = False
        return whole

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield positions [start, stop) shard by shard, while the next ones are fetched."""
        for _, rows in self._placed(start, stop):
            yield rows

    def _placed(self, start: int, stop: int) -> Iterator[tuple[int, Rows]]:
        size = self._handle.layout.shard_tokens
        for shard in range(start // size, -(-stop // size)):
            self._read_ahead(shard, start, stop)
            first, last = max(start, shard * size), min(stop, (shard + 1) * size)
            yield first, self._part(shard, first, last, streamed=stop - start > size)

    def _read_ahead(self, shard: int, start: int, stop: int) -> None:
        self._shards.read_ahead(self.index, shard, start, stop)

    def _part(self, shard: int, start: int, stop: int, *, streamed: bool) -> Rows:
        return self._shards.part(self.index, shard, start, stop, streamed=streamed)

    def prefetch(self, start: int, stop: int) -> None:
        self._shards.prefetch(self.index, start, stop)

    def stream_bytes(self, start: int, stop: int, write: WriteBytes) -> RowStream | None:
        return self._shards.stream_bytes(self.index, start, stop, write)

    def ensure_verified(self, ranges: NDArray[np.int64], threads: int = 1) -> None:
        """Fetching compares every block."""

    def version(self) -> int:
        return self._handle.truncations

    def validate(self, version: int) -> None:
        self._handle.validate(version)

    def check(self) -> None:
        self._handle.check()
