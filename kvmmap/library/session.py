"""A session: a cache that begins with what a library had of a prompt, and that the library has when it closes."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..cache import QuantizedKvCache
from ..errors import LibraryFullError, PositionOutOfRangeError
from ..geometry import BLOCK_TOKENS
from ..storage.file.chain import ChainStorage
from ..storage.file.writer import MappedWriter
from .contents import contents_of, disk_bytes
from .index import Contents
from .namespace import Namespace

MEASURED_POSITIONS = 16
"""Positions from which on the time of a prefill is measured."""


class Owner(Protocol):
    """What a session tells its library."""

    def reserve(self, session: Session, size: int) -> None:
        """Make room for bytes that are about to be appended."""

    def evict_for(self, session: Session, size: int) -> bool:
        """Evict so many bytes, the disk being full; False if nothing could go."""

    def has(self, session: Session) -> bool:
        """True if other segments have all positions of a session, and its checkpoints."""

    def record(self, session: Session, contents: Contents) -> None:
        """Name what was committed in the index."""

    def finish(self, session: Session, size: int) -> None:
        """The session's file is closed, and has so many bytes on the disk."""

    def discard(self, session: Session) -> None:
        """The session's file is closed, and holds nothing that counts."""

    def measured(self, session: Session, positions: int, seconds: float) -> None:
        """So many positions took so long to compute."""


class Session(QuantizedKvCache):
    """A cache open for appending, whose first `reused` positions a library had already.

    Everything of `QuantizedKvCache` works, but `truncate` below `reused`: those positions are other caches' as well.
    `flush` and `close` make what is committed part of the library. Positions must have token ids to count.
    """

    reused: int
    """Positions that the library had: they need not be computed."""

    name: str
    """Name of the segment that holds what is appended."""

    namespace: Namespace
    """Whose keys and values they are."""

    parent: str | None
    """Name of the segment that this one continues; None if it begins at position 0."""

    start: int
    """First position of that segment itself."""

    continues: bool
    """True if the segment was there already and is appended to in place."""

    def begin(
        self,
        owner: Owner,
        *,
        name: str,
        namespace: Namespace,
        reused: int,
        parent: str | None,
        start: int,
        continues: bool,
        prompt: NDArray[np.int32],
        may_repeat: bool,
    ) -> None:
        """Be a session, of a storage that is open for appending. For `Library`.

        `may_repeat` says that the library has more of the prompt than what was asked for, so that it may have all of
        what is about to be appended.
        """
        storage = self.storage
        assert isinstance(storage, MappedWriter | ChainStorage)
        self._owner: Owner | None = owner
        self._pid = os.getpid()
        self.name, self.namespace, self.parent = name, namespace, parent
        self.reused, self.start, self.continues = reused, start, continues
        self._prompt = prompt
        self._may_repeat = may_repeat
        self._began = time.monotonic()
        self._prefilled: float | None = None
        self._granted = reused
        # Checksums and sketches of blocks are 1 to 2 % more. What a new file has besides was reserved with it.
        self._position_bytes = namespace.position_bytes * 1.02 + 1
        self._file_path = storage.path
        storage.admitted = reused
        storage.admit = self._admit

    # Appending

    def _admit(self, length: int) -> int:
        """Make room for an append that leads to a length; return the length for which there is room now."""
        owner = self._owner
        if owner is None:
            return self.capacity
        wanted = len(self._prompt)
        if length > wanted:
            if self._prefilled is None:
                self._prefilled = time.monotonic()  # the prompt is complete: this is the first position after it
            wanted = -(-length // BLOCK_TOKENS) * BLOCK_TOKENS
        wanted = min(max(wanted, length), self.capacity)
        try:
            owner.reserve(self, self._bytes(wanted))
        except LibraryFullError:
            if wanted == length:
                raise
            wanted = length
            owner.reserve(self, self._bytes(wanted))
        self._granted = wanted
        return wanted

    def _bytes(self, length: int) -> int:
        return int((length - self._granted) * self._position_bytes)

    def _append(self, keys: Sequence[Any], values: Sequence[Any], token_ids: Any) -> None:
        while True:
            try:
                super()._append(keys, values, token_ids)
                return
            except OSError as error:
                # Nothing was appended. Other programs use the disk, too, so there may be less than was reserved.
                size = len(keys[0]) * self.namespace.position_bytes if len(keys) else 0
                if error.errno != errno.ENOSPC or self._owner is None or not self._owner.evict_for(self, size):
                    raise

    def truncate(self, length: int) -> int:
        """Keep the first `length` positions, at least `reused`; what is removed is durable on return.

        Returns:
            The positions kept, as `QuantizedKvCache.truncate` does.

        Raises:
            PositionOutOfRangeError: fewer are stored; or `length` is below `reused`: other caches may begin with these
                positions. `library.session` with a shorter prompt branches off there.
            OSError, ClosedError, CacheLockedError, PoisonedError, CorruptCacheError: as in `flush`.
        """
        kept = self.restorable(length) if self.states and length < self.seq_len else length
        if kept < self.reused:
            raise PositionOutOfRangeError(
                f"the first {self.reused} positions belong to the library, so they can't be truncated to {length}: "
                "open another session for that prefix",
                position=length,
                expected=self.reused,
                path=self.path,
            )
        return super().truncate(length)

    # Life

    def flush(self) -> None:
        """Make all positions that are complete in every layer survive power loss, and part of the library.

        Raises:
            OSError, CorruptCacheError, ClosedError, CacheLockedError, PoisonedError: as in `QuantizedKvCache.flush`.
        """
        super().flush()
        if self._owner is not None and self.seq_len > self.reused:
            self._owner.record(self, contents_of(self, self.namespace.seed, self.start))

    def close(self) -> None:
        """Commit what is complete, make it part of the library, and release everything. Closing twice is allowed.

        Of a prompt that was asked again nothing is kept, where the library has all of it already.

        Raises:
            OSError: the commit failed; the session is closed all the same, and the library has what was committed.
        """
        owner, self._owner = self._owner, None
        if owner is None or self.closed or os.getpid() != self._pid:  # a forked process: the session is its parent's
            super().close()
            return
        path = self._file_path
        if self.seq_len == self.reused or self._repeats(owner):
            try:
                if not self.continues and self.seq_len > self.start:
                    super().truncate(self.start)  # a commit of it would be for nothing
            finally:
                self._close_unchanged(owner)
            return
        ended = self._prefilled or time.monotonic()
        try:
            super().flush()
            owner.record(self, contents_of(self, self.namespace.seed, self.start))
            computed = min(self.seq_len, len(self._prompt)) - self.reused
        finally:
            super().close()
        # After an error the index has the segment as being written, so that it is looked at again.
        owner.finish(self, disk_bytes(path))
        if computed >= MEASURED_POSITIONS:
            owner.measured(self, computed, ended - self._began)

    def _close_unchanged(self, owner: Owner) -> None:
        try:
            super().close()
        finally:
            if self.continues:
                owner.finish(self, disk_bytes(self._file_path))
            else:
                owner.discard(self)

    def _repeats(self, owner: Owner) -> bool:
        """True if nothing of it is committed, and the library has it all: a prompt that was asked again."""
        new = self._may_repeat and not self.continues and self.storage.committed_len <= self.reused < self.seq_len
        return new and self.token_len == self.seq_len and owner.has(self)

    def discard(self) -> None:
        """Close, and keep nothing of what was appended since the last `flush`.

        Raises:
            OSError: as in `close`.
        """
        if self._owner is not None and not self.closed:
            kept = self.storage.committed_len
            self.truncate(max(self.reused, min(kept, self.seq_len)))
        self.close()
