"""The two commit slots: which one is current, and writing the other.

A slot is valid if its checksum matches. The current one is the valid slot with the higher sequence. A commit overwrites
the other one, so a torn write loses nothing that was committed.
"""

from __future__ import annotations

import mmap
import time

from ...errors import CorruptCacheError
from ...format import Extent, Section, Slot, Superblock
from ..posix import PosixFile


class Slots:
    """Both slots of one file, read through its map."""

    def __init__(self, memory: mmap.mmap, superblock: Superblock, path: str) -> None:
        self._memory = memory
        self._superblock = superblock
        self._path = path
        self._extents = (superblock.section(Section.SLOT_A), superblock.section(Section.SLOT_B))

    def read(self) -> tuple[Slot | None, Slot | None]:
        """Return what is in A and B; None for one that is not valid."""
        a, b = self._extents
        return self._read_one(a), self._read_one(b)

    def _read_one(self, extent: Extent) -> Slot | None:
        return Slot.decode(self._memory[extent.offset : extent.offset + extent.size], self._superblock)

    def newest(self) -> tuple[int, Slot]:
        """Return (0 or 1, slot): the current slot.

        Raises:
            CorruptCacheError: neither slot is valid.
        """
        for _ in range(3):  # a writer that commits twice may be caught in the middle of either
            a, b = self.read()
            if b is not None and (a is None or b.sequence > a.sequence):
                return 1, b
            if a is not None:
                return 0, a
        raise CorruptCacheError(
            f"{self._path}: both commit records are damaged, so its length is unknown; "
            "`kvmmap repair PATH NEW_PATH` saves the blocks that hold",
            path=self._path,
        )

    def settle(self) -> tuple[Slot | None, Slot | None]:
        """Read both; repeat for a moment if one is not valid, because a writer may just be writing it."""
        for _ in range(20):
            found = self.read()
            if None not in found:
                break
            time.sleep(0.001)
        return found

    def write(self, file: PosixFile, which: int, slot: Slot) -> None:
        """Write a slot; it is not durable before the next sync."""
        file.write((self._extents[which].offset,), (slot.encode(self._superblock.file_id),))
