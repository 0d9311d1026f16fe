"""The part of a writer that makes positions durable: its state, its commits, and taking over from the last writer.

Order is everything here. A commit writes data, checksums and sketches, syncs, writes a slot, and syncs again. A failed
sync is final: what the kernel could not write it may have dropped, so nothing that was published is valid any more.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

from ...errors import CacheChangedError, MetadataError, PoisonedError, VersionMismatchError
from ...format import Section, Slot, Superblock, checksum
from ...metadata import Document
from ..after_fork import close_in_children, refuse_forked
from ..posix import PosixFile
from ..protocols import Durability, Verify
from .checkpoints import WriterCheckpoints
from .commit_checksums import CommitChecksums
from .file_sketches import SketchWriter
from .reader import MappedReader
from .snapshot import Snapshot
from .verified_blocks import VerifiedBlocks
from .writer_state import WriterState

UNKNOWN_GENERATIONS = 2**16
"""Added to the last commit's generation where the present one can't be read: more truncations than there were."""


_READY = WriterState.READY  # looking a member up takes longer


class Committer(MappedReader):
    """A file that this handle holds the writer's lock of."""

    writable = True
    checkpoints: WriterCheckpoints

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
        self._durability = durability
        self._state = WriterState.OPENED
        self._sync_error: OSError | None = None
        self._new_document: tuple[Document, bytes] | None = None
        self._name_synced = False
        self.durable = True
        """False until the first commit of a file that was made without syncing it."""
        self.before_first_commit: Callable[[], None] | None = None
        """Makes durable what a file of which nothing is durable yet needs: its parent."""
        self._generation = 1
        self.admitted = superblock.geometry.capacity
        """Positions up to which rows may be written without asking `admit`."""
        self.admit: Callable[[int], int] | None = None
        """Called with the length that an append leads to, before it writes anything; returns `admitted`, or raises."""
        super().__init__(file, superblock, recover=recover, verify=verify, record_use=record_use)
        self._reopen()
        slot = self.snapshot.slot
        self.holder.inherited_len, self.holder.inherited_tokens = slot.seq_len, slot.token_len
        self._checksums = CommitChecksums(self.mapped, slot)
        self._sketches = SketchWriter(file, superblock, self._checksums.slabs, slot.seq_len)
        close_in_children(file)

    # State

    def check(self) -> None:
        _ = self.mapped.memory

    def check_writable(self) -> None:
        """Raise unless this process may write, and what it would continue is sound."""
        if self._state is _READY and os.getpid() == self._pid:  # before every append
            return
        self.check()
        if os.getpid() != self._pid:
            refuse_forked(self.path, self._pid)
        if self._state is WriterState.POISONED:
            raise PoisonedError(
                f"{self.path}: an earlier sync failed ({self._sync_error}); close and reopen it: everything up to the "
                "last commit is there",
                path=self.path,
            ) from self._sync_error
        if self._state is WriterState.INTERRUPTED:
            self._reload()
        if self._state is WriterState.OPENED:
            slot = self.snapshot.slot
            self._checksums.verify_tails(slot)
            self._note_verified(slot.seq_len, slot.token_len)
            self._state = WriterState.READY

    def ask_admission(self, length: int) -> None:
        """Raise unless rows up to `length` may be written."""
        if self.admit is not None:
            self.admitted = self.admit(length)

    def interrupt(self) -> None:
        """Mark interrupted: state is reloaded from the file before the next operation."""
        if self._state is not WriterState.POISONED:
            self._state = WriterState.INTERRUPTED

    def _reload(self) -> None:
        """Bring this handle and the file in line after an interruption."""
        which, slot = self.mapped.slots.newest()
        if slot != self.snapshot.slot:
            which, slot = self._make_durable(which, slot)
            self.live.put("acknowledged", slot.sequence)
            self.holder.current = self.snapshot._replace(which=which, slot=slot)
        self._rewind(slot.seq_len, slot.token_len)
        self.checkpoints.reload(slot)
        for layer, length in zip(self.layers, self.live.lengths(), strict=True):
            layer.length = length if length >= 0 else layer.length
            layer.forget_recent(layer.length)
        tokens = self.live.get("token_len")
        self.token_len = tokens if tokens >= 0 else self.token_len
        if self._state is WriterState.INTERRUPTED:
            self._state = WriterState.OPENED

    def _rewind(self, length: int, token_len: int) -> None:
        self._checksums.rewind(length, token_len)
        self._sketches.rewind(length)

    def _note_verified(self, length: int, token_len: int) -> None:
        """Remember that the incomplete blocks at these lengths, of rows and token ids, match their checksums."""
        verified, size = self.snapshot.verified, self.geometry.block_tokens
        if verified is not None:
            tracks = [length] * self.geometry.num_layers + [token_len]
            for track, end in enumerate(tracks):
                if end % size:
                    verified.note(track, end // size, end % size)

    # Taking over

    def _reopen(self) -> None:
        """Continue from what is valid: roll back steps that reached only some layers, and make the lengths live."""
        before, live = self.snapshot, self.live
        length, (which, slot) = min(before.lengths), (before.which, before.slot)
        tokens = min(before.token_len, length)
        if live.in_use() or not slot.closed:
            which, slot = self._make_durable(which, slot)
        generation = live.get("generation")
        if generation < 0:
            generation = slot.generation + UNKNOWN_GENERATIONS
        generation = max(generation, slot.generation)
        # An even one: a truncation, or this very step, was interrupted.
        shown = min(live.lengths()), min(live.get("token_len"), length)
        if generation % 2 and shown != (length, tokens):
            generation += 1
            live.put("generation", generation)  # positions that readers may have seen are going
        for layer in range(self.geometry.num_layers):
            live.publish(layer, length)
        self.checkpoints = WriterCheckpoints(self.mapped, self.holder, self, length)
        live.put("token_len", tokens)
        live.put("superseded", 0)
        live.put("acknowledged", slot.sequence)
        live.put("writer_pid", self._pid)
        self._generation = generation | 1
        live.put("generation", self._generation)
        live.trust()
        lengths = [length] * self.geometry.num_layers
        word = live.generation_word()
        self._show(Snapshot(which, slot, True, lengths, tokens, word, before.verified))

    def _make_durable(self, which: int, slot: Slot) -> tuple[int, Slot]:
        """Make the current slot durable, and ensure that the other slot records no longer length.

        Its writer may have died between writing and syncing it, or its sync may have failed, and it is about to become
        the only copy: it is written again, same bytes, and synced. If it is a truncation whose second slot was never
        written, rows that the other slot covers are about to be overwritten.
        """
        slots = self.mapped.slots
        slots.write(self.file, which, slot)
        self._sync()
        other = slots.read()[1 - which]
        if other is not None and (other.seq_len > slot.seq_len or other.token_len > slot.token_len):
            which, slot = 1 - which, slot.successor()
            slots.write(self.file, which, slot)
            self._sync()
        return which, slot

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
            slot, length = self.snapshot.slot, self.seq_len
            tokens = min(self.token_len, length)
            if self.checkpoints.staged == length:
                self.checkpoints.name_staged()
                slot = self.snapshot.slot  # to have room for it there may have been a commit
            same = (slot.seq_len, slot.token_len) == (length, tokens) and self._new_document is None
            same = same and slot.checkpoints == self.checkpoints.to_commit(length)
            same = same and not self._has_unsaved_recent()
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

    def commit_again(self) -> None:
        """Commit, even if nothing has changed."""
        length = self.seq_len
        self._sync_name()
        self._commit(length, min(self.token_len, length), self._generation, closed=False, both=False)

    def _commit(self, length: int, tokens: int, generation: int, *, closed: bool, both: bool) -> None:
        before = self.snapshot.slot
        try:
            tails = self._checksums.write(length, tokens)
            self._sketches.commit(length)
            self._save_recent(closed=closed)
            half, size, digest = before.metadata_half, before.metadata_bytes, before.metadata_checksum
            if self._new_document is not None:
                # The half that the last commit does not name: it stays readable until this one counts.
                data = self._new_document[1]
                half, size, digest = 1 - half, len(data), checksum(data)
                section = self.superblock.section(Section.METADATA)
                self.file.write((section.offset + half * (section.size // 2),), (data,))
            if self.before_first_commit is not None:
                self.before_first_commit()
                self.before_first_commit = None
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
                checkpoints=self.checkpoints.to_commit(length),
            )
            self._write_slot(slot)
            self.durable = True
            self._new_document = None
            self.live.put("acknowledged", slot.sequence)
            if both:
                self._write_slot(slot.successor())
        except BaseException:
            self.interrupt()
            raise

    def _has_unsaved_recent(self) -> bool:
        return self.geometry.keeps_recent and any(layer.has_unsaved_recent for layer in self.layers.made())

    def _save_recent(self, *, closed: bool) -> None:
        """Write the rows in 16 bits that the file does not have yet. Before it counts as closed, look for torn ones."""
        if self.geometry.keeps_recent:
            for layer in self.layers if closed else self.layers.made():
                layer.settle_recent() if closed else layer.save_recent()

    def _write_slot(self, slot: Slot) -> None:
        which = 1 - self.snapshot.which
        self.mapped.slots.write(self.file, which, slot)
        self._sync()
        self.holder.current = self.snapshot._replace(which=which, slot=slot)

    def _sync(self) -> None:
        try:
            self.file.sync()
        except OSError as error:
            # What the kernel could not write it may have dropped, so a second sync would promise what is lost, and
            # what was published is not valid any more.
            self._sync_error, self._state = error, WriterState.POISONED
            self.live.distrust()
            self._change_generation(self._generation + 2, self.snapshot.verified)
            raise

    def _change_generation(self, generation: int, verified: VerifiedBlocks | None) -> None:
        """Tell other processes, and reads in other threads of this one, that rows were replaced."""
        self._generation = generation
        self.live.put("generation", generation)
        self.holder.current = self.snapshot._replace(generation_word=self.live.generation_word(), verified=verified)

    def _sync_name(self) -> None:
        """Make the file's name durable: its creator, or a process that replaced it, may have died before."""
        if not self._name_synced:
            name = self._name_id()
            if self.live.get("named") != name:
                self.file.sync_name()
                self.live.put("named", name)
            self._name_synced = True

    def _name_id(self) -> int:
        """Return a number for the file's name and the folder that it is in."""
        folder, name = os.path.split(self.path)
        with contextlib.suppress(FileNotFoundError):
            status = os.stat(folder)
            return checksum(b"%d %d %b" % (status.st_dev, status.st_ino, os.fsencode(name))) >> 24
        return 0

    def _continuable(self, snapshot: Snapshot) -> int:
        return min(snapshot.lengths)  # `resume` truncates, and copies bring rows before their checkpoints

    def refresh(self) -> bool:
        """The writer sees all there is already; a process that was forked from it does not."""
        if os.getpid() != self._pid:
            return super().refresh()
        self.check()
        return False

    def close(self) -> None:
        """Commit, and release the lock. An error of the commit is raised, and the file is closed all the same."""
        with self.lock:
            if self.closed:
                return
            try:
                if os.getpid() == self._pid and self._state is not WriterState.POISONED:
                    self._close_commit()
            finally:
                del self._checksums, self._sketches  # they hold views of the map
                self._state = WriterState.CLOSED
                super().close()

    def _close_commit(self) -> None:
        slot = self.snapshot.slot
        length = self.seq_len
        changed = (slot.seq_len, slot.token_len) != (length, min(self.token_len, length))
        changed |= self.checkpoints.staged == length or slot.checkpoints != self.checkpoints.to_commit(length)
        changed |= self._has_unsaved_recent()
        if changed or self._new_document is not None or not slot.closed:
            self.commit(closing=True)
        if self.durable:
            self._sync_name()
        self.live.distrust()  # from here on only the commit counts
