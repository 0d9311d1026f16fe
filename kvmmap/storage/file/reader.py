"""A `.kvm` file mapped for reading: open, look, refresh. What a writer does besides is in `writer`.

A reader takes no lock and never waits. It sees a snapshot, the positions that were complete in every layer when it
last looked; `refresh` looks again. Data below a published length does not change, but for `truncate`, which changes
the generation: so every read is followed by a look at that one word.

Several threads may share a handle. A map is let go of by forgetting it, and goes when the last array over it does, so
that closing never takes memory from under a read.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import threading
import time
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn, cast

import numpy as np
from numpy.typing import NDArray

from ...errors import (
    CacheChangedError,
    CacheNotFoundError,
    ClosedError,
    CorruptCacheError,
    NotACacheError,
    ReadOnlyError,
)
from ...format import FORMAT_VERSION, HEADER, PAGE, Section, Slot, Superblock, checksum, slab_sections
from ...metadata import Document
from ..posix import PosixFile, closing_on_error, expect_few_pages
from ..protocols import Progress, Rows, Verify, VerifyReport
from ..readonly import ReadOnlyStorage
from .commit_slots import Slots
from .last_use import UseRecorder, last_use_ns
from .live_record import LiveRecord
from .reader_layer import MappedLayer
from .verified_blocks import WHAT_TO_DO, Proven, prove_tokens

_LARGEST_HEAD = 256 << 20
"""Bytes before the rows that are mapped by themselves where there is no address space for the file."""


class Snapshot(NamedTuple):
    """What a look at the file found."""

    which: int
    """The slot that counts, 0 or 1."""
    slot: Slot
    live: bool
    """True if the lengths are the published ones, False if they are the commit's."""
    lengths: list[int]
    token_len: int
    generation_word: int
    proven: Proven | None
    """Blocks that were compared with their checksums; None if they are not to be."""


