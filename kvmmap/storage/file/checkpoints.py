"""Checkpoints in a `.kvm` file: slots of header and tensors, words that publish them, and commits that name them.

A slot that the live record or a commit names is not overwritten, so a checkpoint is there whole or not at all. Readers
copy it out with its checksums compared, and ask afterwards whether it was replaced meanwhile.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
import xxhash
from numpy.typing import NDArray

from ...errors import CacheChangedError, CorruptCacheError
from ...format import NO_CHECKPOINT, CheckpointEntry, CheckpointHeader, Section, Slot, checksum, checksum_of
from ...state_spec import StateSpec, aligned
from ...threads import threads_of
from ..checkpoints import Checkpoint, ReadOnlyCheckpoints
from .mapped_file import MappedFile
from .snapshot import SnapshotHolder

READ_BYTES = 1 << 18
"""Bytes that are read and hashed at a time: they are still in the processor's cache when they are hashed."""


WRITES = 8
"""Buffers that are written in one call of the compiled core, which takes no more."""


HASHED_BESIDE = 1 << 21
"""Bytes of tensors from which on a thread hashes them; for fewer it is not worth starting one."""


class _CheckpointReader(ReadOnlyCheckpoints):
    """What readers and writers of a file have in common.

    Args:
        mapped: the file.
        holder: of the snapshot of the handle.
    """

    def __init__(self, mapped: MappedFile, holder: SnapshotHolder) -> None:
        super().__init__(mapped.geometry, mapped.path)
        self._mapped = mapped
        self._holder = holder
        self._layout = mapped.superblock.checkpoint_layout

    def _entries(self) -> Sequence[CheckpointEntry]:
        """Return what each slot holds."""
        return self._holder.current.checkpoints

    def slots(self) -> Sequence[Checkpoint | None]:
        length = min(self._holder.current.lengths) if self._entries() else 0
        return self._shown(length)

    def _shown(self, length: int) -> list[Checkpoint | None]:
        return [
            Checkpoint(entry.position, entry.pinned) if entry.word and entry.position <= length else None
            for entry in self._entries()
        ]

    def _offset(self, slot: int) -> int:
        return self._mapped.superblock.section(Section.CHECKPOINT, slot).offset

    def header(self, slot: int) -> CheckpointHeader | None:
        """Read a slot's header; None if it is damaged."""
        data = self._mapped.read(self._offset(slot), self._layout.header_size)
        return CheckpointHeader.decode(data, self._mapped.superblock.file_id, len(self.specs))

    def _read(self, slot: int, checkpoint: Checkpoint) -> list[NDArray[Any]]:
        version, entry = self._holder.version(), self._entries()[slot]
        header = self.header(slot)
        if header is None or header.position != checkpoint.position or entry.checksum not in (0, header.checksum):
            self._refuse_damaged(slot, entry, "its header does not match")
        found = []
        tensors = _empty(self.specs)
        for spec, tensor, offset, expected in zip(
            self.specs, tensors, self._layout.offsets, header.checksums, strict=True
        ):
            if self._fill(self._offset(slot) + offset, tensor) != expected:
                self._refuse_damaged(slot, entry, f"{spec}: checksum does not match")
            found.append(tensor)
        self._holder.validate(version)
        return found

    def digests(self, position: int) -> tuple[int, ...]:
        slot = self._find(position)
        header = None if slot is None else self.header(slot)
        return super().digests(position) if header is None or header.position != position else header.checksums

    def _fill(self, offset: int, tensor: NDArray[Any]) -> int:
        """Fill a tensor from the file, and return its xxh3_64."""
        data = tensor.reshape(-1).view(np.uint8).data
        state = xxhash.xxh3_64()
        for start in range(0, len(data), READ_BYTES):
            piece = data[start : start + READ_BYTES]
            self._mapped.read_into(offset + start, piece)
            state.update(piece)
        return state.intdigest()

    def _refuse_damaged(self, slot: int, entry: CheckpointEntry, what: str) -> NoReturn:
        mapped, snapshot = self._mapped, self._holder.current
        self._holder.validate(snapshot.generation_word)
        replaced = snapshot.live and mapped.live.checkpoints()[slot] != entry.word
        if replaced or mapped.slots.newest()[1].sequence > snapshot.slot.sequence:
            raise CacheChangedError(
                f"{mapped.path}: the checkpoint at position {entry.position} was replaced since this handle last "
                "looked; call refresh()",
                path=mapped.path,
                position=entry.position,
            )
        raise CorruptCacheError(
            f"{mapped.path}: the checkpoint at position {entry.position} is damaged: {what}; truncate() goes to an "
            "earlier one",
            path=mapped.path,
            position=entry.position,
        )


def _empty(specs: Sequence[StateSpec]) -> list[NDArray[Any]]:
    """Allocate the arrays of a checkpoint as one piece: numpy asks for huge pages where an allocation is large."""
    sizes = [aligned(spec.nbytes) for spec in specs]
    whole, found, start = np.empty(sum(sizes), np.uint8), [], 0
    for spec, size in zip(specs, sizes, strict=True):
        found.append(whole[start : start + spec.nbytes].view(spec.numpy_dtype).reshape(spec.shape))
        start += size
    return found


