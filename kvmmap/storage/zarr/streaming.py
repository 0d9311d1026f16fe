"""Streams whole shards piece by piece, without buffering them. Verification completes at the end.

On failure the caller falls back to reading blocks, which names the damaged one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager

import xxhash

from ...format import block_checksum
from ..objects.protocol import Buffer, Objects
from ..streaming import WriteBytes
from .download import Block
from .layout import Layout
from .shard import Run, ShardError, decode_index, index_size, runs

PIECE_BYTES = 1 << 19
"""Bytes read at a time: hashed and written while they are in the processor's cache, in a buffer that is reused."""


class ShardStream:
    """The first blocks of one shard, streamed. The stream starts at once."""

    def __init__(
        self,
        objects: Objects,
        layout: Layout,
        pool: Executor,
        place: tuple[int, int],
        blocks: Sequence[Block],
        expected: Callable[[], Sequence[int] | str],
        write: WriteBytes,
    ) -> None:
        """Start.

        Args:
            place: layer and shard.
            blocks: from the first on.
            expected: returns their checksums, or says what is wrong with those; called after the rows have arrived.
            write: gets bytes of the shard's rows, from several threads.
        """
        self._layer, self._shard = place
        self._layout = layout
        self._blocks = blocks
        self._expected = expected
        self._cancelled = False
        tokens, slabs = layout.geometry.block_tokens, layout.geometry.layers[self._layer].slabs
        self._parts: list[Future[list[int]]] = [
            pool.submit(
                self._stream,
                objects,
                layout.data_key(self._layer, slab.name, self._shard),
                tokens * slab.row_bytes,
                functools.partial(write, number),
            )
            for number, slab in enumerate(slabs)
        ]

    def _stream(self, objects: Objects, key: str, chunk_bytes: int, write: Callable[[int, Buffer], None]) -> list[int]:
        """Stream one array, and return the digests of its blocks."""
        tokens, chunks = self._layout.geometry.block_tokens, self._layout.shard_blocks
        count = sum(block.rows for block in self._blocks) * (chunk_bytes // tokens)
        digests, tail, done = _Digests(chunk_bytes), b"", 0
        for piece in objects.pieces(key, PIECE_BYTES):
            if self._cancelled:
                raise ShardError("was cancelled")
            data = memoryview(piece).cast("B")
            rows = data[: max(0, count - done)]
            if rows:
                digests.feed(rows)
                write(done, rows)
            done += len(data)
            tail = (tail + bytes(data[-index_size(chunks) :]))[-index_size(chunks) :]
        whole = Run(0, len(self._blocks) * chunk_bytes, 0)
        found = runs(decode_index(tail, chunks), range(len(self._blocks)), chunk_bytes, packed=False)
        if found != [whole] or whole.size > done - len(tail):
            raise ShardError("has its chunks elsewhere")
        return digests.finish()

    def finish(self) -> bool:
        """Wait; return True if all blocks arrived and match their checksums."""
        try:
            digests = [part.result() for part in self._parts]
            expected = self._expected()
        except (OSError, ShardError):
            self.cancel()
            return False
        first = self._shard * self._layout.shard_blocks
        found = [
            block_checksum(self._layer, first + block.number, block.rows, [part[position] for part in digests])
            for position, block in enumerate(self._blocks)
        ]
        return found == expected

    def cancel(self) -> None:
        """Cancel. Nothing is written after this returns."""
        self._cancelled = True
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


class ShardStreams:
    """Consecutive shards, streamed: a `RowStream`.

    Args:
        shards: their streams.
        watching: a context that turns failures caused by a concurrent `close` into ClosedError.
    """

    def __init__(self, shards: Sequence[ShardStream], watching: Callable[[], AbstractContextManager[None]]) -> None:
        self._shards = shards
        self._watching = watching

    def finish(self) -> bool:
        with self._watching():
            return [shard.finish() for shard in self._shards].count(False) == 0

    def cancel(self) -> None:
        for shard in self._shards:
            shard.cancel()
