"""Fetched shards: some are kept in memory, within a budget, and the next ones are fetched meanwhile.

Every block that is fetched is compared with the checksum that the commit gives it.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Sequence

from ...geometry import LayerGeometry
from ..protocols import Rows
from ..refusals import refuse_truncated
from ..streaming import WriteBytes
from .committed import BlockChecksums, Sums, refuse_block
from .download import Block, Fetch, ShardRows
from .handle import GroupHandle
from .streaming import ShardStream, ShardStreams

CACHE_BYTES = 256 * 2**20
"""Fetched rows that are kept in memory by default."""

AHEAD_BYTES = 64 * 2**20
"""Rows that are fetched from an object store while earlier ones are used."""

SPARES = 8
"""Empty buffers of shards that are kept for the next ones."""


class ShardCache:
    """The fetched shards of a group, by layer and number.

    Args:
        handle: the group.
        checksums: of its blocks.
        cache_bytes: rows to keep.
    """

    def __init__(self, handle: GroupHandle, checksums: BlockChecksums, cache_bytes: int) -> None:
        self._handle = handle
        self._checksums = checksums
        self._layout = handle.layout
        self._geometry = handle.geometry
        self._lock = handle.fetch_lock
        self._cache_bytes = cache_bytes
        self._kept: OrderedDict[tuple[int, int], ShardRows] = OrderedDict()
        self._spare: dict[LayerGeometry, list[ShardRows]] = {}
        self._under_way: dict[tuple[int, int], Fetch] = {}

    def part(self, layer: int, shard: int, start: int, stop: int, *, streamed: bool = False) -> Rows:
        """Return views of positions [start, stop) of one shard, fetched and verified.

        Args:
            layer, shard: which one.
            start, stop: in the layer.
            streamed: True if the caller reads through many shards in order.
        """
        base = shard * self._layout.shard_tokens
        with self._lock:
            self._handle.check()
            if stop > self._handle.lengths[layer]:  # truncated since its length was read
                refuse_truncated(self._handle.path)
            self.require(layer, shard, start - base, stop - base)
            # Still locked: a buffer without views is reused.
            return self._keep(layer, shard, streamed=streamed).views.part(start - base, stop - base)

    def read_ahead(self, layer: int, shard: int, start: int, stop: int) -> None:
        """Start fetching shards from this one on, of positions [start, stop); then of the next layer, if all of this
        one was asked for."""
        size = self._layout.shard_tokens
        last = -(-stop // size)
        remote = self._handle.objects.remote
        with self._lock:
            self._handle.check()
            coming = [(layer, number) for number in range(shard, last)]
            whole = start == 0 and stop == self._handle.lengths[layer]
            following = [number for number in self._geometry.row_layers if number > layer]
            if remote and whole and following:
                coming += [(following[0], number) for number in range(last)]
            room = min(AHEAD_BYTES, self._cache_bytes // 2) if remote else 0
            for number, place in enumerate(coming):
                room -= self._shard_bytes(place[0])
                if number > 1 and room < 0:
                    break
                first, end = max(0, start - place[1] * size), min(size, stop - place[1] * size)
                self._start(*place, first, end)

    def prefetch(self, layer: int, start: int, stop: int) -> None:
        """Start fetching positions [start, stop)."""
        size = self._layout.shard_tokens
        with self._lock:
            self._handle.check()
            for shard in range(start // size, -(-stop // size)):
                self._start(layer, shard, max(0, start - shard * size), min(size, stop - shard * size))

    def stream_bytes(self, layer: int, start: int, stop: int, write: WriteBytes) -> ShardStreams | None:
        """Start streaming positions [start, stop), if they are all that some shards have, not compressed."""
        handle, layout = self._handle, self._layout
        size, tokens = layout.shard_tokens, self._geometry.block_tokens
        partial = start % size or (stop % size and stop != handle.root.seq_len)
        if partial or handle.writable or layout.level is not None:
            return None
        with self._lock:
            handle.check()
            shards = []
            for shard in range(start // size, -(-stop // size)):
                first, count = shard * layout.shard_blocks, min(size, stop - shard * size)
                blocks = [Block(n, handle.block_rows(layer, first + n)) for n in range(-(-count // tokens))]
                expected = functools.partial(self._checksums.expected, layer, blocks, self._checksums.start(shard))
                place = (layer, shard)
                shards.append(ShardStream(handle.objects, layout, handle.pool, place, blocks, expected, write))
            return ShardStreams(shards, handle.watching_closing)

    def fetch(self, layer: int, shard: int, target: ShardRows | None, blocks: Sequence[Block], sums: Sums) -> Fetch:
        """Start reading blocks of a shard, to be compared with these checksums; without a target, all of them."""
        expected = functools.partial(self._checksums.expected, layer, blocks, sums)
        handle = self._handle
        return Fetch(handle.objects, self._layout, handle.pool, (layer, shard), target, blocks, expected)

    def require(self, layer: int, shard: int, start: int, stop: int) -> ShardRows:
        """Return a shard that has its positions [start, stop), fetched and verified."""
        place = (layer, shard)
        trouble: list[tuple[Block, str]] = []
        for _ in range(3):
            early = place in self._under_way
            self._start(layer, shard, start, stop)
            if place in self._under_way:
                fetch = self._under_way.pop(place)
                try:
                    trouble = fetch.finish()
                except OSError:
                    if not early:  # else it may have failed long ago, and a new try succeed
                        raise
                    continue
                if fetch.target is not None:
                    self._kept[place] = fetch.target
            # It may have been started for other blocks than these.
            if not trouble and not self._missing(layer, shard, start, stop):
                break
        if trouble:
            block, what = trouble[0]
            refuse_block(self._handle, layer, shard * self._layout.shard_blocks + block.number, what)
        return self._kept[place]

    def take(self, layer: int, shard: int) -> ShardRows:
        """Remove a shard from the cache, and return it."""
        return self._kept.pop((layer, shard))

    def drop(self, first_block: int = 0) -> None:
        """Forget fetched blocks from `first_block` on."""
        with self._lock:
            for fetch in self._under_way.values():
                fetch.abandon()
            self._under_way.clear()
            size = self._layout.shard_blocks
            for (layer, shard), kept in list(self._kept.items()):
                if shard * size >= first_block:
                    del self._kept[layer, shard]
                elif any(kept.held[first_block - shard * size :]):
                    self._renew(layer, shard, first_block - shard * size)

    def close(self) -> None:
        """Forget everything."""
        self.drop()
        self._spare.clear()

    def _shard_bytes(self, layer: int) -> int:
        return self._layout.shard_tokens * self._geometry.layers[layer].position_bytes

    def _start(self, layer: int, shard: int, start: int, stop: int) -> None:
        """Start fetching what is neither here nor being fetched."""
        if (layer, shard) in self._under_way:
            return
        blocks = self._missing(layer, shard, start, stop)
        if blocks:
            kept = self._kept.get((layer, shard))
            if kept is not None:
                changing = [block.number for block in blocks if kept.borrowed or kept.held[block.number]]
                if changing:
                    self._renew(layer, shard, min(changing))
            elif not self._comes_whole(shard, blocks):
                self._kept[layer, shard] = self._buffer(self._geometry.layers[layer])
            target = self._kept.get((layer, shard))
            self._under_way[layer, shard] = self.fetch(layer, shard, target, blocks, self._checksums.start(shard))

    def _comes_whole(self, shard: int, blocks: Sequence[Block]) -> bool:
        """True if a shard's objects can be kept as they come."""
        handle = self._handle
        stored = -(-handle.root.seq_len // self._geometry.block_tokens) - shard * self._layout.shard_blocks
        plain = handle.objects.remote and self._layout.level is None and not handle.writable
        return plain and len(blocks) == min(self._layout.shard_blocks, stored)

    def _renew(self, layer: int, shard: int, first: int) -> None:
        """Give a shard a new buffer, with what it holds before a block: others may be reading the old one."""
        kept = self._kept[layer, shard]
        fresh = self._buffer(self._geometry.layers[layer])
        rows = first * self._geometry.block_tokens
        fresh.rows.part(0, rows).fill(kept.rows.part(0, rows))
        fresh.held[:first] = kept.held[:first]
        self._kept[layer, shard] = fresh

    def _buffer(self, geometry: LayerGeometry) -> ShardRows:
        spare = self._spare.get(geometry)
        return spare.pop() if spare else ShardRows(geometry, self._layout)

    def _missing(self, layer: int, shard: int, start: int, stop: int) -> list[Block]:
        kept = self._kept.get((layer, shard))
        size = self._geometry.block_tokens
        found = []
        for number in range(start // size, -(-stop // size)):
            held = kept.held[number] if kept else 0
            if held < min(stop - number * size, size):
                rows = self._handle.block_rows(layer, shard * self._layout.shard_blocks + number)
                found.append(Block(number, rows))
        return found

    def _keep(self, layer: int, shard: int, *, streamed: bool) -> ShardRows:
        """Mark a shard as used just now, and drop others if there are too many.

        Of shards that were read on the way through many, the latest go first: a caller who goes through more than
        fits, again and again, would otherwise find none of them still there. Of the rest, the least recently used.
        """
        kept = self._kept[layer, shard]
        kept.streamed = streamed
        self._kept.move_to_end((layer, shard))
        total = sum(self._shard_bytes(place[0]) for place in self._kept)
        if total > self._cache_bytes:
            latest = [place for place in reversed(self._kept) if self._kept[place].streamed]
            rest = [place for place in self._kept if not self._kept[place].streamed]
            for place in latest + rest:
                if total <= self._cache_bytes:
                    break
                if place != (layer, shard) and place not in self._under_way:
                    total -= self._shard_bytes(place[0])
                    self._spare_buffer(self._kept.pop(place), self._geometry.layers[place[0]])
        return kept

    def _spare_buffer(self, kept: ShardRows, geometry: LayerGeometry) -> None:
        spare = self._spare.setdefault(geometry, [])
        if len(spare) < SPARES and not kept.lent:
            kept.empty()
            spare.append(kept)
