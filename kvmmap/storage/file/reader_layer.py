"""One layer of a mapped file, read: its slabs as views of the map, compared with their checksums when first touched.

Which positions there are, and whether they may still be believed, its storage knows.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...format import slab_sections
from ...geometry import LayerGeometry
from ..protocols import Rows
from ..readonly import ReadOnlyLayer
from ..sketches import ComputedSketches, KeptSketches
from . import page_cache
from .verified_blocks import is_proven, prove_rows

if TYPE_CHECKING:
    from .reader import MappedReader


class MappedLayer(ReadOnlyLayer):
    """One layer's slabs in the map."""

    in_memory = True

    def __init__(self, storage: MappedReader, index: int, geometry: LayerGeometry) -> None:
        self.index = index
        self.geometry = geometry
        self.capacity = storage.geometry.capacity
        self.length = 0
        self._offsets = [storage.superblock.sections[kind, index].offset for kind in slab_sections(geometry)]
        self._block_tokens = storage.geometry.block_tokens
        self._kept_sketches = KeptSketches(storage.superblock, index) if storage.superblock.has_sketches else None
        self._sketches = ComputedSketches(geometry, self._block_tokens)
        # Not a cycle: a writer that is simply dropped gives its lock back at once, and not when garbage is collected.
        self._storage: MappedReader = weakref.proxy(storage)
        self._slabs: Rows | None = None

    def slabs(self) -> Rows:
        slabs = self._slabs
        if slabs is None:
            slabs = self._slabs = self._storage.map_slabs(self.index)
            if self._storage.closed:  # meanwhile, by another thread: it must not keep the map
                self._slabs = None
        return slabs

    def is_verified(self, stop: int) -> bool:
        return is_proven(self._storage, self.index, stop)

    def ensure_verified(self, ranges: NDArray[np.int64]) -> None:
        prove_rows(self._storage, self.index, ranges)

    def rows(self, start: int, stop: int) -> Rows:
        if not self.is_verified(stop):
            self.ensure_verified(np.array([[start, stop]], np.int64))
        return self.slabs().part(start, stop)

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        yield self.rows(start, stop)

    def scan(self, start: int, stop: int) -> Iterator[Rows]:
        memory, row_bytes = self._storage.memory, self.geometry.slab_bytes(1)
        for part in page_cache.stretches(memory, self._offsets, row_bytes, start, stop):
            yield self.rows(part.start, part.stop)

    def prefetch(self, start: int, stop: int) -> None:
        for low, high in self._byte_ranges(start, stop):
            self._storage.file.read_ahead(low, high - low)

    def release(self, start: int, stop: int) -> None:
        page_cache.drop_pages(self._storage.memory, self._byte_ranges(start, stop))

    def _byte_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Where positions [start, stop) of each slab lie in the file."""
        row_bytes = self.geometry.slab_bytes(1)
        return [(at + start * row, at + stop * row) for at, row in zip(self._offsets, row_bytes, strict=True)]

    def version(self) -> int:
        return self._storage.snapshot.generation_word

    def validate(self, version: int) -> None:
        self._storage.validate(version)

    def sketches(self, blocks: int, version: int) -> list[NDArray[np.uint16]]:
        kept, pieces, storage = 0, [], self._storage
        if self._kept_sketches is not None:
            slot, proven = storage.snapshot.slot, storage.snapshot.proven
            committed = min(blocks, slot.seq_len // self._block_tokens)
            pieces.append(self._kept_sketches.first(committed, storage.memory, version, prove=proven is not None))
            kept = len(pieces[0])
        if kept < blocks:
            pieces.append(self._sketches.between(kept, blocks, self, version))
        return pieces

    def check(self) -> None:
        self._storage.check()
