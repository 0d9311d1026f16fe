"""One layer of a chain of files: rows of each file where it lies, those across a boundary as copies.

Positions are counted over the whole chain here, and from the first own one in each file.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ...attention.source import Ranges, Unread, UnreadArguments
from ...ranges import check_room
from ...recent import RecentRows
from ..protocols import LayerStore, Rows, Storage
from ..sketches import ComputedSketches
from .ancestor import Ancestor, counted_from
from .reader_layer import MappedLayer


class Part(NamedTuple):
    """Positions that lie in one file."""

    number: int
    """Which file of the chain; the last one is the cache's own."""
    start: int
    """In the file."""
    stop: int


class UnreadOfFile(NamedTuple):
    """Blocks of one file of a chain that are read for the first time."""

    blocks: Unread
    base: int
    """The position in the chain of the file's first."""

    @property
    def arguments(self) -> UnreadArguments:
        return self.blocks.arguments

    def note(self) -> None:
        self.blocks.note()

    def verify(self, threads: int) -> None:
        with counted_from(self.base):
            self.blocks.verify(threads)


class ChainLayer(LayerStore):
    """One layer of a chain.

    Args:
        storage: the chain.
        own: the layer in the cache's own file.
        ancestors: the files before it, from the first on.
    """

    in_memory = False
    in_extents = True

    def __init__(self, storage: Storage, own: MappedLayer, ancestors: Sequence[Ancestor]) -> None:
        self._bind(storage, own.index, storage.geometry)
        self._own = own
        self._base = ancestors[-1].record.length
        self._ancestors = ancestors
        self._stores = [*(ancestor.reader.mapped_layer(own.index) for ancestor in ancestors), own]
        self.edges = [*(ancestor.base for ancestor in ancestors), self._base]
        """Where the positions of each file begin."""
        self._block_tokens = storage.geometry.block_tokens
        self._loaded: tuple[int, int] | None = None
        """The length and version of the rows in 16 bits that are in memory."""
        self._extents: tuple[tuple[int, Rows], ...] | None = None
        self._computed: dict[int, ComputedSketches] = {}

    @property
    def length(self) -> int:
        return self._base + self._own.length

    @length.setter
    def length(self, length: int) -> None:
        self._own.length = max(0, length - self._base)

    def parts(self, start: int, stop: int) -> list[Part]:
        """Return where positions [start, stop) lie, in order."""
        parts = []
        for number, edge in enumerate(self.edges):
            end = self.edges[number + 1] if number < len(self._ancestors) else stop
            if max(start, edge) < min(stop, end):
                parts.append(Part(number, max(start, edge) - edge, min(stop, end) - edge))
        return parts

    # Appending

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        check_room(self.length, count, self.capacity, layer=self.index)
        return self._base + self._own.begin(count)

    def stage(self, start: int, count: int) -> Rows:
        return self._own.stage(start - self._base, count)

    def write(self, start: int, rows: Rows) -> None:
        self._own.write(start - self._base, rows)

    @property
    def appends_positions(self) -> bool:
        return self._own.appends_positions

    def append_position(
        self, position: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int
    ) -> int:
        recent = self.recent_rows()
        bad = self._own.append_position(position - self._base, keys, key_dtype, values, value_dtype)
        if bad == -1 and recent is not None:
            recent.keep(position, keys, key_dtype, values, value_dtype)
        return bad

    def publish(self, length: int) -> None:
        self._own.publish(length - self._base)

    # Rows in 16 bits

    def recent_rows(self) -> RecentRows | None:
        """Return those of this handle, counted over the chain: a file has those of its own first and last positions."""
        recent = self.recent
        if recent is not None:
            wanted = self.length, self._own.version()
            if self._loaded is None or (self._loaded != wanted and not self._storage.writable):
                with self._storage.lock:
                    self._load_recent(recent, *wanted)
        return recent

    def _load_recent(self, recent: RecentRows, length: int, version: int) -> None:
        known = 0
        if self._loaded is not None and self._loaded[1] == version:
            known = min(self._loaded[0], length)
        else:
            recent.clear()  # positions may have other rows since
        for low, high in ((known, min(recent.sinks, length)), (max(known, length - recent.window, 0), length)):
            for number, start, stop in self.parts(low, high):
                kept = self._stores[number].recent_rows()
                if kept is not None:
                    recent.copy_from(kept, start, stop, self.edges[number] + start)
        self._loaded = length, version

    def keep(self, start: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int) -> None:
        self.recent_rows()
        self._own.keep(start - self._base, keys, key_dtype, values, value_dtype)
        super().keep(start, keys, key_dtype, values, value_dtype)

    def take_recent(self, source: RecentRows, start: int, stop: int, at: int = 0) -> None:
        self.recent_rows()
        self._own.take_recent(source, start, stop, at - self._base)
        super().take_recent(source, start, stop, at)

    def save_recent(self) -> None:
        self._own.save_recent()

    def settle_recent(self) -> None:
        self._own.settle_recent()

    # Reading

    def extents(self) -> Sequence[tuple[int, Rows]]:
        extents = self._extents
        if extents is None:
            extents = tuple(zip(self.edges, [store.slabs() for store in self._stores], strict=True))
            if not self._storage.closed:  # else by another thread, meanwhile: views must not keep the maps
                self._extents = extents
        return extents

    def forget_maps(self) -> None:
        """Drop the views of the maps."""
        self._extents = None

    def rows(self, start: int, stop: int) -> Rows:
        self._verify(start, stop)
        return self._view(start, stop)

    def _view(self, start: int, stop: int) -> Rows:
        parts = self.parts(start, stop)
        found = [self._stores[number].slabs().part(low, high) for number, low, high in parts]
        if len(found) == 1:
            return found[0]
        rows, done = Rows.empty(self.geometry, stop - start), 0
        for some in found:
            rows.part(done, done + some.num_positions).fill(some)
            done += some.num_positions
        for array in rows:
            array.flags.writeable = False
        return rows

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        for number, low, high in self.parts(start, stop):
            yield self.rows(self.edges[number] + low, self.edges[number] + high)

    def scan(self, start: int, stop: int) -> Iterator[Rows]:
        for number, low, high in self.parts(start, stop):
            for part in self._stores[number].scan_ranges(low, high):
                yield self.rows(self.edges[number] + part.start, self.edges[number] + part.stop)

    def prefetch(self, start: int, stop: int) -> None:
        for number, low, high in self.parts(start, stop):
            self._stores[number].prefetch(low, high)

    def release(self, start: int, stop: int) -> None:
        for number, low, high in self.parts(start, stop):
            self._stores[number].release(low, high)

    # Verification

    def is_verified(self, stop: int) -> bool:
        for ancestor, store in zip(self._ancestors, self._stores, strict=False):
            if ancestor.reader.snapshot.verified is not None:
                mine = stop - ancestor.base
                if not store.is_verified(min(mine, ancestor.whole)):
                    return False
                if ancestor.whole < min(mine, ancestor.count) and self.index not in ancestor.verified_tails:
                    return False
        return self._own.is_verified(stop - self._base)

    def ensure_verified(self, ranges: NDArray[np.int64], threads: int = 1) -> None:
        for ancestor, store in zip(self._ancestors, self._stores, strict=False):
            mine = self._needed_of(ancestor, ranges)
            if mine is not None:
                with counted_from(ancestor.base):
                    store.ensure_verified(mine, threads)
        with counted_from(self._base):
            self._own.ensure_verified(np.maximum(ranges - self._base, 0), threads)

    def unread_blocks(self, ranges: Ranges) -> list[Unread | None]:
        ranges = np.array(ranges, np.int64).reshape(-1, 2)
        found: list[Unread | None] = []
        for ancestor, store in zip(self._ancestors, self._stores, strict=False):
            mine = self._needed_of(ancestor, ranges)
            if mine is None:  # to be mapped, and compared with nothing
                mine = np.clip(ranges - ancestor.base, 0, ancestor.count)
            unread = store.unread_blocks(mine)[0]
            found.append(None if unread is None else UnreadOfFile(unread, ancestor.base))
        unread = self._own.unread_blocks(np.maximum(ranges - self._base, 0))[0]
        found.append(None if unread is None else UnreadOfFile(unread, self._base))
        return found

    def _needed_of(self, ancestor: Ancestor, ranges: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the positions of a file that ranges name, as far as it has complete blocks; those after them match
        their checksums; None if the file is not compared."""
        if ancestor.reader.snapshot.verified is None:
            return None
        mine: NDArray[np.int64] = np.clip(ranges - ancestor.base, 0, ancestor.count)
        if (mine[:, 1] > np.maximum(mine[:, 0], ancestor.whole)).any():
            ancestor.verify_tail(self.index)
        return np.minimum(mine, ancestor.whole)

    def _verify(self, start: int, stop: int) -> None:
        if not self.is_verified(stop):
            self.ensure_verified(np.array([[start, stop]], np.int64))

    # Sketches

    def sketches(self, blocks: int, version: int) -> list[NDArray[np.uint16]]:
        """Return the sketches of the first blocks: kept ones of files that begin on a block, and computed ones."""
        size, pieces, done = self._block_tokens, [], 0
        while done < blocks:
            number = next((n for n, edge in enumerate(self.edges) if edge == done * size), None)
            stop = blocks
            if number is not None:
                end = self.edges[number + 1] if number < len(self._ancestors) else blocks * size
                stop = min(blocks, end // size)
            if number is not None and stop > done:
                store = self._stores[number]
                pieces += store.sketches(stop - done, store.version())
            else:
                later = [edge // size for edge in self.edges if edge % size == 0 and edge > done * size]
                stop = min([blocks, *later])
                computed = self._computed.setdefault(done, ComputedSketches(self.geometry, size))
                pieces.append(computed.between(done, stop, self, version))
            done = stop
        return pieces
