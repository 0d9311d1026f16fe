"""Rows of whole shards on their way through: handed on piece by piece, and compared when they have gone by.

They are never in memory as a whole. So whoever takes them gets them before it is known that they are sound: it is for
places where nothing counts until that is told. What went wrong is not told here: rows that are not sound, or that do
not lie as they do in memory, are to be had from the reader block by block, and that names what is wrong with them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager

import xxhash

from ...format import block_checksum
from ..objects.protocol import Buffer, Objects
from ..protocols import Rows, Take
from .download import Block
from .layout import Layout
from .shard import Run, ShardError, decode_index, index_size, runs

PIECE_BYTES = 1 << 19
"""What is handed on at once: hashed and taken while it is in the processor's cache, and its room used again."""


class ShardPour:
    """Leading blocks of one shard, handed on. It starts at once; `finish` waits, and says whether they were sound."""

    def __init__(
        self,
        objects: Objects,
        layout: Layout,
        pool: Executor,
        place: tuple[int, int],
        blocks: Sequence[Block],
        expected: Callable[[], Sequence[int] | str],
        take: Take,
    ) -> None:
        """Start.

        Args:
            place: layer and shard.
            blocks: from the first on.
            expected: gives their checksums, or what is wrong with those; asked after the rows went by.
            take: gets bytes of the shard's rows, from several threads.
        """
        self._layer, self._shard = place
        self._layout = layout
        self._blocks = blocks
        self._expected = expected
        self._abandoned = False
        chunks = layout.geometry.layers[self._layer].slab_bytes(layout.geometry.block_tokens)
        self._parts: list[Future[list[int]]] = [
            pool.submit(
                self._pour,
                objects,
                layout.data_key(self._layer, name, self._shard),
                chunk,
                functools.partial(take, number),
            )
            for number, (name, chunk) in enumerate(zip(Rows._fields, chunks, strict=True))
        ]

    def _pour(self, objects: Objects, key: str, chunk_bytes: int, take: Callable[[int, Buffer], None]) -> list[int]:
        """Hand one array on, and return the digests of its blocks."""
        tokens, chunks = self._layout.geometry.block_tokens, self._layout.shard_blocks
        count = sum(block.rows for block in self._blocks) * (chunk_bytes // tokens)
        digests, tail, done = _Digests(chunk_bytes), b"", 0
        for piece in objects.pieces(key, PIECE_BYTES):
            if self._abandoned:
                raise ShardError("is not wanted any more")
            data = memoryview(piece).cast("B")
            rows = data[: max(0, count - done)]
            if rows:
                digests.feed(rows)
                take(done, rows)
            done += len(data)
            tail = (tail + bytes(data[-index_size(chunks) :]))[-index_size(chunks) :]
        whole = Run(0, len(self._blocks) * chunk_bytes, 0)
        found = runs(decode_index(tail, chunks), range(len(self._blocks)), chunk_bytes, packed=False)
        if found != [whole] or whole.size > done - len(tail):
            raise ShardError("has its chunks elsewhere")
        return digests.finish()

    def finish(self) -> bool:
        """Wait; return False if not all blocks went by sound. What was handed on counts for nothing then."""
        try:
            digests = [part.result() for part in self._parts]
            expected = self._expected()
        except (OSError, ShardError):
            self.abandon()
            return False
        first = self._shard * self._layout.shard_blocks
        found = [
            block_checksum(self._layer, first + block.number, block.rows, [part[position] for part in digests])
            for position, block in enumerate(self._blocks)
        ]
        return found == expected

    def abandon(self) -> None:
        """Hand nothing on any more; nothing is under way afterwards."""
        self._abandoned = True
        for part in self._parts:
            if not part.cancel():
                part.exception()


class _Digests:
    """Hashes of the blocks of one array, whose bytes come in pieces of any size."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._state = xxhash.xxh3_64()
        self._filled = 0
        self._found: list[int] = []

    def feed(self, data: memoryview) -> None:
        for part in _cut(data, self._block_bytes - self._filled, self._block_bytes):
            self._state.update(part)
            self._filled += len(part)
            if self._filled == self._block_bytes:
                self._next()

    def _next(self) -> None:
        self._found.append(self._state.intdigest())
        self._state.reset()
        self._filled = 0

    def finish(self) -> list[int]:
        """Return them; an incomplete block's is the last."""
        if self._filled:
            self._next()
        return self._found


def _cut(data: memoryview, first: int, size: int) -> Iterator[memoryview]:
    """Yield a piece of at most `first` bytes, and then such of `size`."""
    yield data[:first]
    for start in range(first, len(data), size):
        yield data[start : start + size]


class Pour:
    """Shards that follow one another, handed on: a `Pouring`."""

    def __init__(self, shards: Sequence[ShardPour], watching: Callable[[], AbstractContextManager[None]]) -> None:
        """Args: watching: brings what fails because another thread has closed the cache into the words for that."""
        self._shards = shards
        self._watching = watching

    def finish(self) -> bool:
        with self._watching():
            return [shard.finish() for shard in self._shards].count(False) == 0

    def abandon(self) -> None:
        for shard in self._shards:
            shard.abandon()
