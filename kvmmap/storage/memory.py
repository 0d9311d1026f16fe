"""Layers in this process's memory: reserved at once, zeroed lazily by the operating system, gone with the process."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..geometry import CacheGeometry
from ..metadata import Document
from ..ranges import check_room
from .protocols import LayerStore, Rows, Storage
from .refusals import closed_error, refuse_truncated
from .rowless import RowlessLayer


class MemoryLayer(LayerStore):
    """One layer's arrays. Rows are quantised straight into them."""

    in_memory = True
    in_place = True

    def __init__(self, storage: Storage, index: int) -> None:
        super().__init__(storage, index)
        self._truncations = 0
        self._staged: Rows | None = None
        self._slabs: Rows | None = Rows.allocate(self.geometry, self.capacity)
        self._views: Rows | None = self._slabs.part(0, self.capacity).read_only()

    # Without a look at the storage: appending a position takes microseconds.

    def begin(self, count: int) -> int:
        if self._views is None:
            raise closed_error(None)
        length = self.length
        if length + count > self.capacity:
            check_room(length, count, self.capacity, layer=self.index)
        return length

    def stage(self, start: int, count: int) -> Rows:
        assert self._slabs is not None
        self._staged = rows = self._slabs.part(start, start + count)
        return rows

    def write(self, start: int, rows: Rows) -> None:
        if rows is not self._staged:  # which are where they belong
            assert self._slabs is not None
            self._slabs.part(start, start + len(rows[0])).fill(rows)

    def slabs(self) -> Rows:
        views = self._views
        if views is None:
            raise closed_error(None)
        return views

    def rows(self, start: int, stop: int) -> Rows:
        return self.slabs().part(start, stop)

    def version(self) -> int:
        return self._truncations

    def validate(self, version: int) -> None:
        if self._truncations != version:
            refuse_truncated(None)

    def check(self) -> None:
        if self._views is None:
            raise closed_error(None)

    def note_truncation(self) -> None:
        """Change the version, after lengths were lowered and before rows beyond them are overwritten."""
        self._truncations += 1

    def close(self) -> None:
        """Drop the arrays; they live as long as views of them."""
        self._slabs = self._views = self._staged = None


class MemoryStorage(Storage):
    """All layers' arrays."""

    kind = "memory"
    layers: Sequence[LayerStore]

    def __init__(self, geometry: CacheGeometry, document: Document | None = None) -> None:
        super().__init__(geometry, document)
        self._memory = {index: MemoryLayer(self, index) for index in geometry.row_layers}
        self.layers = [self._memory.get(index) or RowlessLayer(self, index) for index in range(geometry.num_layers)]
        self._first = self._memory[geometry.row_layers[0]]

    @property
    def closed(self) -> bool:
        return self._first._views is None

    def version(self) -> int:
        return self._first.version()

    def validate(self, version: int) -> None:
        self._first.validate(version)

    def commit(self) -> None:
        """Memory does not outlive the process: only states that were written become a checkpoint."""
        self.check()
        if self.checkpoints.staged == self.seq_len:
            self.checkpoints.name_staged()

    def truncate(self, length: int) -> None:
        with self.lock:
            self.check_writable()
            self._lower(length)
            for layer in self._memory.values():
                layer.note_truncation()

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        assert first == stop
        return super().committed_checksums(first, stop)

    def close(self) -> None:
        with self.lock:
            for layer in self._memory.values():
                layer.close()
