"""Blocks that a handle reads for the first time: what attention needs to compare them with their checksums, and doing
it without attention.

What a commit does not cover has no checksum yet: positions published since, and on a writer's handle those that it
wrote itself. Hashing goes through the map, because what is hashed is read right afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...attention.source import UnreadArguments
from ...errors import CorruptCacheError
from ..checksums import Track, digest, row_digests
from .mapped_file import MappedFile
from .page_cache import map_pages
from .snapshot import Snapshot, SnapshotHolder

_BLOCKS_AT_ONCE = 64
"""Blocks whose pages are mapped before they are hashed."""

WHAT_TO_DO = "`kvmmap verify PATH` lists all damage, `kvmmap repair PATH NEW_PATH` saves what is sound"


class UnreadBlocks:
    """Blocks of a layer that this handle reads for the first time, and their checksums: computed here, or by attention.

    Args:
        mapped: the file.
        holder: of the snapshot.
        snapshot: what is read.
        layer: which.
        blocks: their numbers, ascending.
    """

    __slots__ = ("_blocks", "_holder", "_layer", "_mapped", "_snapshot", "arguments")

    arguments: UnreadArguments

    def __init__(
        self, mapped: MappedFile, holder: SnapshotHolder, snapshot: Snapshot, layer: int, blocks: NDArray[np.int64]
    ) -> None:
        self._mapped = mapped
        self._holder = holder
        self._snapshot = snapshot
        self._layer = layer
        self._blocks = blocks
        size, stop = mapped.geometry.block_tokens, snapshot.slot.seq_len
        verified = snapshot.verified
        assert verified is not None
        reach = verified.reach(layer, blocks, stop)
        self.arguments = layer, blocks, size, stop, *self._expected(), verified.below, reach

    def of_layer(self, layer: int) -> UnreadBlocks | None:
        """Return the same blocks of another layer, in a fifth of the time; None if other ones are verified of it."""
        verified, own = self._snapshot.verified, self._layer
        _, blocks, size, stop, sums, first, below, reach = self.arguments
        if not reach or verified is None or below[layer] != below[own] or verified.has_gaps(layer):
            return None
        if sums is not self._mapped.all_checksums(self._snapshot.slot):
            return None
        other = UnreadBlocks.__new__(UnreadBlocks)
        other._mapped, other._holder, other._snapshot = self._mapped, self._holder, self._snapshot
        other._layer, other._blocks = layer, blocks
        total = -(-stop // size)
        other.arguments = layer, blocks, size, stop, sums, first + (layer - own) * total, below, reach
        return other

    def note(self) -> None:
        """Remember that the blocks match their checksums."""
        verified = self._snapshot.verified
        assert verified is not None
        stop = self._snapshot.slot.seq_len
        verified.note_all(self._layer, self._blocks, stop)
        verified.sum_up(self._layer, min(stop, self._holder.inherited_len))

    def verify(self, threads: int) -> None:
        """Hash the blocks, from the map, compare the checksums with the file's, and remember those that match.

        Raises:
            CorruptCacheError: a block does not match its checksum.
            CacheChangedError: its rows were truncated meanwhile.
        """
        rows = self._mapped.slabs(self._layer)
        size, stop = self._mapped.geometry.block_tokens, self._snapshot.slot.seq_len
        found = np.empty(len(self._blocks), np.uint64)
        for first in range(0, len(self._blocks), _BLOCKS_AT_ONCE):
            some = self._blocks[first : first + _BLOCKS_AT_ONCE]
            _map_pages(self._mapped, self._layer, some, stop)
            found[first : first + len(some)] = row_digests(rows, self._layer, some, size, stop, threads)
        self._compare(found)
        self.note()

    def _compare(self, found: NDArray[np.uint64]) -> None:
        """Raise for the first block whose checksum is another than the file's."""
        sums, of_first = self.arguments[4:6]
        assert sums is not None
        expected = sums[of_first + self._blocks]
        wrong = found != expected
        if not wrong.any():
            return
        slot, verified = self._snapshot.slot, self._snapshot.verified
        assert verified is not None
        verified.note_all(self._layer, self._blocks[~wrong], slot.seq_len)
        rows = self._mapped.slabs(self._layer)
        for i in np.flatnonzero(wrong).tolist():
            compare(
                *(self._mapped, self._holder, self._snapshot, rows),
                *(self._layer, int(self._blocks[i]), slot.seq_len, int(expected[i])),
            )

    def _expected(self) -> tuple[NDArray[np.uint64], int]:
        """Return the file's checksums of the blocks, and which of these is, or would be, that of block 0."""
        blocks, slot = self._blocks, self._snapshot.slot
        total = -(-slot.seq_len // self._mapped.geometry.block_tokens)
        if 2 * len(blocks) > total:
            return self._mapped.all_checksums(slot), self._layer * total
        first = int(blocks[0])
        return self._mapped.checksums(slot, first, int(blocks[-1]) + 1)[:, self._layer].copy(), -first


class UnmappedBlocks:
    """Blocks of a layer that this handle reads for the first time, and compares with nothing: their pages are mapped.

    Args:
        layer: which.
        blocks: their numbers, ascending.
        size: positions of a block.
        stop: where the last one ends.
        touched: by layer, where to note that it was read.
    """

    __slots__ = ("arguments",)

    def __init__(self, layer: int, blocks: NDArray[np.int64], size: int, stop: int, touched: list[int]) -> None:
        self.arguments: UnreadArguments = (layer, blocks, size, stop, None, 0, touched, 1)

    def of_layer(self, layer: int) -> UnmappedBlocks | None:
        """Return the same blocks of another layer, if it was not read before; else None."""
        _, blocks, size, stop, _, _, touched, _ = self.arguments
        return None if touched[layer] else UnmappedBlocks(layer, blocks, size, stop, touched)

    def note(self) -> None:
        """Do nothing: attention has noted that the pages were mapped."""

    def verify(self, threads: int) -> None:
        """Do nothing: no checksum is known."""


def _map_pages(mapped: MappedFile, layer: int, blocks: NDArray[np.int64], covered: int) -> None:
    """Map the pages of blocks by one call an array, in place of a page fault for every few of them."""
    size = mapped.geometry.block_tokens
    start, stop = int(blocks[0]) * size, min((int(blocks[-1]) + 1) * size, covered)
    if stop - start > 2 * size * len(blocks):
        return  # most of what lies between is not wanted
    for extent in mapped.blocks.row_extents(layer, start, stop):
        map_pages(mapped.rows_memory, extent.offset, extent.offset + extent.size)


def compare(
    mapped: MappedFile,
    holder: SnapshotHolder,
    snapshot: Snapshot,
    arrays: Track,
    track: int,
    block: int,
    length: int,
    expected: int,
) -> None:
    """Compare a block of a track of which `length` positions are committed."""
    start = block * mapped.geometry.block_tokens
    stop = min(start + mapped.geometry.block_tokens, length)
    if digest(arrays, track, block, start, stop) == expected:
        assert snapshot.verified is not None
        snapshot.verified.note(track, block, stop - start)
        return
    holder.validate(snapshot.generation_word)  # other rows may have been written there
    layer = track if track < mapped.geometry.num_layers else None
    place = "token ids are" if layer is None else f"layer {layer} is"
    raise CorruptCacheError(
        f"{mapped.path}: {place} damaged in positions [{start}, {stop}), block {block}: checksum does not match. "
        f"{WHAT_TO_DO}",
        path=mapped.path,
        layer=layer,
        position=start,
    )
