"""One layer of a Zarr-backed cache that is appended to."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...ranges import check_room
from ...recent import RecentRows
from ..protocols import Rows
from ..readonly import ReadOnlyStorage
from .handle import GroupHandle
from .layer import ZarrLayer
from .outgoing import OutgoingShards
from .recent_rows import recent_records
from .shard_cache import ShardCache


class ZarrWriterLayer(ZarrLayer):
    """One layer, appended to.

    Args:
        storage, index, handle, shards: as in `ZarrLayer`.
        outgoing: the writer's open shards.
    """

    def __init__(
        self, storage: ReadOnlyStorage, index: int, handle: GroupHandle, shards: ShardCache, outgoing: OutgoingShards
    ) -> None:
        super().__init__(storage, index, handle, shards)
        self._outgoing = outgoing
        self.ahead = False
        """True from the first write of an append to its publication."""
        self._staged: Rows | None = None
        """What `stage` has returned last."""
        self._unsaved = False
        """True if there are rows in 16 bits that are in memory alone."""

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        check_room(self.length, count, self.capacity, layer=self.index)
        if self.ahead:
            self.roll_back()
        shard, offset = divmod(self.length, self._handle.layout.shard_tokens)
        if count and offset and shard not in self._outgoing.open[self.index]:
            # The block that an append continues gets a new checksum: fetching it compares the old one.
            self._outgoing.adopt(self.index, shard, offset)
        return self.length

    def stage(self, start: int, count: int) -> Rows:
        size = self._handle.layout.shard_tokens
        shard, offset = divmod(start, size)
        memory = self._outgoing.room(self.index, shard).memory
        self._staged = memory.rows.part(offset, min(size, offset + count))
        return self._staged

    def write(self, start: int, rows: Rows) -> None:
        """Write rows, staged or borrowed. Borrowed ones are stored from where they are if a shard begins with them."""
        self.ahead = True
        size = self._handle.layout.shard_tokens
        done, count = 0, len(rows[0])
        if rows is self._staged:  # they are in place, within one shard
            shard, offset = divmod(start, size)
            if offset + count == size:
                self._outgoing.send(self.index, shard, size)
            return
        while done < count:
            shard, offset = divmod(start + done, size)
            stop = min(count, done + size - offset)
            part = rows.part(done, stop)
            if not offset and shard not in self._outgoing.open[self.index]:
                self._outgoing.lend(self.index, shard, part)
            else:
                staged = self.stage(start + done, stop - done)
                if not np.may_share_memory(staged[-1], part[-1]):
                    staged.fill(part)
            if offset + stop - done == size:
                self._outgoing.send(self.index, shard, size)
            done = stop

    def publish(self, length: int) -> None:
        """Make positions below `length` this handle's; others see them from the next commit on."""
        self._handle.lengths[self.index] = length
        self.ahead = False
        self._staged = None

    def roll_back(self) -> None:
        """Forget what a failed append has written past the length."""
        self._outgoing.roll_back(self.index)
        self.forget_recent(self.length)
        self.ahead = False

    # Rows in 16 bits

    def recent_rows(self) -> RecentRows | None:
        """What the group has is read once; from then on, what is appended is in memory already."""
        return self.recent if self._loaded is not None else super().recent_rows()

    def keep(self, start: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int) -> None:
        self.recent_rows()
        super().keep(start, keys, key_dtype, values, value_dtype)
        self._unsaved = True

    def take_recent(self, source: RecentRows, start: int, stop: int, at: int = 0) -> None:
        self.recent_rows()
        super().take_recent(source, start, stop, at)
        self._unsaved = True

    def forget_recent(self, length: int) -> None:
        super().forget_recent(length)
        # Slots that truncated positions had taken are empty now; their records may still be those before.
        self._unsaved |= self.recent is not None and self._loaded is not None

    @property
    def has_unsaved_recent(self) -> bool:
        return self._unsaved

    def unsaved_records(self, length: int) -> NDArray[np.uint8] | None:
        """Return the records of positions below `length`; None if the group has them."""
        recent = self.recent_rows() if self._unsaved else None
        return None if recent is None else recent_records(recent, self.geometry.recent_bytes, self.rows, length)

    def note_saved(self) -> None:
        """Note that the group has them."""
        self._unsaved = False

    # Reading what is not stored yet

    def _part(self, shard: int, start: int, stop: int, *, streamed: bool) -> Rows:
        with self._handle.lock:  # an append opens, stores and adopts shards meanwhile
            self.check()
            opened = self._outgoing.open[self.index].get(shard)
            if opened is None:
                self._outgoing.wait_for(self.index, shard)
                return super()._part(shard, start, stop, streamed=streamed)
            base = shard * self._handle.layout.shard_tokens
            return opened.memory.views.part(start - base, stop - base)

    def _read_ahead(self, shard: int, start: int, stop: int) -> None:
        """A writer reads little."""
