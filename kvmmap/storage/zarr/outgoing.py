"""Shards that a writer fills, and those that are being stored: rows from memory to objects, in threads.

Which of them count, the root says; nothing is known here of commits.
"""

from __future__ import annotations

from ..protocols import Rows
from .committed import BlockChecksums
from .download import ShardRows
from .handle import GroupHandle
from .shard_cache import ShardCache
from .upload import Upload

UNDER_WAY = 2**27
"""Bytes of rows that may be in flight to the store before an append waits."""


class OpenShard:
    """A shard that is being filled, or not stored yet."""

    def __init__(self, memory: ShardRows, stored: int = 0, tail: int = 0) -> None:
        self.memory = memory
        self.stored = stored
        """Positions, from its first, that the store has."""
        self.tail = tail
        """Checksum of the incomplete block at `stored`, 0 if there is none."""


class OutgoingShards:
    """A writer's open shards and uploads.

    Args:
        handle: the group.
        shards: its fetched shards.
        checksums: of its blocks.
    """

    def __init__(self, handle: GroupHandle, shards: ShardCache, checksums: BlockChecksums) -> None:
        self._handle = handle
        self._shards = shards
        self._checksums = checksums
        self.open: list[dict[int, OpenShard]] = [{} for _ in handle.lengths]
        """For each layer, by number: the shard that the length ends in, and those that are not stored yet."""
        self._uploads: dict[tuple[int, int], Upload] = {}

    def room(self, layer: int, shard: int) -> OpenShard:
        """Return an open shard whose buffer is ours, to be filled further; open one if there is none."""
        opened = self.open[layer].get(shard)
        geometry, layout = self._handle.geometry.layers[layer], self._handle.layout
        if opened is None:
            opened = self.open[layer][shard] = OpenShard(ShardRows(geometry, layout))
        elif opened.memory.borrowed:
            own = ShardRows(geometry, layout)
            rows = opened.memory.rows
            own.rows.part(0, len(rows[0])).fill(rows)
            opened.memory = own
        return opened

    def lend(self, layer: int, shard: int, rows: Rows) -> None:
        """Open a shard over rows of the caller, which stay as they are until the next commit."""
        self.open[layer][shard] = OpenShard(ShardRows.of(rows, self._handle.layout))

    def return_borrowed(self) -> None:
        """After a commit: keep no rows that are the caller's."""
        size = self._handle.layout.shard_tokens
        for layer, shards in enumerate(self.open):
            for shard, opened in list(shards.items()):
                if opened.memory.borrowed:
                    if opened.stored == min(size, self._handle.lengths[layer] - shard * size):
                        del shards[shard]
                    else:  # this layer is ahead of others
                        self.room(layer, shard)

    def adopt(self, layer: int, shard: int, count: int) -> None:
        """Fetch the first `count` positions of a shard, to continue from there."""
        handle = self._handle
        with handle.fetch_lock:
            self.wait_for(layer, shard)
            self._shards.require(layer, shard, 0, count)
            opened = self.open[layer][shard] = OpenShard(self._shards.take(layer, shard))
        if shard * handle.layout.shard_tokens + count == handle.root.seq_len:
            opened.stored, opened.tail = count, handle.root.tails[layer]

    def send(self, layer: int, shard: int, count: int) -> None:
        """Start storing the first `count` positions of an open shard; wait if too much is in flight."""
        handle, place = self._handle, (layer, shard)
        self._settle(*place)  # two puts of one object must not overtake each other
        rows = self.open[layer][shard].memory.rows
        self._uploads[place] = Upload(handle.objects, handle.layout, handle.pool, place, rows, count)
        while len(self._uploads) > 1 and sum(upload.bytes for upload in self._uploads.values()) > UNDER_WAY:
            self.wait_for(*next(iter(self._uploads)))

    def _settle(self, layer: int, shard: int) -> None:
        """Wait until nothing of a shard is in flight, and ignore the outcome."""
        upload = self._uploads.pop((layer, shard), None)
        if upload:
            upload.settle()

    def settle_all(self) -> None:
        """Wait until nothing is in flight, and ignore the outcome."""
        for place in list(self._uploads):
            self._settle(*place)

    def wait_for(self, layer: int, shard: int) -> None:
        """Wait until a shard in flight is stored, and note its checksums.

        Raises:
            OSError: it is not. It stays open, and the next commit tries again.
        """
        upload = self._uploads.pop((layer, shard), None)
        if upload is None:
            return
        sums = upload.finish()
        size = self._handle.layout.shard_tokens
        complete = upload.count // self._handle.geometry.block_tokens
        self._checksums.get(shard)[:complete, layer] = sums[:complete]
        opened = self.open[layer][shard]
        opened.stored = upload.count
        opened.tail = sums[-1] if upload.count % self._handle.geometry.block_tokens else 0
        # A shard that is stored whole is dropped, unless a failing append would come back to it.
        if upload.count == size and not shard * size < self._handle.lengths[layer] < (shard + 1) * size:
            self.open[layer].pop(shard, None)

    def roll_back(self, layer: int) -> None:
        """Forget what a failed append has written past a layer's length."""
        size, length = self._handle.layout.shard_tokens, self._handle.lengths[layer]
        for place in list(self._uploads):
            if place[0] == layer and (place[1] + 1) * size > length:
                self._settle(*place)
        for shard in list(self.open[layer]):
            if shard * size >= length:
                del self.open[layer][shard]
            elif (shard + 1) * size > length:
                self.open[layer][shard].stored = 0  # the store may have more of it than it should
                self.room(layer, shard)

    def store(self, length: int) -> None:
        """Store all positions below `length`.

        Raises:
            OSError: some are not stored.
        """
        size = self._handle.layout.shard_tokens
        last, rest = divmod(length, size)
        for again in (False, True):  # a failed upload is tried once more, and raises then
            for layer, shards in enumerate(self.open):
                for shard, opened in list(shards.items()):
                    count = size if shard < last else rest if shard == last else 0
                    if count and opened.stored != count and (layer, shard) not in self._uploads:
                        self.send(layer, shard, count)
            for place in list(self._uploads):
                try:
                    self.wait_for(*place)
                except OSError:
                    if again:
                        raise

    def stored_tail(self, layer: int, length: int) -> int | None:
        """Return the checksum of the incomplete block at a length that is stored; None if it is not."""
        shard, count = divmod(length, self._handle.layout.shard_tokens)
        opened = self.open[layer].get(shard)
        return opened.tail if opened and opened.stored == count else None
