"""One layer of a mapped file for reading: its slabs as views of the map, verified when they are first read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ...attention.source import Ranges, Unread
from ...recent import RecentRows
from ..protocols import Rows
from ..readonly import ReadOnlyLayer, ReadOnlyStorage
from ..sketches import ComputedSketches
from . import page_cache
from .file_sketches import KeptSketches
from .first_read import FirstReads, verify_rows
from .mapped_file import MappedFile
from .recent_records import BadRecord, LayerRecords
from .snapshot import SnapshotHolder


class MappedLayer(ReadOnlyLayer):
    """One layer's slabs in the map."""

    in_memory = True

    def __init__(
        self, storage: ReadOnlyStorage, index: int, mapped: MappedFile, holder: SnapshotHolder, first_reads: FirstReads
    ) -> None:
        super().__init__(storage, index)
        self._mapped = mapped
        self._holder = holder
        self._first_reads = first_reads
        self._block_tokens = mapped.geometry.block_tokens
        self._slabs: Rows | None = None
        self._records = LayerRecords(mapped.superblock, index) if mapped.geometry.keeps_recent else None
        self._loaded: tuple[int, int] | None = None
        """The length and generation of the rows in 16 bits that are in memory."""
        self._torn: list[BadRecord] = []
        """Records that were torn or damaged when they were read."""
        # Plain attributes: a cached property would make all of them slower to reach, which a push notices.
        self._offsets = mapped.slab_offsets(index)
        """Where the layer's slabs are in the file."""
        self._sketches: tuple[KeptSketches | None, ComputedSketches] | None = None

    def _sketch_sources(self) -> tuple[KeptSketches | None, ComputedSketches]:
        """Return the sketches that the file keeps, if it does, and those that are computed; made on first use."""
        found = self._sketches
        if found is None:
            superblock = self._mapped.superblock
            kept = KeptSketches(superblock, self.index) if superblock.has_sketches else None
            found = self._sketches = kept, ComputedSketches(self.geometry, self._block_tokens)
        return found

    def recent_rows(self) -> RecentRows | None:
        if self._records is None:
            return None
        wanted = self.length, self._holder.current.generation_word
        if self._loaded != wanted:
            with self._mapped.lock:
                self._load_recent(*wanted)
        return self.recent

    def _load_recent(self, length: int, generation: int) -> None:
        recent, records = self.recent, self._records
        assert recent is not None
        assert records is not None
        if self._loaded is not None and self._loaded[1] != generation:
            recent.clear()  # positions may have other rows since
        # Not through the map: read-ahead around the records would fill holes where later rows go.
        self._torn = records.load(recent, self.slabs().part, length, self._mapped.file.read_alone)
        self._loaded = length, generation

    def slabs(self) -> Rows:
        slabs = self._slabs
        if slabs is None:
            slabs = self._slabs = self._mapped.slabs(self.index)
            if self._mapped.closed:  # meanwhile, by another thread: it must not keep the map
                self._slabs = None
        return slabs

    def forget_map(self) -> None:
        """Drop the views of the map."""
        self._slabs = None

    def is_verified(self, stop: int) -> bool:
        return self._first_reads.all_read(self.index, stop)

    def ensure_verified(self, ranges: NDArray[np.int64], threads: int = 1) -> None:
        verify_rows(self._first_reads, self.index, ranges, threads)

    def unread_blocks(self, ranges: Ranges) -> tuple[Unread | None]:
        return (self._first_reads.unread(self.index, ranges),)

    def rows(self, start: int, stop: int) -> Rows:
        if not self.is_verified(stop):
            self.ensure_verified(np.array([[start, stop]], np.int64))
        return self.slabs().part(start, stop)

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        yield self.rows(start, stop)

    def scan(self, start: int, stop: int) -> Iterator[Rows]:
        for part in self.scan_ranges(start, stop):
            yield self.rows(part.start, part.stop)

    def scan_ranges(self, start: int, stop: int) -> Iterator[range]:
        """Yield the ranges that `scan` reads; the pages of each are released when the next is asked for."""
        return page_cache.scan(self._mapped.memory, self._offsets, self.geometry.slab_bytes(1), start, stop)

    def prefetch(self, start: int, stop: int) -> None:
        for low, high in self.byte_ranges(start, stop):
            self._mapped.file.read_ahead(low, high - low)

    def release(self, start: int, stop: int) -> None:
        page_cache.drop_pages(self._mapped.memory, self.byte_ranges(start, stop))

    def byte_ranges(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Return the bytes of the file that hold positions [start, stop) of each slab."""
        row_bytes = self.geometry.slab_bytes(1)
        return [(at + start * row, at + stop * row) for at, row in zip(self._offsets, row_bytes, strict=True)]

    def version(self) -> int:
        return self._holder.current.generation_word

    def validate(self, version: int) -> None:
        self._holder.validate(version)

    def sketches(self, blocks: int, version: int) -> list[NDArray[np.uint16]]:
        verify = self._holder.current.verified is not None
        kept = self._kept(blocks, version, verify=verify)
        pieces = [] if kept is None else [kept]
        done = 0 if kept is None else len(kept)
        if done < blocks:
            pieces.append(self._sketch_sources()[1].between(done, blocks, self, version))
        return pieces

    def kept_sketches(self, blocks: int) -> NDArray[np.uint16] | None:
        """Return the sketches of the first `blocks` blocks that the file keeps, up to one that is damaged; None if it
        keeps none."""
        return self._kept(blocks, self.version(), verify=True)

    def _kept(self, blocks: int, version: int, *, verify: bool) -> NDArray[np.uint16] | None:
        sketches = self._sketch_sources()[0]
        if sketches is None:
            return None
        committed = min(blocks, self._holder.current.slot.seq_len // self._block_tokens)
        return sketches.first(committed, self._mapped.rows_memory, version, verify=verify)
