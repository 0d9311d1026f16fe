"""One layer of a Zarr-backed cache that is appended to."""

from __future__ import annotations

import numpy as np

from ...geometry import check_room
from ..protocols import Rows
from ..readonly import ReadOnlyStorage
from .handle import GroupHandle
from .layer import ZarrLayer
from .outgoing import OutgoingShards
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
        self.ahead = False

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
