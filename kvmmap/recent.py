"""The last positions of a layer, and its first ones, in 16 bits beside their coded rows.

A query attends mostly to its neighbours and to the first positions, so there the codec's loss counts most. Position p
is in slot p modulo the window of a ring, and the first positions ("sinks") are in slots of their own. Rows of bf16 are
kept as they are, rows of f32 and f16 as f16, or as bf16 where they are beyond f16.

What lives here: the rows in memory. What does not: where else they are stored, and attention over them, which is
compiled. Nothing that must be right depends on them: a position without one has its coded row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import _core
from .geometry import CacheGeometry, LayerGeometry
from .row_arrays import widened
from .rows import Rows

_POSITION = np.uint64((1 << 40) - 1)
_BF16 = 2
_LINE = 64

SOUND, DAMAGED, STALE = 1, 2, 3
"""What `_core.take_recent_records` says of a record: it counts; its checksum does not match; it is of another row."""


def _aligned(shape: tuple[int, int, int]) -> NDArray[np.uint16]:
    """Return zeros that start with a cache line, as rows of most models do then: each takes fewer lines."""
    size = math.prod(shape)
    memory = np.zeros(size + _LINE // 2, np.uint16)
    start = -memory.ctypes.data % _LINE // 2
    return memory[start : start + size].reshape(shape)


class RecentRing:
    """Slots of positions in 16 bits.

    Args:
        layer: the shape of its rows.
        slots: how many.
    """

    __slots__ = ("keys", "parts", "slots", "tags", "values")

    def __init__(self, layer: LayerGeometry, slots: int) -> None:
        self.slots = slots
        self.tags = np.zeros(slots, np.uint64)
        self.keys = _aligned((slots, layer.num_kv_heads, layer.head_dim))
        self.values = _aligned((slots, layer.num_kv_heads, layer.value_head_dim))
        self.parts: tuple[NDArray[Any], NDArray[Any], NDArray[Any]] = (self.tags, self.keys, self.values)
        """As the compiled functions take them."""

    def cut(self, length: int) -> None:
        """Forget positions from `length` on."""
        self.tags[(self.tags & _POSITION) > length] = 0

    def held(self, start: int, stop: int) -> list[int]:
        """Return which of positions [start, stop) it holds, in order."""
        positions = np.arange(max(start, stop - self.slots, 0), stop)
        if not self.slots or not len(positions):
            return []
        tags = self.tags[positions % self.slots] & _POSITION
        return [int(position) for position in positions[tags == positions.astype(np.uint64) + np.uint64(1)]]


class RecentRows:
    """The rows in 16 bits of one layer.

    One thread writes them, and others read meanwhile: a slot is empty while it is written, and readers compare
    its tag before and after.

    Args:
        window: last positions of each query that count.
        ring: the slots of the last positions, at least as many.
        first: the slots of the first ones.
    """

    __slots__ = ("first", "keep", "ring", "rings", "sinks", "window")

    def __init__(self, window: int, ring: RecentRing, first: RecentRing) -> None:
        self.window = window
        self.sinks = first.slots
        self.ring = ring
        self.first = first
        self.rings = _core.RecentRings(ring.parts, first.parts)
        """Both, as compiled functions take them."""
        self.keep = self.rings.keep
        """Keep positions: (the first one, keys, their dtype's number, values, their dtype's number).

        Keys are [n, num_kv_heads, head_dim] and values [n, num_kv_heads, value_head_dim], as `as_rows` returns them; of
        one position also without their first axis.
        """

    def __reduce__(self) -> tuple[type[RecentRows], tuple[int, RecentRing, RecentRing]]:
        return RecentRows, (self.window, self.ring, self.first)

    @staticmethod
    def of(geometry: CacheGeometry, layer: int) -> RecentRows | None:
        """Make those of a cache's layer; None if it keeps none, or has no rows."""
        if not geometry.keeps_recent or not geometry.layers[layer].has_rows:
            return None
        shape, window = geometry.layers[layer], geometry.recent_window
        return RecentRows(window, RecentRing(shape, window), RecentRing(shape, geometry.sinks))

    # Writing

    def cut(self, length: int) -> None:
        """Forget positions from `length` on, which were truncated."""
        self.ring.cut(length)
        self.first.cut(length)

    def clear(self) -> None:
        """Forget all."""
        self.cut(0)

    def copy_from(self, other: RecentRows, start: int, stop: int, at: int = 0) -> None:
        """Take over what another layer of the same shape has of positions [start, stop); they become `at` and up."""
        # The later ones last: they are what the ring keeps.
        for source, end in ((other.first, min(stop, other.sinks)), (other.ring, stop)):
            for position in source.held(start, end):
                self._put(position - start + at, source, position % source.slots)

    def _put(self, position: int, source: RecentRing, slot: int) -> None:
        for ring in (self.ring, self.first) if position < self.sinks else (self.ring,):
            if ring.slots:
                at = position % ring.slots
                ring.tags[at] = 0
                ring.keys[at], ring.values[at] = source.keys[slot], source.values[slot]
                ring.tags[at] = (source.tags[slot] & ~_POSITION) | np.uint64(position + 1)

    def with_chunk(
        self,
        layer: LayerGeometry,
        length: int,
        keys: NDArray[Any],
        key_dtype: int,
        values: NDArray[Any],
        value_dtype: int,
    ) -> RecentRows:
        """Return rows in 16 bits of a chunk of positions that come after `length` others, and of those before it: for
        as many queries, each of which sees its own last positions. Rows are those of `keep`."""
        ring = RecentRing(layer, min(length, self.window) + len(keys))
        before = self.ring.held(length - self.window + 1, length)
        to = [position % ring.slots for position in before]
        of = [position % self.ring.slots for position in before]
        theirs: tuple[NDArray[Any], ...] = self.ring.parts
        for number, mine in enumerate(ring.parts):
            mine[to] = theirs[number][of]
        alone = _core.RecentRings(ring.parts, RecentRing(layer, 0).parts)
        alone.keep(length, keys, key_dtype, values, value_dtype)
        return RecentRows(self.window, ring, self.first)

    # Reading

    def overlay(self, part: str, start: int, stop: int, length: int, out: NDArray[Any], dtype: int) -> None:
        """Put what is kept of positions [start, stop) into `out`.

        Args:
            part, start, stop, length: as in `rows`.
            out: C-contiguous [stop - start, num_kv_heads, dim], filled where something is kept.
            dtype: its dtype's number: bf16 as its bits.
        """
        keys, newest = part == "keys", max(start, length - self.ring.slots)
        if newest < stop:
            _core.read_recent(self.ring.parts, keys, newest, stop, out[newest - start :], dtype)
        if start < self.sinks:  # written last: they stand before those of the ring
            _core.read_recent(self.first.parts, keys, start, min(stop, self.sinks), out, dtype)

    def arguments(self, length: int) -> tuple[int, int, _core.RecentRings]:
        """Return what `_core.attend` takes, for a layer of `length` positions."""
        return self.window, length, self.rings

    def rows(self, part: str, start: int, stop: int, length: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield (position, row) for what is kept of positions [start, stop), as attention of the newest query has it.

        Args:
            part: "keys" or "values".
            start: the first position.
            stop: one past the last.
            length: positions stored.

        Returns:
            Rows are f32 [num_kv_heads, dim], exact.
        """
        shift = np.uint64(40 if part == "keys" else 48)
        sinks = set(self.first.held(start, min(stop, self.sinks)))
        for ring in (self.first, self.ring):
            low = start if ring is self.first else max(start, length - self.window)
            for position in ring.held(low, min(stop, ring.slots) if ring is self.first else stop):
                if ring is self.ring and position in sinks:
                    continue
                slot = position % ring.slots
                tag = ring.tags[slot]
                row = getattr(ring, part)[slot].copy()
                if tag and ring.tags[slot] == tag and int(tag & _POSITION) == position + 1:
                    form = int(tag >> shift) & 0xFF
                    yield position, widened(row if form == _BF16 else row.view(np.float16))

    def is_sink(self, position: int) -> bool:
        """True if a position is held as one of the first."""
        return bool(self.first.held(position, position + 1)) if position < self.sinks else False

    def num_held(self, length: int) -> int:
        """Return how many of `length` positions it holds."""
        return len({*self.first.held(0, min(length, self.sinks)), *self.ring.held(0, length)})

    def is_full(self, length: int) -> bool:
        """True if it holds all of `length` positions that it can."""
        first, last = min(length, self.sinks), min(length, self.window)
        return len(self.first.held(0, first)) == first and len(self.ring.held(0, length)) == last

    # Records of a file

    def records(
        self,
        ring: RecentRing,
        coded: Rows,
        first: int,
        start: int,
        stop: int,
        out: NDArray[np.uint8] | None = None,
    ) -> NDArray[np.uint8]:
        """Return the records of positions [start, stop), uint8 [n, record bytes]; zeros for those that are not held.

        Args:
            ring: `ring` or `first`.
            coded: the layer's coded rows.
            first: the position of the first of these.
            start: the first position.
            stop: one past the last.
            out: uint8 [n, record bytes], C-contiguous, to write them to.
        """
        if out is None:
            numbers = ring.keys[:1].size + ring.values[:1].size
            out = np.empty((stop - start, 24 + -(-2 * numbers // 8) * 8), np.uint8)
        self.rings.records(ring is self.first, coded, first, start, stop, out)
        return out


class RecentView(NamedTuple):
    """Rows in 16 bits of a layer, for one read.

    For the query at position q they replace the coded rows of the sinks and of positions above q - window.
    """

    rows: RecentRows
    length: int
    """Positions that the layer has."""


def take_records(
    ring: RecentRing, records: Any, coded: Rows, first: int, start: int, stop: int
) -> Iterator[tuple[int, int]]:
    """Read the records of positions [start, stop) that a ring does not hold yet, and yield each one's state.

    Args:
        ring: where they go.
        records: all of the ring's records, side by side; they may change meanwhile.
        coded: the layer's coded rows.
        first: the position of the first of these.
        start: the first position.
        stop: one past the last.

    Returns:
        (position, state): 0 is an empty record.
    """
    start = max(start, stop - ring.slots)
    states = _core.take_recent_records(records, ring.parts, tuple(coded), first, start, stop) if start < stop else []
    yield from zip(range(start, stop), states, strict=True)
