"""Download one shard into memory: all arrays at once, each block compared with its checksum.

Failures of blocks are returned and not raised: the caller decides whether the cache is damaged or was changed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...format import block_checksum, checksum
from ...geometry import LayerGeometry
from ..objects.protocol import MissingObjectError, Objects
from ..protocols import Rows
from .layout import Layout
from .shard import Run, ShardError, decode_index, index_size, runs, unpack

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
        self._take(Rows.empty(geometry, layout.shard_tokens), layout)

    @classmethod
    def of(cls, rows: Rows, layout: Layout) -> ShardRows:
        """Make one of rows that lie somewhere already; they are not copied."""
        shard = cls.__new__(cls)
        shard.borrowed = True
        shard._take(rows._make(np.ascontiguousarray(array) for array in rows), layout)
        return shard

    @classmethod
    def arrived(cls, geometry: LayerGeometry, layout: Layout, parts: Sequence[NDArray[np.uint8]]) -> ShardRows:
        """Make one of what came from a store, as it came: whole chunks of each array, maybe fewer than a shard has."""
        return cls.of(Rows.of_bytes(geometry, parts), layout)

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
        """True if there are views of its rows, or it is still being filled."""
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
    """Blocks being read into a `ShardRows`. It starts at once; `finish` waits, and compares.

    `target` is where they are then; None if nothing came.
    """

    def __init__(
        self,
        objects: Objects,
        layout: Layout,
        pool: Executor,
        place: tuple[int, int],
        target: ShardRows | None,
        blocks: Sequence[Block],
        expected: Callable[[], Sequence[int] | str],
    ) -> None:
        """Start.

        Args:
            place: layer and shard.
            target: room for the shard; None where objects are to be kept as they come, which saves copying them. Its
                memory is not ours to fill further, then.
            blocks: rising.
            expected: gives their checksums, or what is wrong with those; asked after the rows are there.
        """
        self.target = target
        self.blocks = blocks
        self._layer, self._shard = place
        self._layout = layout
        self._expected = expected
        self._geometry = layout.geometry.layers[self._layer]
        rooms = dict(target.rows.named()) if target is not None else {}
        tokens = layout.geometry.block_tokens
        self._parts: list[Future[_Part]] = [
            pool.submit(
                _read_array,
                objects,
                layout,
                layout.data_key(self._layer, slab.name, self._shard),
                as_bytes(rooms[slab.name]) if rooms else None,
                tokens * slab.row_bytes,
                slab.dtype.itemsize,
                blocks,
            )
            for slab in self._geometry.slabs
        ]

    def finish(self) -> list[tuple[Block, str]]:
        """Wait; return the blocks that did not arrive sound, and why."""
        parts: list[_Part] = []
        trouble: str | None = None
        for slab, part in zip(self._geometry.slabs, self._parts, strict=True):
            try:
                parts.append(part.result())
            except (MissingObjectError, EOFError):
                trouble = f"{slab.name} are missing"
            except ShardError as error:
                trouble = f"{slab.name}: shard {self._shard} {error}"
        if trouble is None:
            expected = self._expected()
            if isinstance(expected, str):
                trouble = expected
        if trouble is not None:
            return [(block, trouble) for block in self.blocks]
        if self.target is None:
            self.target = ShardRows.arrived(self._geometry, self._layout, [part.data for part in parts])
        bad = []
        first = self._shard * self._layout.shard_blocks
        for position, (block, wanted) in enumerate(zip(self.blocks, expected, strict=True)):
            digests = [part.digests[position] for part in parts]
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


class _Part(NamedTuple):
    """The outcome of one array."""

    digests: list[int]
    """Checksums of the blocks that were asked for."""
    data: NDArray[np.uint8]
    """Where they are."""


def _read_array(
    objects: Objects,
    layout: Layout,
    key: str,
    room: NDArray[np.uint8] | None,
    chunk_bytes: int,
    alignment: int,
    blocks: Sequence[Block],
) -> _Part:
    """Read blocks of one array into their places in its room; without one, have them wherever they are."""
    chunks, tokens = layout.shard_blocks, layout.geometry.block_tokens
    wanted = [block.number for block in blocks]
    whole = objects.remote and (2 * len(wanted) >= chunks or chunks * chunk_bytes <= WHOLE_BYTES or room is None)
    data = memoryview(objects.get(key)) if whole else None
    tail = data if data is not None else objects.get_suffix(key, index_size(chunks))
    found = runs(decode_index(tail, chunks), wanted, chunk_bytes, packed=layout.level is not None)
    if room is None:
        if data is not None and (kept := _as_it_came(data, found, layout, alignment)) is not None:
            return _Part(block_digests(kept, chunk_bytes // tokens, tokens, blocks), kept)
        room = np.empty(chunks * chunk_bytes, np.uint8)
    view = room.data
    if layout.level is None:
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
    return _Part(block_digests(room, chunk_bytes // tokens, tokens, blocks), room)


def _as_it_came(data: memoryview, found: Sequence[Run], layout: Layout, alignment: int) -> NDArray[np.uint8] | None:
    """Return the chunks of a shard from the first on where they lie in its object, if that is how arrays lie."""
    if layout.level is not None or len(found) != 1 or found[0].first != 0:
        return None
    rows = np.frombuffer(_cut(data, found[0].offset, found[0].size), np.uint8)
    return rows if rows.ctypes.data % alignment == 0 else None


def _cut(data: memoryview | None, offset: int, size: int) -> memoryview:
    assert data is not None
    if offset + size > len(data):
        raise EOFError
    return data[offset : offset + size]
