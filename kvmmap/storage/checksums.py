"""Block checksums over growing arrays: each row is hashed once, however often there is a commit.

A `BlockHasher` follows tracks that grow together (all layers of a cache; or its token ids) and keeps the running
hash of each one's incomplete block, so that committing after every token costs the same at any length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from .._core import block_checksums
from ..format import block_checksum

Track = Sequence[NDArray[Any]]
"""Arrays that grow along their first axis together."""


@dataclass(frozen=True, slots=True)
class Advance:
    """What a longer length adds."""

    first_block: int
    complete: NDArray[np.uint64]
    """[new complete blocks, tracks]."""
    tails: tuple[int, ...]
    """One a track; 0 where the length ends on a block."""


def digest(arrays: Track, track: int, block: int, start: int, stop: int) -> int:
    """Return the checksum of positions [start, stop) of a block, from nothing."""
    parts = [xxhash.xxh3_64_intdigest(array[start:stop].data) for array in arrays]
    return block_checksum(track, block, stop - start, parts)


def row_digests(
    arrays: Track, track: int, blocks: NDArray[np.int64], size: int, stop: int, threads: int = 1
) -> NDArray[np.uint64]:
    """Return the checksums of blocks of a track, as `digest` does, u64 [len(blocks)].

    Args:
        arrays: contiguous, [positions, ...].
        track: the layer, or num_layers for token ids.
        blocks: their numbers.
        size: positions of a block.
        stop: where the last block ends.
        threads: at most so many.
    """
    found = np.empty(len(blocks), np.uint64)
    rows = tuple(array.reshape(len(array), math.prod(array.shape[1:])).view(np.uint8) for array in arrays)
    block_checksums(rows, track, blocks, size, stop, found, threads)
    return found


class BlockHasher:
    """Checksums of tracks numbered from `first_track`, at the last length given."""

    def __init__(self, tracks: Sequence[Track], first_track: int, block_tokens: int, length: int) -> None:
        self._tracks = tracks
        self._first_track = first_track
        self._block_tokens = block_tokens
        self.rewind(length)

    def rewind(self, length: int) -> None:
        """Forget what was hashed; `length` positions have checksums already."""
        self._length = length
        self._hashed = length - length % self._block_tokens
        self._states: list[list[Any]] | None = None
        self._precomputed: tuple[int, NDArray[np.uint64]] | None = None

    def use_precomputed(self, length: int, sums: NDArray[np.uint64]) -> None:
        """Use precomputed checksums in the next `advance` to `length`, instead of hashing.

        Args:
            length: the length that they cover.
            sums: u64 [blocks, tracks], from the block that the present length ends in; the last may be incomplete.
        """
        self._precomputed = length, sums

    def tails(self) -> tuple[int, ...]:
        """Return the checksum of the incomplete block of each track, at the present length."""
        return self.advance(self._length).tails

    def advance(self, length: int) -> Advance:
        """Hash the positions between the present length and `length`, which becomes the present one."""
        size = self._block_tokens
        first = self._length // size
        if self._precomputed is not None and self._precomputed[0] == length:
            sums = self._precomputed[1]
            self.rewind(length)
            whole = length // size - first
            return Advance(first, sums[:whole], tuple(sums[whole].tolist()) if length % size else (0,) * sums.shape[1])
        complete = np.zeros((length // size - first, len(self._tracks)), np.uint64)
        if len(complete):
            begun = int(self._states is not None)
            if begun:
                complete[0] = self._finish_block(first)
            blocks = np.arange(first + begun, length // size)
            for i, arrays in enumerate(self._tracks):
                complete[begun:, i] = row_digests(arrays, self._first_track + i, blocks, size, length)
            self._hashed = length - length % size
        tails: tuple[int, ...] = (0,) * len(self._tracks)
        if length % size:
            tails = self._feed_tail(length)
        self._length = length
        return Advance(first, complete, tails)

    def _finish_block(self, block: int) -> list[int]:
        """Hash what a begun block lacks."""
        self._feed((block + 1) * self._block_tokens)
        sums = self._sums(block, self._block_tokens)
        self._states = None
        return sums

    def _feed_tail(self, length: int) -> tuple[int, ...]:
        if self._states is None:
            self._states = [[xxhash.xxh3_64() for _ in arrays] for arrays in self._tracks]
        self._feed(length)
        return tuple(self._sums(length // self._block_tokens, length % self._block_tokens))

    def _feed(self, stop: int) -> None:
        assert self._states is not None
        if stop > self._hashed:
            for arrays, states in zip(self._tracks, self._states, strict=True):
                for array, state in zip(arrays, states, strict=True):
                    state.update(array[self._hashed : stop])
        self._hashed = stop

    def _sums(self, block: int, rows: int) -> list[int]:
        assert self._states is not None
        return [
            block_checksum(self._first_track + i, block, rows, [state.intdigest() for state in states])
            for i, states in enumerate(self._states)
        ]