def _hashing(flat: Sequence[memoryview]) -> Callable[[], tuple[int, ...]]:
    """Hash tensors in a thread. What is returned waits for it, and returns their xxh3_64."""
    found: list[int] = []

    def run() -> None:
        found.extend(checksum_of([data]) for data in flat)  # `update` releases the GIL

    thread = threading.Thread(target=run, name="kvmmap-checksums", daemon=True)
    thread.start()

    def finished() -> tuple[int, ...]:
        thread.join()
        return tuple(found)

    return finished


class FileCheckpoints(_CheckpointReader):
    """The checkpoints of a file that is open for reading."""


class Committing(Protocol):
    """What the checkpoints of a writer need of it."""

    def interrupt(self) -> None:
        """Mark interrupted: state is reloaded from the file before the next operation."""

    def commit_again(self) -> None:
        """Commit, even if nothing has changed."""


class WriterCheckpoints(_CheckpointReader):
    """The checkpoints of a file that is open for writing.

    Args:
        mapped, holder: as for reading.
        storage: the writer, which it does not keep alive.
        length: positions that the file continues from.
    """

    def __init__(self, mapped: MappedFile, holder: SnapshotHolder, storage: Committing, length: int) -> None:
        super().__init__(mapped, holder)
        self._storage: Committing = weakref.proxy(storage)
        self._written = NO_CHECKPOINT  # what the staged slot holds
        self._named = list(holder.current.checkpoints)
        self.adopt(holder.current.checkpoints, length)

    def _entries(self) -> Sequence[CheckpointEntry]:
        return self._named

    def slots(self) -> Sequence[Checkpoint | None]:
        return self._shown(self._mapped.geometry.capacity)

    def adopt(self, entries: Sequence[CheckpointEntry], length: int) -> None:
        """Continue with checkpoints that are in the file, those up to a length, and publish them as they are."""
        self._staged = None
        for slot, entry in enumerate(entries):
            found = NO_CHECKPOINT
            if entry.word and entry.position <= length:
                digest = entry.checksum
                if not digest:  # published, and not committed: the header says which it is
                    header = self.header(slot)
                    digest = header.checksum if header is not None and header.position == entry.position else 0
                found = entry._replace(checksum=digest) if digest else NO_CHECKPOINT
            self._publish(slot, found)

    def reload(self, slot: Slot) -> None:
        """Continue from what the live record has, after an interruption."""
        words = self._mapped.live.checkpoints()
        entries = [
            named if named.word == max(word, 0) else CheckpointEntry(max(word, 0), 0)
            for word, named in zip(words, slot.checkpoints, strict=True)
        ]
        self.adopt(entries, self._mapped.geometry.capacity)

    def to_commit(self, length: int) -> tuple[CheckpointEntry, ...]:
        """Return the entries that a commit of `length` positions names."""
        return tuple([entry if entry.position <= length else NO_CHECKPOINT for entry in self._named])

    def _free_slot(self) -> int:
        for _ in range(3):
            committed = [slot.checkpoints for slot in self._mapped.slots.read() if slot is not None]
            for slot, entry in enumerate(self._named):
                if not entry.word and not any(named[slot].word for named in committed):
                    return slot
            # Checkpoints that were replaced since the last commits are still named by them.
            self._storage.commit_again()
        raise AssertionError("every checkpoint slot is named")

    def drop_old(self) -> None:
        """Drop all checkpoints but the last and pinned ones, and return the disk space of all that no commit names."""
        for found in self.all()[:-1]:
            slot = None if found.pinned else self._find(found.position)
            if slot is not None:
                self._drop(slot)
        for _ in self._mapped.slots.read():
            self._storage.commit_again()  # now neither commit slot names them
        for slot, entry in enumerate(self._named):
            if not entry.word:
                self._mapped.file.release(self._offset(slot), self._layout.size)

    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        file, at = self._mapped.file, self._offset(slot)
        flat = [array.reshape(-1).view(np.uint8).data for array in arrays]
        large = sum(map(len, flat)) >= HASHED_BESIDE
        # The order within a slot does not matter: nothing names it before all of it is durable. So large tensors are
        # hashed while they are written, and the disk writes the first ones meanwhile.
        beside = large and threads_of(None) > 1
        checksums = _hashing(flat) if beside else lambda: tuple([checksum(data) for data in flat])
        try:
            for first in range(0, len(flat), WRITES):
                offsets, buffers = self._layout.offsets[first : first + WRITES], flat[first : first + WRITES]
                file.write(tuple([at + offset for offset in offsets]), tuple(buffers))
                if large:
                    file.start_sync(at + offsets[0], offsets[-1] + len(buffers[-1]) - offsets[0])
        finally:
            found = checksums()
        header = CheckpointHeader(
            position=position,
            generation=max(self._mapped.live.get("generation"), 0),
            written_ns=time.time_ns(),
            checksums=found,
        )
        data, digest = header.encode(self._mapped.superblock.file_id)
        file.write((at,), (data,))
        file.start_sync(at, self._layout.size)
        self._written = CheckpointEntry.of(position, False, digest)

    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        digest = self._named[slot].checksum or self._written.checksum
        self._publish(slot, CheckpointEntry.of(checkpoint.position, checkpoint.pinned, digest))

    def _drop(self, slot: int) -> None:
        self._publish(slot, NO_CHECKPOINT)

    def _publish(self, slot: int, entry: CheckpointEntry) -> None:
        try:
            self._mapped.live.publish_checkpoint(slot, entry.word)
            self._named[slot] = entry
        except BaseException:  # Ctrl-C between the two
            self._storage.interrupt()
            raise
