"""Rows of one shard on their way into memory: four arrays read at once, each block compared with its checksum.

What went wrong with a block is handed back and not raised: whether the cache is damaged, or was changed meanwhile, is
for the reader to say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..format import block_checksum, checksum
from ..geometry import LayerGeometry
from .base import Rows
from .zarr_layout import Layout
from .zarr_objects import MissingObjectError, Objects
from .zarr_shard import ShardError, decode_index, index_size, runs, unpack

WHOLE_BYTES = 1 << 20
"""A remote object up to this size is read whole: it costs less than a round trip to its index first."""


class Block(NamedTuple):
    """A block to read."""

    number: int
    """In its shard."""
    rows: int
    """Positions of it that count: fewer than all in a tail."""


class ShardRows:
    """Rows of one shard of a layer in memory, block by block."""

    __slots__ = ("_references", "borrowed", "held", "rows", "streamed", "views")

    def __init__(self, geometry: LayerGeometry, layout: Layout) -> None:
        """Make room for all of a shard."""
        self.borrowed = False
        count, heads = layout.shard_tokens, geometry.num_kv_heads
        self._take(
            Rows(
                np.empty((count, heads, geometry.head_dim), np.int8),
                np.empty((count, heads), np.float32),
                np.empty((count, heads, geometry.value_head_dim), np.int8),
                np.empty((count, heads), np.float32),
            ),
            layout,
        )

    @classmethod
    def of(cls, rows: Rows, layout: Layout) -> ShardRows:
        """Make one of rows that lie somewhere already; they are not copied."""
        shard = cls.__new__(cls)
        shard.borrowed = True
        shard._take(Rows._make(np.ascontiguousarray(array) for _, array in rows.named()), layout)
        return shard

    def _take(self, rows: Rows, layout: Layout) -> None:
        self.rows = rows
        self.views = rows.part(0, layout.shard_tokens)
        for view in self.views:
            view.flags.writeable = False
        self.held = [0] * layout.shard_blocks
        """Positions of each block that are here, and sound."""
        self.streamed = False
        """True if it was last read on the way through many."""
        self._references = self._count()

    def _count(self) -> int:
        return sum(sys.getrefcount(array) for array in self.rows)

    @property
    def lent(self) -> bool:
        """True if somebody has views of its rows, or is still filling it."""
        return self.borrowed or self._count() > self._references

    def empty(self) -> None:
        """Make it as good as new: memory that was touched before is several times as fast as fresh one."""
        self.held = [0] * len(self.held)
        self.streamed = False


def as_bytes(array: NDArray[Any]) -> NDArray[np.uint8]:
    """View a contiguous array as its bytes."""
    return array.reshape(-1).view(np.uint8)


def block_digests(data: NDArray[np.uint8], row_bytes: int, block_tokens: int, blocks: Sequence[Block]) -> list[int]:
    """Hash blocks of one array of a shard, given as bytes."""
    size = block_tokens * row_bytes
    view = data.data
    return [checksum(view[b.number * size : b.number * size + b.rows * row_bytes]) for b in blocks]


class Fetch:
    """Blocks being read into a `ShardRows`. It starts at once; `finish` waits, and compares."""

    def __init__(
        self,
        objects: Objects,
        layout: Layout,
        pool: Executor,
        place: tuple[int, int],
        target: ShardRows,
        blocks: Sequence[Block],
        expected: Callable[[], Sequence[int] | str],
    ) -> None:
        """Start.

        Args:
            place: layer and shard.
            blocks: rising.
            expected: gives their checksums, or what is wrong with those; asked after the rows are there.
        """
        self.target = target
        self.blocks = blocks
        self._layer, self._shard = place
        self._layout = layout
        self._expected = expected
        self._parts: list[Future[list[int]]] = [
            pool.submit(
                _read_array, objects, layout, layout.data_key(self._layer, name, self._shard), as_bytes(array), blocks
            )
            for name, array in target.rows.named()
        ]

    def finish(self) -> list[tuple[Block, str]]:
        """Wait; return the blocks that did not arrive sound, and why."""
        parts: list[list[int]] = []
        trouble: str | None = None
        for name, part in zip(Rows._fields, self._parts, strict=True):
            try:
                parts.append(part.result())
            except (MissingObjectError, EOFError):
                trouble = f"{name} are missing"
            except ShardError as error:
                trouble = f"{name}: shard {self._shard} {error}"
        if trouble is None:
            expected = self._expected()
            if isinstance(expected, str):
                trouble = expected
        if trouble is not None:
            return [(block, trouble) for block in self.blocks]
        bad = []
        first = self._shard * self._layout.shard_blocks
        for position, (block, wanted) in enumerate(zip(self.blocks, expected, strict=True)):
            digests = [part[position] for part in parts]
            if block_checksum(self._layer, first + block.number, block.rows, digests) == wanted:
                self.target.held[block.number] = block.rows
            else:
                bad.append((block, "checksum does not match"))
        return bad

    def abandon(self) -> None:
        """Wait until nothing writes into the target any more."""
        for part in self._parts:
            if not part.cancel():
                part.exception()


def _read_array(
    objects: Objects, layout: Layout, key: str, target: NDArray[np.uint8], blocks: Sequence[Block]
) -> list[int]:
    """Read blocks of one array into their places, and return their digests."""
    chunks, tokens = layout.shard_blocks, layout.geometry.block_tokens
    chunk_bytes = len(target) // chunks
    wanted = [block.number for block in blocks]
    packed = layout.level is not None
    view = target.data
    whole = objects.remote and (2 * len(wanted) >= chunks or len(target) <= WHOLE_BYTES)
    data = memoryview(objects.get(key)) if whole else None
    tail = data if data is not None else objects.get_suffix(key, index_size(chunks))
    found = runs(decode_index(tail, chunks), wanted, chunk_bytes, packed=packed)
    if not packed:
        pieces = [(run.offset, view[run.first * chunk_bytes :][: run.size]) for run in found]
        if data is None:
            objects.read_into(key, pieces)
        for offset, place in pieces if data is not None else ():
            place[:] = _cut(data, offset, len(place))
    else:
        stored = [memoryview(bytearray(run.size)) for run in found] if data is None else []
        if data is None:
            objects.read_into(key, [(run.offset, piece) for run, piece in zip(found, stored, strict=True)])
        else:
            stored = [_cut(data, run.offset, run.size) for run in found]
        for run, piece in zip(found, stored, strict=True):
            unpack(piece, view[run.first * chunk_bytes :][:chunk_bytes])
    return block_digests(target, chunk_bytes // tokens, tokens, blocks)


def _cut(data: memoryview | None, offset: int, size: int) -> memoryview:
    assert data is not None
    if offset + size > len(data):
        raise EOFError
    return data[offset : offset + size]
