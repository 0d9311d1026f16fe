"""A damaged `.kvm` file, of which nothing but the superblock is taken for valid.

Everything is read with `pread`, so that a file that ends early, or a disk that can't read, costs only the rows
concerned. `repair` decides what is kept.
"""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError
from ...format import CheckpointEntry, CheckpointHeader, Section, Slot, Superblock, checksum
from ...metadata import Document
from ..checksums import digest
from ..posix import PosixFile
from ..protocols import Rows
from .block_reader import BlockReader
from .live_record import LiveRecord
from .mapped_file import read_superblock


class Reach(NamedTuple):
    """How many positions a damaged file has, as far as it can be known."""

    committed: int
    """Positions that the last valid commit covers."""
    tokens: int
    """Token ids that it covers."""
    complete: int
    """Positions, from 0, whose complete blocks may have checksums: more than `committed` if later commits are lost."""
    published: int
    """Positions that a reader on this machine would see; those from `committed` on have no checksum."""
    stored: int
    """Positions that the file seems to have had."""


class DamagedFile:
    """An open file whose superblock is valid."""

    def __init__(self, file: PosixFile) -> None:
        self.file = file
        self.path = file.path
        self.superblock = self._read_superblock()
        self.geometry = self.superblock.geometry
        self._blocks = BlockReader(self.superblock, self._read_into)
        slots = [self._read_slot(kind) for kind in (Section.SLOT_A, Section.SLOT_B)]
        self.slots = sorted((slot for slot in slots if slot), key=lambda slot: -slot.sequence)
        """Valid commit slots, the current one first."""
        live = self.superblock.live_record
        words = np.frombuffer(self.read(live.offset, live.size), np.uint64)
        self.live = LiveRecord(cast(Any, words), 0, self.superblock, file)

    def _read_superblock(self) -> Superblock:
        try:
            return read_superblock(self.file, cut_off=True)
        except CorruptCacheError as error:
            raise CorruptCacheError(
                f"{error}. Without it the offsets of rows are unknown, so nothing of this file can be recovered: "
                "restore it from a copy",
                path=self.path,
            ) from None

    def _read_slot(self, kind: Section) -> Slot | None:
        extent = self.superblock.section(kind)
        return Slot.decode(self.read(extent.offset, extent.size), self.superblock)

    def read(self, offset: int, size: int) -> bytes:
        """Return bytes of the file; zeros where they can't be read."""
        data = b""
        with contextlib.suppress(OSError):
            data = self.file.read(offset, size)
        return data.ljust(size, b"\0")

    def _read_into(self, offset: int, target: memoryview) -> None:
        target[:] = self.read(offset, target.nbytes)

    # Records

    def reach(self) -> Reach:
        """Return how many positions the file has, as far as its records tell."""
        last = self.slots[0] if self.slots else None
        committed, tokens = (last.seq_len, last.token_len) if last else (0, 0)
        lengths, capacity = self.live.lengths(), self.geometry.capacity
        known = 0 <= min(lengths) <= max(lengths) <= capacity
        if last and self.live.get("acknowledged") <= last.sequence:
            valid = known and self.live.trusted() and min(lengths) >= committed
            published = min(lengths) if valid else committed
            return Reach(committed, tokens, committed, published, published)
        # A later commit is lost, or all are. Its blocks still have checksums; how many, the lengths tell best.
        most = min(lengths) if known else committed if last else capacity
        return Reach(committed, tokens, max(committed, most), committed, max(committed, min(lengths) if known else 0))

    def troubles(self) -> list[str]:
        """Name what is wrong with slots, live record and size."""
        found = []
        size = self.file.stat().st_size
        if size < self.superblock.file_bytes:
            found.append(f"the file is cut off: {size:,} of {self.superblock.file_bytes:,} bytes are there")
        last = self.slots[0] if self.slots else None
        if last is None:
            found.append("both commit records are damaged: the number of positions is uncertain")
        elif self.live.get("acknowledged") > last.sequence:
            found.append(
                "the last commit record is damaged; the one before counts, and complete blocks beyond it that hold"
            )
        elif len(self.slots) < 2 and last.closed and not self.live.in_use():
            found.append("one commit record is damaged; the other one says the same")
        broken = self.live.damaged_words()
        if broken:
            found.append(f"live record: {', '.join(broken)} damaged")
        return found

    def document(self) -> tuple[Document | None, bool]:
        """Return the metadata, and True if it is that of the current commit; None if none is valid."""
        section = self.superblock.section(Section.METADATA)
        for number, slot in enumerate(self.slots):
            data = self.read(section.offset + slot.metadata_half * (section.size // 2), slot.metadata_bytes)
            if checksum(data) == slot.metadata_checksum:
                with contextlib.suppress(CorruptCacheError):
                    return Document.decode(data, self.path), number == 0
        return None, False

    # Rows

    def rows(self, layer: int, start: int, stop: int) -> Rows:
        """Read positions [start, stop) of a layer; zeros where they can't be read."""
        return self._blocks.rows(layer, start, stop)

    def tokens(self, start: int, stop: int) -> NDArray[np.int32]:
        """Read the token ids of positions [start, stop); zeros where they can't be read."""
        return self._blocks.token_ids(start, stop)

    def expected(self, track: int, block: int, rows: int) -> int:
        """Return the stored checksum of a block of a track: a layer, or the token ids at index num_layers."""
        if rows < self.geometry.block_tokens:
            return self.slots[0].tail_checksums[track]
        layers = self.geometry.num_layers
        if track == layers:
            return self._blocks.checksums(Section.TOKEN_CHECKSUMS, block, 1)[0]
        return self._blocks.checksums(Section.CHECKSUMS, block * layers + track, 1)[0]

    def matches(self, track: int, block: int, arrays: Rows | list[NDArray[np.int32]]) -> bool:
        """True if the arrays of a block match its checksum."""
        rows = len(arrays[0]) if arrays else self.geometry.block_tokens
        return digest(arrays, track, block, 0, rows) == self.expected(track, block, rows)

    # Checkpoints

    def checkpoints(self) -> list[tuple[CheckpointEntry, int]]:
        """Return the checkpoints that the last valid commit names or, where lengths are valid, the live record, each
        with its slot; by ascending position."""
        entries = self.slots[0].checkpoints if self.slots else ()
        words = self.live.checkpoints()
        if not self.slots or (self.live.trusted() and min(words, default=0) >= 0):
            entries = tuple([CheckpointEntry(max(word, 0), 0) for word in words])
        return sorted((entry, slot) for slot, entry in enumerate(entries) if entry.word)

    def read_checkpoint(self, slot: int, entry: CheckpointEntry) -> list[NDArray[Any]] | str:
        """Read a checkpoint's tensors, or say what is damaged."""
        layout, specs = self.superblock.checkpoint_layout, self.geometry.states
        at = self.superblock.section(Section.CHECKPOINT, slot).offset
        header = CheckpointHeader.decode(self.read(at, layout.header_size), self.superblock.file_id, len(specs))
        if header is None or header.position != entry.position or entry.checksum not in (0, header.checksum):
            return "its header does not match"
        found = []
        for spec, offset, expected in zip(specs, layout.offsets, header.checksums, strict=True):
            data = self.read(at + offset, spec.nbytes)
            if checksum(data) != expected:
                return f"{spec}: checksum does not match"
            found.append(np.frombuffer(data, spec.numpy_dtype).reshape(spec.shape))
        return found
