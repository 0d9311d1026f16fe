"""Rows, token ids and their checksums read with `pread`, and not through the map.

What the disk can't read is an error to report then, and not a signal that ends the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ...format import Extent, Section, Superblock, slab_sections
from ..protocols import Rows

PIECE_BYTES = 1 << 20
"""Bytes that `pieces` reads at a time."""


class BlockReader:
    """Reads any positions of a file.

    Args:
        superblock: the file's.
        read: fills a buffer from an offset of the file.
    """

    def __init__(self, superblock: Superblock, read: Callable[[int, memoryview], None]) -> None:
        self._superblock = superblock
        self._read = read
        self._room = memoryview(b"")  # of `pieces`: fresh memory takes as long to clear as to fill

    def row_extents(self, layer: int, start: int, stop: int) -> list[Extent]:
        """Return where the file has positions [start, stop) of each of a layer's arrays."""
        geometry = self._superblock.geometry.layers[layer]
        offsets = [self._superblock.sections[kind, layer].offset for kind in slab_sections(geometry)]
        sizes = geometry.slab_bytes(1)
        return [Extent(at + start * size, (stop - start) * size) for at, size in zip(offsets, sizes, strict=True)]

    def token_extent(self, start: int, stop: int) -> Extent:
        """Return where the file has the token ids of positions [start, stop)."""
        return Extent(self._superblock.section(Section.TOKEN_IDS).offset + 4 * start, 4 * (stop - start))

    def rows(self, layer: int, start: int, stop: int) -> Rows:
        """Read positions [start, stop) of a layer."""
        geometry = self._superblock.geometry.layers[layer]
        return Rows.of_bytes(geometry, [self._bytes(extent) for extent in self.row_extents(layer, start, stop)])

    def token_ids(self, start: int, stop: int) -> NDArray[np.int32]:
        """Read the token ids of positions [start, stop)."""
        return np.frombuffer(self._bytes(self.token_extent(start, stop)), "<i4")

    def checksums(self, section: Section, first: int, count: int) -> list[int]:
        """Read checksums from one of the sections that hold some."""
        at = self._superblock.section(section).offset + 8 * first
        values: list[int] = np.frombuffer(self._bytes(Extent(at, 8 * count)), "<u8").tolist()
        return values

    def pieces(self, extent: Extent) -> Iterator[memoryview]:
        """Yield a range of the file in parts of bounded size; each is valid until this reader is asked for another."""
        wanted = min(extent.size, PIECE_BYTES)
        if len(self._room) < wanted:
            self._room = memoryview(bytearray(wanted))
        room = self._room
        for start in range(0, extent.size, PIECE_BYTES):
            piece = room[: min(wanted, extent.size - start)]
            self._read(extent.offset + start, piece)
            yield piece

    def _bytes(self, extent: Extent) -> bytearray:
        data = bytearray(extent.size)
        if data:
            self._read(extent.offset, memoryview(data))
        return data
