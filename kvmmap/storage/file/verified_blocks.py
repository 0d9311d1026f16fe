"""Checksums at first touch: which blocks of a handle were compared with theirs, and comparing those that were not.

A block of a layer, or of token ids, is compared when rows of it are first read through a handle, and then remembered.
What a commit does not cover has no checksum yet: rows that were published since, and on a writer's handle those that it
wrote itself. Hashing goes through the map, since what is hashed is read right afterwards.

What lives here makes no system call, and does not know when rows are read: their layers say so.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError
from ..checksums import Track, digest

WHAT_TO_DO = "`kvmmap verify PATH` lists all damage, `kvmmap repair PATH NEW_PATH` saves what is sound"

if TYPE_CHECKING:
    from .reader import MappedReader, Snapshot

Ranges = NDArray[np.int64]
"""[k, 2]: start and stop of stretches of positions."""


class Proven:
    """How many rows of each block hold, by track: a layer, or the token ids at index num_layers.

    It belongs to one writer generation: where positions are taken back, the next snapshot gets another.
    """

    def __init__(self, num_layers: int, capacity: int, block_tokens: int) -> None:
        self._blocks = -(-capacity // block_tokens)
        self._block_tokens = block_tokens
        self._rows: dict[int, NDArray[np.int64]] = {}
        self.below = [0] * (num_layers + 1)
        """By track: positions, from 0, that hold without a gap."""

    def missing(self, track: int, ranges: Ranges, covered: int) -> NDArray[np.int64]:
        """Return the blocks that are touched by ranges and do not yet hold as far as they are covered.

        Args:
            track: which.
            ranges: what is about to be read.
            covered: positions, from 0, that checksums cover.
        """
        size = self._block_tokens
        some = ranges[ranges[:, 0] < np.minimum(ranges[:, 1], covered)]
        edges = np.zeros(self._blocks + 1, np.int64)
        np.add.at(edges, some[:, 0] // size, 1)
        np.add.at(edges, -(-np.minimum(some[:, 1], covered) // size), -1)
        return np.flatnonzero((np.cumsum(edges[:-1]) > 0) & (self._of(track) < self._wanted(covered)))

    def note(self, track: int, block: int, rows: int) -> None:
        """The first `rows` rows of a block hold."""
        self._of(track)[block] = rows

    def sum_up(self, track: int, covered: int) -> None:
        """Bring `below` up to what was noted."""
        short = np.flatnonzero(self._of(track) < self._wanted(covered))
        self.below[track] = min(covered, int(short[0]) * self._block_tokens) if len(short) else covered

    def cut(self, length: int) -> Proven:
        """Return what still holds when positions from `length` on are taken back."""
        block, rest = divmod(length, self._block_tokens)
        other = copy.copy(self)
        other._rows = {track: rows.copy() for track, rows in self._rows.items()}
        for rows in other._rows.values():
            rows[block + 1 :] = 0
            rows[block : block + 1] = np.minimum(rows[block : block + 1], rest)
        other.below = [min(below, length) for below in self.below]
        return other

    def _wanted(self, covered: int) -> NDArray[np.int64]:
        """Rows of each block that are covered."""
        return np.clip(covered - np.arange(self._blocks) * self._block_tokens, 0, self._block_tokens)

    def _of(self, track: int) -> NDArray[np.int64]:
        if track not in self._rows:
            self._rows[track] = np.zeros(self._blocks, np.int64)
        return self._rows[track]


def is_proven(reader: MappedReader, layer: int, stop: int) -> bool:
    """True if nothing of a layer's positions [0, stop) is left to be compared: the usual case, and soon told."""
    slot, proven = reader.snapshot.slot, reader.snapshot.proven
    return proven is None or proven.below[layer] >= min(stop, slot.seq_len, reader.foreign)


def prove_rows(reader: MappedReader, layer: int, ranges: Ranges) -> None:
    """Compare the blocks of a layer that ranges of positions touch, as far as that was not done yet.

    Raises:
        CorruptCacheError: a block does not match its checksum.
        CacheChangedError: its rows were taken back meanwhile.
    """
    snapshot = reader.snapshot
    slot, proven = snapshot.slot, snapshot.proven
    covered = min(slot.seq_len, reader.foreign)
    if proven is None:
        return
    blocks = proven.missing(layer, ranges, covered)
    if len(blocks):
        sums = reader.stored_sums(slot, int(blocks[0]), int(blocks[-1]) + 1)[:, layer]
        for block in blocks.tolist():
            expected = int(sums[block - blocks[0]])
            _prove(reader, snapshot, reader.layers[layer].slabs(), layer, block, slot.seq_len, expected)
        proven.sum_up(layer, covered)


def prove_tokens(reader: MappedReader, stop: int) -> None:
    """Compare the token ids of positions [0, stop), as `prove_rows` does rows."""
    snapshot, track = reader.snapshot, reader.geometry.num_layers
    slot, proven = snapshot.slot, snapshot.proven
    covered = min(slot.token_len, reader.foreign_tokens)
    if proven is None or proven.below[track] >= min(stop, covered):
        return
    ids, sums = [reader.map_tokens()], reader.stored_token_sums(slot)
    for block in proven.missing(track, np.array([[0, stop]], np.int64), covered).tolist():
        _prove(reader, snapshot, ids, track, block, slot.token_len, int(sums[block]))
    proven.sum_up(track, covered)


def _prove(
    reader: MappedReader, snapshot: Snapshot, arrays: Track, track: int, block: int, length: int, expected: int
) -> None:
    """Compare a block of a track of which `length` positions are committed."""
    start = block * reader.geometry.block_tokens
    stop = min(start + reader.geometry.block_tokens, length)
    if digest(arrays, track, block, start, stop) == expected:
        assert snapshot.proven is not None
        snapshot.proven.note(track, block, stop - start)
        return
    reader.validate(snapshot.generation_word)  # others may have been written there
    layer = track if track < reader.geometry.num_layers else None
    place = "token ids are" if layer is None else f"layer {layer} is"
    raise CorruptCacheError(
        f"{reader.path}: {place} damaged in positions [{start}, {stop}), block {block}: checksum does not match. "
        f"{WHAT_TO_DO}",
        path=reader.path,
        layer=layer,
        position=start,
    )
