"""Snapshots of a file: which positions are valid as of the last refresh, and whether they still are.

A reader takes no lock and never waits. Data below a published length does not change, except by a truncation, which
changes the generation: so every read is followed by a comparison of that one word, as with a seqlock.
"""

from __future__ import annotations

import time
from typing import NamedTuple

from ...errors import CacheChangedError, CorruptCacheError
from ...format import CheckpointEntry, Slot
from ..refusals import refuse_truncated
from .last_use import UseRecorder
from .mapped_file import MappedFile
from .verified_blocks import VerifiedBlocks


class Snapshot(NamedTuple):
    """One moment of a file."""

    which: int
    """The current commit slot, 0 or 1."""
    slot: Slot
    live: bool
    """True if the lengths are the published ones, False if they are the commit's."""
    lengths: list[int]
    token_len: int
    generation_word: int
    verified: VerifiedBlocks | None
    """Blocks that were compared with their checksums; None if reads compare nothing."""
    checkpoints: tuple[CheckpointEntry, ...] = ()
    """One a checkpoint slot. A published one has no checksum here."""


class SnapshotHolder:
    """The current snapshot of one handle, for everything that reads through it.

    Args:
        mapped: the file.
        recover: use commits alone, even where published lengths are valid.
        verify: compare blocks with their checksums when they are first read.
        use: records that the cache is in use; None for a handle that only looks.

    Raises:
        CorruptCacheError: as `look`.
    """

    def __init__(self, mapped: MappedFile, *, recover: bool, verify: bool, use: UseRecorder | None) -> None:
        self._mapped = mapped
        self._recover = recover
        self._verify = verify
        self._use = use
        self.inherited_len = self.inherited_tokens = mapped.geometry.capacity
        """Positions, from 0, and token ids that this handle may not have written itself."""
        self.current = self.look()

    def look(self, before: Snapshot | None = None) -> Snapshot:
        """Find the lengths that are valid now.

        Args:
            before: the previous snapshot.

        Raises:
            CorruptCacheError: there are none, or published or acknowledged positions are missing.
        """
        live, mapped = self._mapped.live, self._mapped
        for attempt in range(20):
            word = live.generation_word()
            which, slot = mapped.slots.newest()
            published = live.trusted() and not self._recover
            lengths = live.lengths() if published else [slot.seq_len] * mapped.geometry.num_layers
            tokens = live.get("token_len") if published else slot.token_len
            checkpoints = self._published(slot) if published else slot.checkpoints
            wrong = self._contradiction(slot, lengths if published else None, tokens)
            if wrong is None and any(entry.word < 0 for entry in checkpoints):
                wrong = "the published checkpoints are"
            # A truncation lowers the lengths first and changes the generation then. Under an unchanged word they
            # belong to it, or are lower, and so valid.
            if wrong is None and live.generation_word() == word:
                same = before is not None and before.generation_word == word
                verified = before.verified if before and same else self._none_verified()
                return Snapshot(which, slot, published, lengths, tokens, word, verified, checkpoints)
            time.sleep(0.0001 * attempt)  # a writer may be between two of its steps
        raise CorruptCacheError(
            f"{mapped.path}: {wrong or 'its generation is'} damaged; {slot.seq_len} positions of an earlier commit are "
            "intact: kvmmap.open(path, recover=True) goes back to them, `kvmmap repair PATH NEW_PATH` saves what is "
            "sound",
            path=mapped.path,
            position=slot.seq_len,
        )

    def _published(self, slot: Slot) -> tuple[CheckpointEntry, ...]:
        """Return the published checkpoints, with the checksums of those that the commit names as well."""
        if not slot.checkpoints:
            return ()
        return tuple(
            [
                named if named.word == word else CheckpointEntry(word, 0)
                for word, named in zip(self._mapped.live.checkpoints(), slot.checkpoints, strict=True)
            ]
        )

    def _none_verified(self) -> VerifiedBlocks | None:
        geometry = self._mapped.geometry
        return VerifiedBlocks(geometry.num_layers, geometry.capacity, geometry.block_tokens) if self._verify else None

    def _contradiction(self, slot: Slot, lengths: list[int] | None, tokens: int) -> str | None:
        """Name what can't be true: of the commit, and of the published lengths if they are used."""
        live = self._mapped.live
        # Also where lengths are used: metadata, and what checksums cover, are the commit's.
        if live.get("acknowledged") > slot.sequence and not self._recover:
            return "the last commit record is"
        if lengths is None:
            return None
        if live.home() == -1:
            return "the number of the inode that lengths were published in is"
        capacity = self._mapped.geometry.capacity
        # Lengths are lowered only after a shorter commit.
        sound = slot.seq_len <= min(lengths) and max(lengths) <= capacity and slot.token_len <= tokens <= capacity
        return None if sound else "the published lengths are"

    def version(self) -> int:
        """Return the version that `validate` compares with."""
        return self.current.generation_word

    def validate(self, version: int) -> None:
        """Raise if rows that were read since `version` may have been overwritten.

        Raises:
            CacheChangedError: the writer truncated the cache.
            ClosedError: the handle is closed.
        """
        use = self._use
        if use is not None and time.monotonic() >= use.due:  # every read ends here
            self.note_use()
        if self._mapped.live.generation_word() == version:
            return
        if self.current.generation_word != version:
            refuse_truncated(self._mapped.path)
        raise CacheChangedError(
            f"{self._mapped.path}: was truncated by its writer since this handle last looked; call refresh()",
            path=self._mapped.path,
        )

    def note_use(self) -> None:
        """Record that the cache is in use, if this handle records it and has not done so lately."""
        use, lock = self._use, self._mapped.lock
        if use is not None and time.monotonic() >= use.due and lock.acquire(blocking=False):
            try:
                use.record()
            finally:
                lock.release()
