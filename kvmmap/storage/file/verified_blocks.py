"""Which blocks of a handle have been verified: compared with their checksums, each when it is first read.

A verified block of a layer, or of token ids, is remembered. This module makes no system call, and does not know the
file: `first_read` compares.
"""

from __future__ import annotations

import copy

import numpy as np
from numpy.typing import NDArray

from ...attention.source import Ranges


class VerifiedBlocks:
    """How many rows of each block are verified, by track: a layer, or the token ids at index num_layers.

    It belongs to one writer generation: after a truncation, the next snapshot gets another.
    """

    def __init__(self, num_layers: int, capacity: int, block_tokens: int) -> None:
        self._blocks = -(-capacity // block_tokens)
        self._block_tokens = block_tokens
        self._rows: dict[int, NDArray[np.int64]] = {}
        """By track, once there are gaps: before, `below` says it all."""
        self.below = [0] * (num_layers + 1)
        """By track: positions, from 0, that are verified without a gap."""
        self._last = 0, 0, np.empty(0, np.int64)
        """The first of consecutive blocks that were missing last, one past the last of them, and their numbers. Mostly,
        the same ones are missing of the next layer."""

    def missing(self, track: int, ranges: Ranges, covered: int) -> NDArray[np.int64]:
        """Return the blocks that are touched by ranges and are not yet verified as far as they are covered.

        Args:
            track: which.
            ranges: what is about to be read.
            covered: positions, from 0, that checksums cover.
        """
        size = self._block_tokens
        if len(ranges) == 1:  # the usual case: everything below some length, or a window
            start, stop = int(ranges[0][0]), min(int(ranges[0][1]), covered)
            first, end = start // size, -(-stop // size) if start < stop else 0
            if track not in self._rows:
                below = self.below[track]
                return self._consecutive(max(first, below // size), end if below < covered else 0)
            blocks = np.arange(first, end)
            return blocks[self._of(track)[blocks] < self._wanted_of(blocks, covered)]
        every = np.array(ranges, np.int64).reshape(-1, 2)
        some = every[every[:, 0] < np.minimum(every[:, 1], covered)]
        edges = np.zeros(self._blocks + 1, np.int64)
        np.add.at(edges, some[:, 0] // size, 1)
        np.add.at(edges, -(-np.minimum(some[:, 1], covered) // size), -1)
        return np.flatnonzero((np.cumsum(edges[:-1]) > 0) & (self._of(track) < self._wanted(covered)))

    def _consecutive(self, first: int, end: int) -> NDArray[np.int64]:
        """Return blocks [first, end)."""
        start, stop, blocks = self._last
        if (start, stop) != (first, end):
            blocks = np.arange(first, end)
            blocks.flags.writeable = False
            self._last = first, end, blocks
        return blocks

    def note(self, track: int, block: int, rows: int) -> None:
        """Remember that the first `rows` rows of a block are verified."""
        self._of(track)[block] = rows

    def note_all(self, track: int, blocks: NDArray[np.int64], covered: int) -> None:
        """Remember that some blocks, in ascending order, are verified as far as checksums cover them: positions below
        `covered`."""
        if not len(blocks):
            return
        reach = self.reach(track, blocks, covered)
        if not reach:
            self._of(track)[blocks] = self._wanted_of(blocks, covered)
        elif reach > self.below[track]:
            self.below[track] = reach

    def reach(self, track: int, blocks: NDArray[np.int64], covered: int) -> int:
        """Return what `below` becomes once some blocks, in ascending order, are verified as `note_all` says; 0 if they
        leave a gap, or there is one before them."""
        start, stop, known = self._last
        if blocks is not known:
            start, stop = int(blocks[0]), int(blocks[-1]) + 1
        if track in self._rows or stop - start != len(blocks) or start * self._block_tokens > self.below[track]:
            return 0
        return min(covered, stop * self._block_tokens)

    def has_gaps(self, track: int) -> bool:
        """True if `below` does not tell all that is verified."""
        return track in self._rows

    def sum_up(self, track: int, covered: int) -> None:
        """Update `below` from what was noted."""
        if track not in self._rows:
            return
        short = np.flatnonzero(self._of(track) < self._wanted(covered))
        self.below[track] = min(covered, int(short[0]) * self._block_tokens) if len(short) else covered

    def cut(self, length: int) -> VerifiedBlocks:
        """Return what is still verified after a truncation to `length`."""
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
        return np.maximum(self._wanted_of(np.arange(self._blocks), covered), 0)

    def _wanted_of(self, blocks: NDArray[np.int64], covered: int) -> NDArray[np.int64]:
        """Rows of some blocks that are covered; negative for a block beyond."""
        return np.minimum(covered - blocks * self._block_tokens, self._block_tokens)

    def _of(self, track: int) -> NDArray[np.int64]:
        if track not in self._rows:
            starts = np.arange(self._blocks) * self._block_tokens
            self._rows[track] = np.clip(self.below[track] - starts, 0, self._block_tokens)
        return self._rows[track]
