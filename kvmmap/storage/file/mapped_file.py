"""An open `.kvm` file as sections and bytes: its map, its section table, and reads past the map.

Which positions count, and which of them were verified, is not known here: see `snapshot` and `verified_blocks`.

A map is released by dropping it, and unmapped with the last array over it, so that closing never takes memory from
under a read in another thread.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, CacheNotFoundError, ClosedError, CorruptCacheError, NotACacheError
from ...format import HEADER, Parent, Section, Slot, Superblock, checksum, slab_sections
from ...metadata import Document
from ..posix import PosixFile
from ..protocols import Rows
from ..refusals import closed_error
from .block_reader import BlockReader
from .commit_slots import Slots
from .live_record import LiveRecord, map_live
from .page_cache import expect_few_pages

_OPENING_BYTES = 20 << 10
"""Bytes that are read first. Of 30 layers that is the superblock, both commit slots and the live record: with a cold
file one request to the disk in place of four. What is read besides would stay in memory."""

_LARGEST_HEAD = 256 << 20
"""Bytes before the rows that are mapped by themselves where there is no address space for the file."""


LAYERS_AT_ONCE = 32
"""Layers for which what they need first is made together. Attention over a layer evicts the interpreter from the
processor's caches; views of a layer take five times as long to make after it as they do after those of another one."""