class MappedReader(ReadOnlyStorage):
    """An open `.kvm` file."""

    writable = False

    def __init__(
        self,
        file: PosixFile,
        superblock: Superblock,
        *,
        recover: bool = False,
        verify: Verify = "read",
        record_use: bool = False,
    ) -> None:
        self.path: str = file.path
        self.geometry = superblock.geometry
        self.lock = threading.RLock()
        self.superblock = superblock
        self.file = file
        self.recover = recover
        self._verify = verify
        self._use = UseRecorder(file) if record_use else None
        self.foreign = self.foreign_tokens = self.geometry.capacity
        """Positions, from 0, that others may have written, and token ids."""
        memory = self._map()
        expect_few_pages(memory, min(superblock.section(Section.TOKEN_IDS).offset, len(memory)))
        self._memory: mmap.mmap | None = memory
        self.slots = Slots(memory, superblock, self.path)
        self.live = self._live_record(memory)
        self.layers: Sequence[MappedLayer] = self._make_layers()
        self.token_len = 0
        self._document: tuple[Slot, Document] | None = None
        self.snapshot = self.look()
        self._take(self.snapshot)
        if verify == "open" and not self._went_down_well():
            self._refuse_damage()
        self.note_use()

    @classmethod
    def open(
        cls, path: str, *, recover: bool = False, verify: Verify = "read", record_use: bool = False
    ) -> MappedReader:
        """Open a file for reading.

        Args:
            path: of the file.
            recover: believe only commits.
            verify: as in `kvmmap.open`.
            record_use: reading through this handle is a use of the cache, and moves the time of its last one.
        """
        with closing_on_error(open_file(path, writable=False, used=record_use)) as file:
            return cls(file, read_superblock(file), recover=recover, verify=verify, record_use=record_use)

    def _map(self) -> mmap.mmap:
        """Map the file; only what precedes its rows if there is no address space for all, and no rows are to be used.

        So a cache can be inspected and verified under `ulimit -v` as well.
        """
        size = self.superblock.file_bytes
        try:
            return self.file.map(0, size)[0]
        except OSError as error:
            head = [self.superblock.section(kind) for kind in (Section.SLOT_A, Section.SLOT_B, Section.METADATA)]
            end = max(offset + size for offset, size in [*head, self.superblock.live_record])
            if error.errno != errno.ENOMEM or self.writable or self._use is not None or end > _LARGEST_HEAD:
                raise
            return self.file.map(0, end)[0]

    def note_use(self) -> None:
        """Record that the cache is being used, if this handle is one to do so and has not done it lately."""
        if self._use is not None and self._use.due() and self.lock.acquire(blocking=False):
            try:
                self._use.record()
            finally:
                self.lock.release()

    def _went_down_well(self) -> bool:
        """False if the machine went down, or a sync failed, while a writer had the file open."""
        return self.snapshot.live or (self.snapshot.slot.closed and not self.live.in_use())

    def _refuse_damage(self) -> None:
        report = self.verify()
        for damage in report.damages:
            more = f" (and {len(report.damages) - 1} more)" if len(report.damages) > 1 else ""
            raise CorruptCacheError(
                f"{self.path}: was not closed, and is damaged: {damage.what}{more}. {WHAT_TO_DO}",
                path=self.path,
                layer=damage.layer,
                position=damage.start,
            )

    def _live_record(self, memory: mmap.mmap) -> LiveRecord:
        offset = self.superblock.section(Section.LIVE).offset
        return LiveRecord(memory, offset, self.superblock, self.file)

    def _make_layers(self) -> Sequence[MappedLayer]:
        return [MappedLayer(self, number, layer) for number, layer in enumerate(self.geometry.layers)]

    # What is there

    def read_file(self, offset: int, target: memoryview) -> None:
        """Fill a buffer from the file itself, not through the map: what the disk can't give is an error then.

        Raises:
            EOFError: the file ends before.
        """
        with self.lock:  # once closed, the descriptor's number may be another file's
            self.require_file()
            self.file.read_into(offset, target)

    def read_bytes(self, offset: int, size: int) -> bytes:
        """Read from the file itself, fewer bytes only at its end."""
        with self.lock:
            self.require_file()
            return self.file.read(offset, size)

    def status(self) -> os.stat_result:
        """Ask for the file's size, and the like."""
        with self.lock:
            self.require_file()
            return self.file.stat()

    def require_file(self) -> None:
        """Raise if the cache is closed, or is a writer's that this process has inherited."""
        self.require_open()
        if self.file.closed:
            raise ClosedError(
                f"{self.path}: this process was forked from its writer, and may only read from the map; open it here",
                path=self.path,
            )

    def require_open(self) -> None:
        """Raise if the cache is closed."""
        if self._memory is None:
            raise closed(self.path)

    @property
    def memory(self) -> mmap.mmap:
        """The map of the whole file."""
        memory = self._memory
        if memory is None:
            raise closed(self.path)
        return memory

    @property
    def rows_memory(self) -> mmap.mmap:
        """The map of the whole file, where there was address space for it.

        Raises:
            OSError: there was not.
        """
        memory = self.memory
        if len(memory) < self.superblock.file_bytes:
            raise OSError(errno.ENOMEM, "not enough address space to map the cache (see ulimit -v)", self.path)
        return memory

    @property
    def closed(self) -> bool:
        return self._memory is None

    def check(self) -> None:
        """Raise if the cache is closed, or rows that this handle counts on were taken back."""
        self.validate(self.version())

    def version(self) -> int:
        return self.snapshot.generation_word

    def validate(self, version: int) -> None:
        self.note_use()  # every read comes by here
        if self.live.generation_word() != version:
            if self.snapshot.generation_word != version:
                raise CacheChangedError(
                    f"{self.path}: positions were taken back while they were being read: read again", path=self.path
                )
            raise CacheChangedError(
                f"{self.path}: was truncated by its writer since this handle last looked; call refresh()",
                path=self.path,
            )

    def refuse_write(self) -> NoReturn:
        self.check()
        raise ReadOnlyError(f'{self.path}: is open for reading; kvmmap.open(path, mode="a") appends', path=self.path)

    def map_slabs(self, layer: int) -> Rows:
        """Views of a layer's slabs, as long as the capacity."""
        geometry = self.geometry.layers[layer]
        offsets = [self.superblock.sections[kind, layer].offset for kind in slab_sections(geometry)]
        return Rows.over(geometry, self.rows_memory, self.geometry.capacity, offsets)

    def map_tokens(self) -> NDArray[np.int32]:
        """A view of the token ids, as long as the capacity."""
        offset = self.superblock.section(Section.TOKEN_IDS).offset
        return np.ndarray((self.geometry.capacity,), np.dtype("<i4"), self.rows_memory, offset)

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        prove_tokens(self, count)
        return self.map_tokens()[:count].copy()

    @property
    def document(self) -> Document:
        slot, known = self.snapshot.slot, self._document
        if known is None or known[0] is not slot:
            known = self._document = slot, self.read_document(slot)
        return known[1]

    def read_document(self, slot: Slot) -> Document:
        """Read the metadata that a commit names.

        Raises:
            CacheChangedError: commits since have written over it.
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

    # Looking

    def look(self, before: Snapshot | None = None) -> Snapshot:
        """Find the lengths that may be believed.

        Args:
            before: what was found the last time.

        Raises:
            CorruptCacheError: there are none, or published or acknowledged positions are missing.
        """
        for attempt in range(20):
            word = self.live.generation_word()
            which, slot = self.slots.newest()
            live = self.live.trusted() and not self.recover
            lengths = self.live.lengths() if live else [slot.seq_len] * self.geometry.num_layers
            tokens = self.live.get("token_len") if live else slot.token_len
            wrong = self._contradiction(slot, lengths if live else None, tokens)
            # A truncation lowers the lengths first and changes the generation then: under an unchanged word they
            # belong to it, or are lower, and so sound.
            if wrong is None and self.live.generation_word() == word:
                proven = before.proven if before and before.generation_word == word else self._nothing_proven()
                return Snapshot(which, slot, live, lengths, tokens, word, proven)
            time.sleep(0.0001 * attempt)  # a writer may be between two of its steps
        raise CorruptCacheError(
            f"{self.path}: {wrong or 'its generation is'} damaged; {slot.seq_len} positions of an earlier commit are "
            "intact: kvmmap.open(path, recover=True) goes back to them, `kvmmap repair PATH NEW_PATH` saves what is "
            "sound",
            path=self.path,
            position=slot.seq_len,
        )

    def _nothing_proven(self) -> Proven | None:
        geometry = self.geometry
        return Proven(geometry.num_layers, geometry.capacity, geometry.block_tokens) if self._verify == "read" else None

    def _contradiction(self, slot: Slot, lengths: list[int] | None, tokens: int) -> str | None:
        """Name what can't be true: of the commit, and of published lengths if they are believed."""
        # Also where lengths are believed: metadata, and what checksums cover, are the commit's.
        if self.live.get("acknowledged") > slot.sequence and not self.recover:
            return "the last commit record is"
        if lengths is None:
            return None
        if self.live.home() == -1:
            return "the number of the inode that lengths were published in is"
        capacity = self.geometry.capacity
        # Lengths are lowered only after a shorter commit.
        sound = slot.seq_len <= min(lengths) and max(lengths) <= capacity and slot.token_len <= tokens <= capacity
        return None if sound else "the published lengths are"

    def _take(self, snapshot: Snapshot) -> None:
        """Make a snapshot this handle's view: positions complete in every layer."""
        length = min(snapshot.lengths)
        for layer in self.layers:
            layer.length = length
        self.token_len = min(snapshot.token_len, length)
        # Last: who reads meanwhile in another thread has the version of the lengths before, or lengths of this one.
        self.snapshot = snapshot

    def refresh(self) -> bool:
        """Look again; True if there is more or less than before, or another commit.

        Raises:
            CacheChangedError: another file has taken this one's place.
        """
        with self.lock:
            if self.superseded():
                raise CacheChangedError(
                    f"{self.path}: was replaced by a new file (resized or compacted); open it again",
                    path=self.path,
                )
            if self._copied_up():
                raise CacheChangedError(
                    f"{self.path}: overlayfs copied it to its upper layer for a writer, and this handle maps the "
                    "original; open it again",
                    path=self.path,
                )
            before = self.snapshot
            self._take(self.look(before))
            return self.snapshot != before

    def _copied_up(self) -> bool:
        """True if the file was copied to the upper layer of overlayfs: the descriptor then shows the copy, the map the
        original, for ever."""
        if self.file.closed or not self.file.on_overlay():
            return False
        offset, size = self.superblock.live_record
        mapped = self.memory[offset : offset + size]
        return mapped != self.file.read(offset, size) and mapped == self.memory[offset : offset + size]

    def superseded(self) -> bool:
        """True if another file stands at the path in this one's place."""
        if self.live.get("superseded") == 1:
            return True
        # The mark is set right after the replacement; if its setter died in between, the name tells. (A process that
        # was forked from a writer has let go of the file, and has the mark alone.)
        return not self.file.closed and self.status().st_nlink == 0 and os.path.exists(self.path)

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Compare every committed block with its checksum."""
        from .verify import verify_file  # here, and not above, because verify uses this module's names

        self.check()
        return verify_file(self, progress)

    @property
    def committed_len(self) -> int:
        return self.snapshot.slot.seq_len

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        return self.stored_sums(self.snapshot.slot, first, stop)

    def stored_sums(self, slot: Slot, first: int, stop: int) -> NDArray[np.uint64]:
        """As `committed_checksums`, of the commit that is given."""
        layers = self.geometry.num_layers
        complete = min(stop, slot.seq_len // self.geometry.block_tokens)
        offset = self.superblock.section(Section.CHECKSUMS).offset + 8 * first * layers
        sums = np.ndarray((max(0, complete - first), layers), np.dtype("<u8"), self.rows_memory, offset).copy()
        if stop > complete:
            sums = np.concatenate([sums, np.array([slot.tail_checksums[:-1]], np.uint64)])
        return sums

    def stored_token_sums(self, slot: Slot) -> NDArray[np.uint64]:
        """Return the checksums of all blocks of token ids of a commit."""
        complete, rest = divmod(slot.token_len, self.geometry.block_tokens)
        offset = self.superblock.section(Section.TOKEN_CHECKSUMS).offset
        sums = np.ndarray((complete,), np.dtype("<u8"), self.rows_memory, offset)
        return np.append(sums, np.array(slot.tail_checksums[-1:] if rest else (), np.uint64))

    def verify_rows(self, start: int, stop: int) -> None:
        if self._verify == "read":
            return
        from .verify import check_blocks

        size = self.geometry.block_tokens
        for damage in check_blocks(self, start // size, -(-min(stop, self.committed_len) // size)):
            raise CorruptCacheError(
                f"{self.path}: {damage.what}", path=self.path, layer=damage.layer, position=damage.start
            )

    def identity(self) -> str | None:
        return f"{self.superblock.file_id.hex()}/{self.live.get('generation')}"

    def facts(self) -> dict[str, Any]:
        """What `inspect` shows of the file."""
        with self.lock:
            slot, live = self.snapshot.slot, self.live
            status = self.status()
            return {
                "kind": "kvm",
                "format_version": FORMAT_VERSION,
                "file_bytes": status.st_size,
                "disk_bytes": status.st_blocks * 512,
                "created_ns": self.superblock.created_ns,
                "commit_sequence": slot.sequence,
                "committed_len": slot.seq_len,
                "commit_ns": slot.commit_ns,
                "generation": live.get("generation"),
                "state": self._state(),
                "writer_pid": max(live.get("writer_pid"), 0) if live.in_use() else 0,
                "last_use_ns": last_use_ns(self.file),
            }

    def _state(self) -> str:
        if not self.live.in_use():
            return "closed" if self.snapshot.slot.closed else "interrupted"
        return "open for writing" if self.live.trusted() else "interrupted"

    def close(self) -> None:
        """Let go of the file. Views that were handed out keep their pages mapped until they are gone themselves."""
        with self.lock:
            if self._memory is not None:
                self._memory = None
                self.slots = cast(Slots, _LetGo(self.path))  # they hold the map too
                self.live = cast(LiveRecord, _LetGo(self.path))
                for layer in self.layers:
                    layer._slabs = None
                self.file.close()


class _LetGo:
    """Stands where something was that `close` let go of, and tells who still reaches for it."""

    def __init__(self, path: str) -> None:
        self._path = path

    def __getattr__(self, name: str) -> NoReturn:
        raise closed(self._path)


def closed(path: str) -> ClosedError:
    return ClosedError(f"{path}: the cache is closed", path=path)


def open_file(path: str, *, writable: bool, used: bool = False) -> PosixFile:
    """Open a regular file, with errors that say what is wrong. It bears its own name then, and not that of a link.

    Args:
        path: of the file.
        writable, used: as in `PosixFile.open`.
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


def read_superblock(file: PosixFile) -> Superblock:
    """Read and check a file's superblock."""
    start = file.read(0, PAGE)
    size = Superblock.peek(start[: HEADER.size], file.path)
    if size > len(start):
        start += file.read(len(start), size - len(start))
    return Superblock.decode(start[:size], file.path, file.stat().st_size)
