"""Slabs in this process's memory: reserved whole at once, zeroed lazily by the system, gone with the process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CacheChangedError, ClosedError
from ..format import NO_TOKEN
from ..geometry import CacheGeometry, LayerGeometry, check_room
from ..metadata import Document
from .protocols import Progress, Rows, Take, VerifyReport, publish_level, seq_len
from .sketches import ComputedSketches


def closed() -> ClosedError:
    return ClosedError("the cache is closed")


class MemoryLayer:
    """One layer's arrays; rows are quantised straight into them."""

    in_memory = True

    def __init__(self, index: int, geometry: LayerGeometry, capacity: int, block_tokens: int) -> None:
        self.index = index
        self.geometry = geometry
        self.capacity = capacity
        self._sketches = ComputedSketches(geometry, block_tokens)
        self.length = 0
        self._taken_back = 0
        self._slabs: Rows | None = Rows.allocate(geometry, capacity)
        self._views: Rows | None = self._slabs.part(0, capacity)
        for view in self._views:
            view.flags.writeable = False

    def begin(self, count: int) -> int:
        self.check()
        check_room(self.length, count, self.capacity, layer=self.index)
        return self.length

    def stage(self, start: int, count: int) -> Rows:
        assert self._slabs is not None
        return self._slabs.part(start, start + count)

    def write(self, start: int, rows: Rows) -> None:
        """Nothing to do: they were staged in place."""

    def publish(self, length: int) -> None:
        self.length = length

    def slabs(self) -> Rows:
        views = self._views
        if views is None:
            raise closed()
        return views

    def rows(self, start: int, stop: int) -> Rows:
        return self.slabs().part(start, stop)

    def stretches(self, start: int, stop: int) -> Iterator[Rows]:
        yield self.rows(start, stop)

    def stream(self, start: int, stop: int) -> Iterator[Rows]:
        return self.stretches(start, stop)

    def is_proven(self, stop: int) -> bool:
        return True

    def prove(self, ranges: NDArray[np.int64]) -> None:
        """Memory carries no checksums."""

    def expect(self, start: int, stop: int) -> None:
        """They are here."""

    def pour(self, start: int, stop: int, take: Take) -> None:
        """They lie in memory."""

    def release(self, start: int, stop: int) -> None:
        """They are nowhere else."""

    def mark(self) -> int:
        return self._taken_back

    def check_since(self, mark: int) -> None:
        if self._taken_back != mark:
            raise CacheChangedError("positions were taken back while they were being read: read again")

    def check(self) -> None:
        if self._views is None:
            raise closed()

    def tell_truncation(self) -> None:
        """Lengths were lowered, and what lies beyond them may be written over from now on."""
        self._taken_back += 1

    def sketches(self, blocks: int, mark: int) -> list[NDArray[np.uint16]]:
        return [self._sketches.between(0, blocks, self, mark)]

    def close(self) -> None:
        self._slabs = self._views = None


class MemoryStorage:
    """All layers' arrays."""

    def __init__(self, geometry: CacheGeometry, document: Document | None = None) -> None:
        self.geometry = geometry
        self.path: str | None = None
        self.writable = True
        self.lock = threading.RLock()
        self.layers = [
            MemoryLayer(number, layer, geometry.capacity, geometry.block_tokens)
            for number, layer in enumerate(geometry.layers)
        ]
        self.document = document or Document(None, {})
        self.token_len = 0
        self._tokens = np.full(geometry.capacity, NO_TOKEN, np.int32)

    @property
    def closed(self) -> bool:
        return self.layers[0]._views is None

    def mark(self) -> int:
        return self.layers[0].mark()

    def check_since(self, mark: int) -> None:
        self.layers[0].check_since(mark)

    def check(self) -> None:
        self.layers[0].check()

    def set_document(self, document: Document) -> None:
        self.check()
        document.encode()
        self.document = document

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        self._tokens[start : start + len(ids)] = ids

    def publish_tokens(self, length: int) -> None:
        self.token_len = length

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        return self._tokens[:count].copy()

    def publish_step(self, length: int) -> None:
        publish_level(self, length)

    def appended(self) -> None:
        """Memory has nothing to commit to."""

    def commit(self) -> None:
        self.check()

    def truncate(self, length: int) -> None:
        with self.lock:
            self.check()
            for layer in self.layers:
                layer.length = min(layer.length, length)
            self.token_len = min(self.token_len, length)
            for layer in self.layers:
                layer.tell_truncation()

    def refresh(self) -> bool:
        self.check()
        return False

    def close(self) -> None:
        with self.lock:
            for layer in self.layers:
                layer.close()

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Memory carries no checksums: there is nothing to compare."""
        self.check()
        return VerifyReport(path=None, seq_len=seq_len(self), verified=0)

    @property
    def committed_len(self) -> int:
        return 0

    def committed_sums(self, first: int, stop: int) -> NDArray[np.uint64]:
        assert first == stop
        return np.zeros((0, len(self.layers)), np.uint64)

    def check_rows(self, start: int, stop: int) -> None:
        """Memory carries no checksums."""

    def identity(self) -> str | None:
        return None

    def facts(self) -> dict[str, Any]:
        return {"kind": "memory"}