class MappedFile:
    """The sections of an open file.

    Args:
        file: the open file; `close` closes it.
        superblock: the file's.
        writable: map the live record for writing, too.
        rows_needed: fail if the file can't be mapped whole. Otherwise only what precedes the rows is mapped where
            address space is short (`ulimit -v`), so that a cache can still be inspected and verified.

    Raises:
        OSError: the file can't be mapped.
    """

    def __init__(self, file: PosixFile, superblock: Superblock, *, writable: bool, rows_needed: bool) -> None:
        self.file = file
        self.path = file.path
        self.superblock = superblock
        self.geometry = superblock.geometry
        self.lock = threading.RLock()
        memory = self._map(rows_needed)
        expect_few_pages(memory, min(superblock.section(Section.TOKEN_IDS).offset, len(memory)))
        self._memory: mmap.mmap | None = memory
        self._checksums: tuple[Slot, NDArray[np.uint64]] | None = None
        self._slabs: list[Rows | None] = [None] * self.geometry.num_layers
        self._slab_offsets: list[list[int] | None] = [None] * self.geometry.num_layers
        self._slots: Slots | None = Slots(memory, superblock, self.path)
        live = superblock.section(Section.LIVE).offset
        self._live: LiveRecord | None = (
            map_live(file, superblock, writable=True) if writable else LiveRecord(memory, live, superblock, file)
        )

    def _map(self, rows_needed: bool) -> mmap.mmap:
        try:
            return self.file.map(0, self.superblock.file_bytes)[0]
        except OSError as error:
            head = [self.superblock.section(kind) for kind in (Section.SLOT_A, Section.SLOT_B, Section.METADATA)]
            end = max(offset + size for offset, size in [*head, self.superblock.live_record])
            if error.errno != errno.ENOMEM or rows_needed or end > _LARGEST_HEAD:
                raise
            return self.file.map(0, end)[0]

    # What is mapped

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._memory is None

    @property
    def memory(self) -> mmap.mmap:
        """The map.

        Raises:
            ClosedError: the file is closed.
        """
        memory = self._memory
        if memory is None:
            raise closed_error(self.path)
        return memory

    @property
    def rows_memory(self) -> mmap.mmap:
        """The map of the whole file.

        Raises:
            OSError: there was no address space for it.
            ClosedError: the file is closed.
        """
        memory = self.memory
        if len(memory) < self.superblock.file_bytes:
            raise OSError(errno.ENOMEM, "not enough address space to map the cache (see ulimit -v)", self.path)
        return memory

    @property
    def live(self) -> LiveRecord:
        """The live record."""
        live = self._live
        if live is None:
            raise closed_error(self.path)
        return live

    @property
    def slots(self) -> Slots:
        """The commit slots."""
        slots = self._slots
        if slots is None:
            raise closed_error(self.path)
        return slots

    def slab_offsets(self, layer: int) -> list[int]:
        """Return where a layer's slabs are in the file."""
        found = self._slab_offsets[layer]
        if found is None:
            sections = self.superblock.sections
            kinds = slab_sections(self.geometry.layers[layer])
            found = self._slab_offsets[layer] = [sections[kind, layer].offset for kind in kinds]
        return found

    def slabs(self, layer: int) -> Rows:
        """Return views of a layer's slabs, over the whole capacity."""
        rows = self._slabs[layer]
        if rows is None:
            # Arrays over a memoryview are made in half the time. It keeps the map as they would.
            memory, found = memoryview(self.rows_memory), self._slabs
            shape = None
            for number in range(layer, min(layer + LAYERS_AT_ONCE, len(found))):
                if found[number] is None:
                    geometry = self.geometry.layers[number]
                    if geometry is not shape:
                        shape, view = geometry, Rows.viewer(geometry, memory, self.geometry.capacity)
                    found[number] = view(self.slab_offsets(number))
            rows = found[layer]
            assert rows is not None
            if self.closed:  # meanwhile, by another thread: no view must keep the map
                self._forget_slabs()
        return rows

    def _forget_slabs(self) -> None:
        self._slabs = [None] * self.geometry.num_layers

    def token_ids(self) -> NDArray[np.int32]:
        """Return a view of the token ids, over the whole capacity."""
        offset = self.superblock.section(Section.TOKEN_IDS).offset
        return np.ndarray((self.geometry.capacity,), np.dtype("<i4"), self.rows_memory, offset)

    def checksums(self, slot: Slot, first: int, stop: int) -> NDArray[np.uint64]:
        """Return the checksums of blocks [first, stop) of a commit, u64 [stop - first, num_layers]; the last block may
        be incomplete."""
        layers = self.geometry.num_layers
        complete = min(stop, slot.seq_len // self.geometry.block_tokens)
        offset = self.superblock.section(Section.CHECKSUMS).offset + 8 * first * layers
        sums = np.ndarray((max(0, complete - first), layers), np.dtype("<u8"), self.rows_memory, offset).copy()
        if stop > complete:
            sums = np.concatenate([sums, np.array([slot.tail_checksums[:-1]], np.uint64)])
        return sums

    def all_checksums(self, slot: Slot) -> NDArray[np.uint64]:
        """Return the checksums of all blocks of a commit, u64 [num_layers * blocks], layer by layer. They are kept for
        the next layer that is read."""
        kept = self._checksums
        if kept is None or kept[0] is not slot:
            every = self.checksums(slot, 0, -(-slot.seq_len // self.geometry.block_tokens))
            kept = self._checksums = slot, every.T.ravel()
        return kept[1]

    def token_checksums(self, slot: Slot) -> NDArray[np.uint64]:
        """Return the checksums of all blocks of token ids of a commit, u64 [blocks]."""
        complete, rest = divmod(slot.token_len, self.geometry.block_tokens)
        offset = self.superblock.section(Section.TOKEN_CHECKSUMS).offset
        sums = np.ndarray((complete,), np.dtype("<u8"), self.rows_memory, offset)
        return np.append(sums, np.array(slot.tail_checksums[-1:] if rest else (), np.uint64))

    def document(self, slot: Slot) -> Document:
        """Read the metadata of a commit.

        Raises:
            CacheChangedError: later commits have overwritten it.
            CorruptCacheError: it is damaged.
        """
        section = self.superblock.section(Section.METADATA)
        start = section.offset + slot.metadata_half * (section.size // 2)
        data = self.memory[start : start + slot.metadata_bytes]
        if checksum(data) != slot.metadata_checksum:
            if self.slots.newest()[1].sequence > slot.sequence:
                raise CacheChangedError(
                    f"{self.path}: metadata was replaced since this handle last looked; call refresh()", path=self.path
                )
            raise CorruptCacheError(f"{self.path}: metadata damaged: its checksum does not match", path=self.path)
        return Document.decode(data, self.path)

    # Past the map

    @property
    def blocks(self) -> BlockReader:
        """Reads rows, token ids and checksums past the map."""
        return BlockReader(self.superblock, self.read_into)

    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill a buffer from the file itself, not through the map: what the disk can't read is an error then.

        Raises:
            EOFError: the file ends before.
        """
        with self.lock:  # once closed, the descriptor's number may be another file's
            self.require_file()
            self.file.read_into(offset, target)

    def read(self, offset: int, size: int) -> bytes:
        """Read from the file itself; fewer bytes only at its end."""
        with self.lock:
            self.require_file()
            return self.file.read(offset, size)

    def status(self) -> os.stat_result:
        """Return what the system knows of the file: its size, and the like."""
        with self.lock:
            self.require_file()
            return self.file.stat()

    def require_file(self) -> None:
        """Raise if the cache is closed, or is a writer's that this process has inherited."""
        _ = self.memory
        if self.file.closed:
            raise ClosedError(
                f"{self.path}: this process was forked from its writer, and may only read from the map; open it here",
                path=self.path,
            )

    def copied_up(self) -> bool:
        """True if overlayfs copied the file to its upper layer: the descriptor then shows the copy, and the map stays
        on the original."""
        if self.file.closed or not self.file.on_overlay():
            return False
        offset, size = self.superblock.live_record
        mapped = self.memory[offset : offset + size]
        return mapped != self.file.read(offset, size) and mapped == self.memory[offset : offset + size]

    def close(self) -> None:
        """Drop the map and close the file. Arrays over the map keep it until they are dropped themselves."""
        self._memory = self._slots = self._live = None
        self._forget_slabs()
        self.file.close()


def open_file(path: str, *, writable: bool, used: bool = False) -> PosixFile:
    """Open a regular file, with errors that say what is wrong. Of a link, the path is that of its target.

    Args:
        path: of the file.
        writable, used: as in `PosixFile.open`.

    Raises:
        CacheNotFoundError, NotACacheError: there is none, or it is no regular file.
        OSError: it can't be opened.
    """
    path = os.path.realpath(path)
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise NotACacheError(f"{path}: not a kvmmap cache ({kind})", path=path)
        return PosixFile.open(path, writable=writable, used=used)
    except FileNotFoundError:
        raise CacheNotFoundError(f"{path}: there is no such file; kvmmap.create() makes one", path=path) from None


def read_superblock(file: PosixFile, *, cut_off: bool = False) -> Superblock:
    """Read and check a file's superblock.

    Args:
        file: the open file.
        cut_off: accept a file that ends early, to save what is there.

    Raises:
        FormatError: it is no cache, damaged, or of a later version.
    """
    start = file.read(0, _OPENING_BYTES)
    size = Superblock.peek(start[: HEADER.size], file.path)
    if size > len(start):
        start += file.read(len(start), size - len(start))
    real_bytes = HEADER.unpack(start)["file_bytes"] if cut_off else file.stat().st_size
    return Superblock.decode(start[:size], file.path, real_bytes)


def read_parent(file: PosixFile, superblock: Superblock) -> Parent | None:
    """Read the record of the file that this one continues; None if it continues none.

    Raises:
        CorruptCacheError: the record is damaged.
    """
    if not superblock.has_parent:
        return None
    extent = superblock.section(Section.PARENT)
    return Parent.decode(file.read(extent.offset, extent.size), superblock, file.path)
