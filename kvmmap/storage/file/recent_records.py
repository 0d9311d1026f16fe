"""The records of rows in 16 bits in a `.kvm` file: reading those of a layer, and writing what was appended.

A record counts where its checksum and the digest of the coded row match, so none is ever the one of another row: not
one that was torn or never reached the disk, nor one of a row that was truncated. Which positions count is not known
here.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...format import RECENT_SECTIONS, Superblock
from ...recent import DAMAGED, RecentRing, RecentRows, take_records
from ..posix import PosixFile
from ..protocols import Damage, Rows, damaged_record
from .mapped_file import MappedFile

SAVED_TOGETHER = 16
"""Records of positions that are appended one by one are written when their number passes a multiple of it: one write
instead of as many. A process that dies leaves fewer than that without; a commit writes them all."""

EACH_RATE = 64_000_000
"""Bytes of records a second, of all layers together, up to which those of each SAVED_TOGETHER positions are written. No
model computes positions faster: its weights are many times as large as a position's records."""

WHOLE_RATE = 2_000_000
"""The same for those of more positions: where they come faster than by `EACH_RATE`, records are written at a later
multiple, of the positions that are in the window by then. A process that dies leaves what came in between without."""

clock = time.monotonic
"""Tells the time, in seconds."""

Read = Callable[[int, int], Any]
"""Returns bytes of the file from an offset on."""


class BadRecord(NamedTuple):
    """A record whose checksum does not match."""

    position: int
    """That its slot is for."""
    offset: int
    size: int

    def empty(self, file: PosixFile) -> None:
        """Make it an empty one."""
        file.write((self.offset,), (np.zeros(self.size, np.uint8),))


class LayerRecords:
    """The records of one layer.

    Args:
        superblock: the file's.
        layer: the layer's number.
    """

    def __init__(self, superblock: Superblock, layer: int) -> None:
        geometry = superblock.geometry
        self._size = geometry.layers[layer].recent_bytes
        self._offsets = [
            superblock.sections[kind, layer].offset if slots else -1
            for kind, slots in zip(RECENT_SECTIONS, (geometry.recent_window, geometry.sinks), strict=True)
        ]
        self._room: NDArray[np.uint8] | None = None
        """To make records in: memory that is new each time would be cleared by the system each time."""
        self._most = geometry.recent_window + geometry.sinks
        self._bytes = sum(shape.recent_bytes for shape in geometry.layers if shape.has_rows)
        """Of a position's records in all layers."""
        self._written = -math.inf
        """When `is_due` has said so last."""

    def is_due(self, count: int) -> bool:
        """True if the records of `count` positions may be written now: by the rates above. The caller does it."""
        now, rate = clock(), EACH_RATE if count <= SAVED_TOGETHER else WHOLE_RATE
        if now - self._written < min(count, self._most) * self._bytes / rate:
            return False
        self._written = now
        return True

    def load(self, rows: RecentRows, coded: Callable[[int, int], Rows], length: int, read: Read) -> list[BadRecord]:
        """Read what is not in memory yet of the first `length` positions.

        Args:
            rows: where they go.
            coded: returns the layer's coded rows of positions [start, stop).
            length: positions that count.
            read: reads from the file.

        Returns:
            The records whose checksum does not match: they are damaged, or were torn.
        """
        damaged = []
        for ring, offset, stop in zip(
            (rows.ring, rows.first), self._offsets, (length, min(length, rows.sinks)), strict=True
        ):
            if ring.slots:
                # Of all slots: what lies in one that no position has yet must not be damage once one has.
                start, end = max(0, stop - ring.slots), max(stop, ring.slots)
                records = read(offset, ring.slots * self._size)
                states = take_records(ring, records, coded(start, stop), start, start, end)
                for position, state in states:
                    if state == DAMAGED:
                        damaged.append(BadRecord(position, offset + position % ring.slots * self._size, self._size))
        return damaged

    def save(self, rows: RecentRows, coded: Rows, first: int, start: int, stop: int, file: PosixFile) -> None:
        """Write the records of positions [start, stop); empty ones for those that have none.

        Args:
            rows: where they are.
            coded: the layer's coded rows of these positions.
            first: the position of the first of these rows.
            start: the first position.
            stop: one past the last.
            file: the file.

        Raises:
            OSError: the disk is full or failing.
        """
        if self._room is None:
            self._room = np.empty((SAVED_TOGETHER, self._size), np.uint8)
        for ring, offset, low, last in self._rings(rows, start, stop):
            while low < last:
                slot = low % ring.slots
                end = min(last, low + ring.slots - slot, low + SAVED_TOGETHER)  # the ring's end
                room = self._room if end - low == SAVED_TOGETHER else self._room[: end - low]
                file.write((offset + slot * self._size,), (rows.records(ring, coded, first, low, end, room),))
                low = end

    def _rings(self, rows: RecentRows, start: int, stop: int) -> list[tuple[RecentRing, int, int, int]]:
        """Return each ring with the offset of its records, and which of positions [start, stop) may be in it."""
        ring, first = self._offsets
        found = []
        if ring >= 0:
            found.append((rows.ring, ring, max(start, stop - rows.window), stop))
        if start < rows.sinks:
            found.append((rows.first, first, start, min(stop, rows.sinks)))
        return found


def check_records(mapped: MappedFile, length: int) -> Iterator[Damage]:
    """Yield the records of the first `length` positions that do not match their checksums, of a file without writer."""
    geometry = mapped.geometry
    for layer in range(geometry.num_layers) if geometry.keeps_recent else ():
        rows = RecentRows.of(geometry, layer)
        if rows is None:
            continue
        coded = functools.partial(mapped.blocks.rows, layer)
        try:
            damaged = LayerRecords(mapped.superblock, layer).load(rows, coded, length, mapped.read)
        except (OSError, EOFError, ValueError):  # ValueError: the file ends before
            yield Damage(f"layer {layer}: rows in 16 bits can't be read", layer)
            continue
        yield from (damaged_record(layer, record.position) for record in damaged if record.position < length)
