"""The one writer of a `.kvm` file: append and publish, commit, truncate, recover, close.

Order is everything here. Publishing: data, then the length. Committing: data, checksums and sketches, sync, slot, sync.
Truncating below a commit: the shorter commit in both slots, then the lower lengths, then the generation, and only
then may rows be overwritten.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import (
    CacheChangedError,
    CorruptCacheError,
    KvmmapError,
    MetadataError,
    PoisonedError,
    VersionMismatchError,
)
from ...format import Section, Slot, Superblock, checksum
from ...geometry import CacheGeometry, LayerGeometry
from ...metadata import Document
from ..after_fork import close_in_children, refuse_forked
from ..posix import PosixFile, closing_on_error
from ..protocols import Durability, Rows, Verify, seq_len
from .commit_checksums import Signer
from .live_record import LiveRecord
from .placement import METADATA_ROOM, already_exists, build_file, lock_file, map_live, place_of, replace_file
from .reader import MappedReader, Snapshot, read_superblock
from .verified_blocks import Proven
from .writer_layer import WriterLayer

UNKNOWN_GENERATIONS = 2**16
"""Added to the last commit's generation where the present one can't be read: more truncations than there were."""

STRETCH_BYTES = 2 * 1024 * 1024
"""Rows are quantised and written in stretches of at most this size: codes stay in the cache, and pieces are few. In
positions it is a power of two, so that pieces of a prompt start and end where large pages do. Appending a prompt of
bf16 is some 12 % faster than in stretches of a quarter of it (medians, on a loaded machine)."""


class MappedWriter(MappedReader):
    """A `.kvm` file open for appending. Holds the writer's lock until it is closed or the process ends."""

    writable = True
    layers: Sequence[WriterLayer]

    def __init__(
        self,
        file: PosixFile,
        superblock: Superblock,
        *,
        durability: Durability,
        recover: bool = False,
        verify: Verify = "read",
        record_use: bool = False,
    ) -> None:
        if superblock.unknown_sections:
            raise VersionMismatchError(
                f"{file.path}: has sections of kinds {superblock.unknown_sections}, unknown here, and appending would "
                "leave them wrong: use a newer kvmmap, or read only",
                path=file.path,
                actual=superblock.unknown_sections,
            )
        self._pid = os.getpid()
        self._poison: OSError | None = None
        self._durability = durability
        self._scratches: dict[LayerGeometry, tuple[Rows, Rows]] = {}
        self._new_document: tuple[Document, bytes] | None = None
        self._tail_checked = False
        self._name_synced = False
        self._settled = True
        self._ready = False  # tail checked, settled, not poisoned: all that an append need look at
        self._generation = 1
        self._taking_back: int | None = None
        self._stepping = False
        super().__init__(file, superblock, recover=recover, verify=verify, record_use=record_use)
        self._recover()
        slot = self.snapshot.slot
        self.foreign, self.foreign_tokens = slot.seq_len, slot.token_len
        self._signer = Signer(self, slot)
        close_in_children(file)

    # Opening

    @classmethod
    def open_locked(
        cls,
        path: str,
        *,
        timeout: float,
        durability: Durability = "publish",
        recover: bool = False,
        verify: Verify = "read",
        record_use: bool = False,
    ) -> MappedWriter:
        """Open for appending, waiting up to `timeout` seconds for another writer to finish."""
        file, superblock = lock_file(path, timeout)
        with closing_on_error(file):
            return cls(file, superblock, durability=durability, recover=recover, verify=verify, record_use=record_use)

    @classmethod
    def create(
        cls,
        path: str,
        geometry: CacheGeometry,
        document: Document,
        *,
        durability: Durability = "publish",
        overwrite: bool = False,
        timeout: float = 0,
        metadata_room: int = METADATA_ROOM,
    ) -> MappedWriter:
        """Make a new file, put it at `path` whole, and hold it for appending."""
        path = place_of(path, overwrite=overwrite)
        file = build_file(path, geometry, document, metadata_room=metadata_room)
        try:
            file.try_lock()
            superblock = read_superblock(file)
            if overwrite and os.path.lexists(path):
                replace_file(file, path, timeout)
            else:
                file.link_to(path)
            return cls(file, superblock, durability=durability)
        except BaseException as error:
            if file.path != path:
                file.discard()
            else:
                file.close()
            if isinstance(error, FileExistsError) and not isinstance(error, KvmmapError):
                raise already_exists(path) from None
            raise

    def _live_record(self, memory: mmap.mmap) -> LiveRecord:
        return map_live(self.file, self.superblock, writable=True)

    def _make_layers(self) -> Sequence[WriterLayer]:
        return [WriterLayer(self, number, layer) for number, layer in enumerate(self.geometry.layers)]

    def scratch(self, geometry: LayerGeometry) -> tuple[Rows, Rows]:
        """Rows to quantise into: a stretch, and its first position. Layers of one shape share them."""
        if geometry not in self._scratches:
            fitting = 1 << (max(STRETCH_BYTES // geometry.position_bytes, 1).bit_length() - 1)
            count = min(fitting, self.geometry.capacity)  # none at capacity 0, of a position that may be gigabytes
            rows = Rows.allocate(geometry, count)
            self._scratches[geometry] = rows, rows.part(0, 1)
        return self._scratches[geometry]

    def _recover(self) -> None:
        """Go on from what may be believed: roll back steps that reached only some layers, and make the lengths live."""
        before, live = self.snapshot, self.live
        length, (which, slot) = min(before.lengths), (before.which, before.slot)
        tokens = min(before.token_len, length)
        if live.in_use() or not slot.closed:
            which, slot = self._assure(which, slot)
        generation = live.get("generation")
        if generation < 0:
            generation = slot.generation + UNKNOWN_GENERATIONS
        generation = max(generation, slot.generation)
        # An even one: a truncation, or this very step, was cut off.
        shown = min(live.lengths()), min(live.get("token_len"), length)
        if generation % 2 and shown != (length, tokens):
            generation += 1
            live.put("generation", generation)  # positions that readers may have seen are going
        for layer in range(self.geometry.num_layers):
            live.publish(layer, length)
        live.put("token_len", tokens)
        live.put("superseded", 0)
        live.put("acknowledged", slot.sequence)
        live.put("writer_pid", self._pid)
        self._generation = generation | 1
        live.put("generation", self._generation)
        live.trust()
        lengths = [length] * self.geometry.num_layers
        word = live.generation_word()
        self._take(Snapshot(which, slot, True, lengths, tokens, word, before.proven))

    def _assure(self, which: int, slot: Slot) -> tuple[int, Slot]:
        """See to it that the commit that counts is durable, and that the other one promises no more than it.

        Whoever wrote it may have died between writing and syncing it, or its sync may have failed, and it is about to
        become the only copy: it is written again, same bytes, and synced. If it is a truncation whose second slot was
        never written, rows that the other slot promises are about to be overwritten.
        """
        self.slots.write(self.file, which, slot)
        self._sync()
        other = self.slots.read()[1 - which]
        if other is not None and (other.seq_len > slot.seq_len or other.token_len > slot.token_len):
            which, slot = 1 - which, slot.successor()
            self.slots.write(self.file, which, slot)
            self._sync()
        return which, slot

    # Appending

    def check(self) -> None:
        self.require_open()

    def check_writable(self) -> None:
        """Raise unless this process may write, and what it would build on is sound."""
        if self._memory is None:
            self.check()
        if os.getpid() != self._pid:
            refuse_forked(self.path, self._pid)
        if not self._ready:
            self._get_ready()

    def _get_ready(self) -> None:
        if self._poison is not None:
            raise PoisonedError(
                f"{self.path}: an earlier sync failed ({self._poison}); close and reopen it: everything up to the "
                "last commit is there",
                path=self.path,
            ) from self._poison
        if not self._settled:
            self._settle()
        if not self._tail_checked:
            slot = self.snapshot.slot
            self._signer.check_tails(slot)
            self._note_proven(slot.seq_len, slot.token_len)
            self._tail_checked = True
        self._ready = True

    def unsettle(self) -> None:
        """Something was cut off between two of its steps (Ctrl-C): look what is in the file before the next one."""
        self._settled = self._ready = False

    def _settle(self) -> None:
        """Bring this handle and the file in line again."""
        which, slot = self.slots.newest()
        if slot != self.snapshot.slot:
            which, slot = self._assure(which, slot)
            self.live.put("acknowledged", slot.sequence)
            self.snapshot = self.snapshot._replace(which=which, slot=slot)
        self._signer.rewind(slot.seq_len, slot.token_len)
        self._tail_checked = False
        for layer, length in zip(self.layers, self.live.lengths(), strict=True):
            layer.length = length if length >= 0 else layer.length
        tokens = self.live.get("token_len")
        self.token_len = tokens if tokens >= 0 else self.token_len
        if self._stepping:  # what reached only some layers is not part of the cache
            self._taking_back = seq_len(self)
            self._stepping = False
        if self._taking_back is not None:
            self._take_back(self._taking_back)
        self._settled = True

    def tell_sums(self, length: int, sums: NDArray[np.uint64]) -> None:
        """Take the checksums of what is appended since the last commit from somebody who knows them, and hash nothing.

        They must be those of the rows that were meant to be written: should others be in the file, reading tells.

        Args:
            length: what they go to, and the next commit with them.
            sums: u64 [blocks, num_layers], from the block that the last commit ends in.
        """
        self._signer.tell(length, sums)

    def write_sketches(self, first: int, stop: int) -> None:
        """Write the sketches of blocks [first, stop), whose rows came from elsewhere with their checksums."""
        self._signer.write_sketches(first, stop)

    def sketch_ahead(self, layer: int, stop: int) -> None:
        """Write the sketches of a layer's blocks below `stop` before they are committed: see `Signer`."""
        self._signer.sketch_ahead(layer, stop)

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        offset = self.superblock.section(Section.TOKEN_IDS).offset + 4 * start
        self.file.write((offset,), (np.ascontiguousarray(ids, "<i4"),))

    def publish_tokens(self, length: int) -> None:
        try:
            self.live.put("token_len", length)
            self.token_len = length
        except BaseException:
            self.unsettle()
            raise

    def publish_step(self, length: int) -> None:
        # Before anything is published, so that whatever cuts it off finds it noted.
        self._stepping = True
        self.unsettle()
        try:
            for layer in self.layers:
                layer.publish(length)
            self._stepping = False
            self._settled = self._ready = True
        except BaseException:
            self._settle()  # at once: who sees the error looks at the lengths, and builds on them
            raise

    def appended(self) -> None:
        if self._durability == "commit":
            self.commit()

    # Committing

    def set_document(self, document: Document) -> None:
        self.check_writable()
        data = document.encode()
        room = self.superblock.section(Section.METADATA).size // 2
        if len(data) > room:
            raise MetadataError(
                f"{self.path}: metadata is {len(data):,} bytes of JSON and there is room for {room:,}; "
                "kvmmap.create(metadata_room=...) reserves more",
                path=self.path,
                expected=room,
                actual=len(data),
            )
        self._new_document = document, data

    @property
    def document(self) -> Document:
        return self._new_document[0] if self._new_document else super().document

    def commit(self, *, closing: bool = False) -> None:
        """Make the positions complete in every layer survive power loss; nothing is done if they do already."""
        with self.lock:
            self.check_writable()
            slot, length = self.snapshot.slot, seq_len(self)
            tokens = min(self.token_len, length)
            same = (slot.seq_len, slot.token_len) == (length, tokens) and self._new_document is None
            self._sync_name()
            if same and (slot.closed or not closing):
                return
            if self.file.stat().st_nlink == 0:
                raise CacheChangedError(
                    f"{self.path}: the file was removed or replaced, so a commit would save nothing; copy what you "
                    "need into a new cache",
                    path=self.path,
                )
            self._commit(length, tokens, self._generation, closed=closing, both=closing)

    def _commit(self, length: int, tokens: int, generation: int, *, closed: bool, both: bool) -> None:
        before = self.snapshot.slot
        try:
            tails = self._signer.sign(length, tokens)
            half, size, digest = before.metadata_half, before.metadata_bytes, before.metadata_checksum
            if self._new_document is not None:
                # The half that the last commit does not name: it stays readable until this one counts.
                data = self._new_document[1]
                half, size, digest = 1 - half, len(data), checksum(data)
                section = self.superblock.section(Section.METADATA)
                self.file.write((section.offset + half * (section.size // 2),), (data,))
            self._sync()
            slot = Slot(
                sequence=max(before.sequence, self.live.get("acknowledged")) + 1,
                seq_len=length,
                token_len=tokens,
                generation=generation,
                commit_ns=time.time_ns(),
                closed=closed,
                metadata_half=half,
                metadata_bytes=size,
                metadata_checksum=digest,
                tail_checksums=tails,
            )
            self._write_slot(slot)
            self._new_document = None
            self.live.put("acknowledged", slot.sequence)
            if both:
                self._write_slot(slot.successor())
        except BaseException:
            self.unsettle()
            raise

    def _sync_name(self) -> None:
        """Who made this file, or put it in another's place, may have died before its name was durable."""
        if not self._name_synced:
            name = self._name()
            if self.live.get("named") != name:
                self.file.sync_name()
                self.live.put("named", name)
            self._name_synced = True

    def _name(self) -> int:
        """Return a number for the file's name and the folder that it stands in."""
        folder, name = os.path.split(self.path)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(folder)
            return checksum(b"%d %d %b" % (status.st_dev, status.st_ino, os.fsencode(name))) >> 24
        return 0

    def _write_slot(self, slot: Slot) -> None:
        which = 1 - self.snapshot.which
        self.slots.write(self.file, which, slot)
        self._sync()
        self.snapshot = self.snapshot._replace(which=which, slot=slot)

    def _sync(self) -> None:
        try:
            self.file.sync()
        except OSError as error:
            # What the kernel could not write it may have dropped, so a second try would promise what is lost, and
            # what was published can no longer be believed by anyone.
            self._poison, self._ready = error, False
            self.live.distrust()
            self._change_generation(self._generation + 2, self.snapshot.proven)
            raise

    # Taking back

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; durable on return as far as they were committed."""
        with self.lock:
            self.check_writable()
            if length < self.snapshot.slot.seq_len or length < self.snapshot.slot.token_len:
                self._check_block(length)
                self._sync_name()
                tokens = min(self.snapshot.slot.token_len, length)
                self._note_proven(min(self.snapshot.slot.seq_len, length), tokens)
                self.unsettle()  # until the signer, set back now, has done its work: it may be cut off in between
                self._signer.rewind(length, tokens)
                # Both slots: the older one promises rows that are about to be overwritten.
                self._commit(length, tokens, self._generation + 2, closed=False, both=True)
                self._settled = self._ready = True
            try:
                self._take_back(length)
            except BaseException:
                self._settle()  # at once, as in `publish_step`
                raise

    def _take_back(self, length: int) -> None:
        """Lower the lengths. The generation is even meanwhile, so that whoever comes after a death knows that some
        may be lower than readers have seen them."""
        try:
            self._taking_back = length
            self.live.put("generation", self._generation + 1)
            for layer in self.layers:
                layer.publish(min(layer.length, length))
            self.publish_tokens(min(self.token_len, length))
            self.foreign, self.foreign_tokens = min(self.foreign, length), min(self.foreign_tokens, length)
            proven = self.snapshot.proven
            self._change_generation(self._generation + 2, proven and proven.cut(length))
            self._taking_back = None
        except BaseException:
            self.unsettle()
            raise

    def _change_generation(self, generation: int, proven: Proven | None) -> None:
        """Tell other processes, and reads in other threads of this one, that rows are not what they were."""
        self._generation = generation
        self.live.put("generation", generation)
        self.snapshot = self.snapshot._replace(generation_word=self.live.generation_word(), proven=proven)

    def _note_proven(self, length: int, token_len: int) -> None:
        """The incomplete blocks, of rows and token ids, at these lengths were just compared with their checksums."""
        proven, size = self.snapshot.proven, self.geometry.block_tokens
        if proven is not None:
            tracks = [length] * self.geometry.num_layers + [token_len]
            for track, end in enumerate(tracks):
                if end % size:
                    proven.note(track, end // size, end % size)

    def _check_block(self, length: int) -> None:
        """The block that a truncation cuts gets a new checksum: see first that its old one holds."""
        from .verify import check_blocks, check_tokens

        size, slot = self.geometry.block_tokens, self.snapshot.slot
        if length % size:
            block = length // size
            damages = [*check_blocks(self, block, block + 1), *check_tokens(self, slot, block, block + 1)]
            for damage in damages:
                raise CorruptCacheError(
                    f"{self.path}: {damage.what}; nothing was truncated: truncate({length // size * size}) leaves "
                    "the damaged block out",
                    path=self.path,
                    layer=damage.layer,
                    position=damage.start,
                )

    def refresh(self) -> bool:
        """The writer sees all there is already; a process that was forked from it does not."""
        if os.getpid() != self._pid:
            return super().refresh()
        self.check()
        return False

    # Closing

    def close(self) -> None:
        """Commit, and let go of the lock. An error of the commit is raised, and the file is closed all the same."""
        with self.lock:
            if self._memory is None:
                return
            try:
                if os.getpid() == self._pid and self._poison is None:
                    self._close_commit()
            finally:
                del self._signer  # it holds views of the map
                super().close()

    def _close_commit(self) -> None:
        slot = self.snapshot.slot
        changed = (slot.seq_len, slot.token_len) != (seq_len(self), min(self.token_len, seq_len(self)))
        if changed or self._new_document is not None or not slot.closed:
            self.commit(closing=True)
        self._sync_name()
        self.live.distrust()  # from here on only the commit counts
