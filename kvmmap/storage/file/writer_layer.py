"""One layer of a `.kvm` file that is appended to: rows go out with `pwrite`, and come back through the map.

What may be written when, and what makes it durable, is the writer's business.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ...format import Section
from ...geometry import LayerGeometry, check_room
from ..protocols import Rows
from ..sketches import sketch_checksum, sketch_stored
from .reader_layer import MappedLayer

if TYPE_CHECKING:
    from .writer import MappedWriter


class WriterLayer(MappedLayer):
    """One layer's slabs, written with `pwrite` and read through the map."""

    _storage: MappedWriter

    def __init__(self, storage: MappedWriter, index: int, geometry: LayerGeometry) -> None:
        super().__init__(storage, index, geometry)
        self._row_bytes = geometry.slab_bytes(1)

    @cached_property
    def _scratch(self) -> tuple[Rows, Rows]:
        # Made when the first rows come: a file may declare positions of gigabytes, and opening it must not need them.
        return self._storage.scratch(self.geometry)

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        length = self.length
        if length + count > self.capacity:
            check_room(length, count, self.capacity, layer=self.index)
        return length

    def stage(self, start: int, count: int) -> Rows:
        scratch, one = self._scratch
        if count == 1:
            return one
        return scratch if count >= len(scratch[0]) else scratch.part(0, count)

    def write(self, start: int, rows: Rows) -> None:
        at, size = self._offsets, self._row_bytes
        if len(at) == 4:  # as of int8; a loop would be a tenth of what a position costs
            a, b, c, d = at
            i, j, k, m = size
            offsets: tuple[int, ...] = (a + start * i, b + start * j, c + start * k, d + start * m)
        else:
            offsets = tuple([offset + start * row for offset, row in zip(at, size, strict=True)])
        self._storage.file.write(offsets, rows)

    def write_bytes(self, start: int, array: int, offset: int, data: Any) -> None:
        """Write bytes of one of the arrays, from `offset` on in what it has of positions from `start` on; and have
        them on their way to the disk. As with `write`, they are not part of the layer yet."""
        file, at = self._storage.file, self._offsets[array] + start * self._row_bytes[array] + offset
        file.write((at,), (data,))
        file.start_sync(at, len(data))

    def write_sketches(self, first: int, stop: int) -> NDArray[np.uint64]:
        """Write the sketches of blocks [first, stop), whose rows are written, and return their checksums."""
        sums = np.zeros(stop - first, np.uint64)
        at, block = self._storage.superblock.section(Section.KEY_SKETCHES, self.index).offset, first
        for part in sketch_stored(self.slabs().part, self.geometry, first, stop, self._block_tokens):
            self._storage.file.write((at + self.geometry.sketch_bytes(block),), (part.astype("<u2", copy=False),))
            for sketch in part:
                sums[block - first] = sketch_checksum(self.index, block, sketch)
                block += 1
        return sums

    def start_sync(self, start: int, stop: int) -> None:
        """Have positions that were written on their way to the disk before the next commit waits for it."""
        for low, high in self._byte_ranges(start, stop):
            self._storage.file.start_sync(low, high - low)

    def publish(self, length: int) -> None:
        try:
            self._storage.live.publish(self.index, length)
            self.length = length
        except BaseException:  # Ctrl-C between the two
            self._storage.unsettle()
            raise
