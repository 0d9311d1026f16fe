"""Comparing blocks with their checksums when they are first read through a handle.

What a commit does not cover has no checksum yet: positions published since, and on a writer's handle those that it
wrote itself. Hashing goes through the map, because what is hashed is read right afterwards.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...attention.source import Ranges, UnreadArguments
from ...errors import CorruptCacheError
from ..checksums import Track, digest, row_digests
from .mapped_file import MappedFile
from .page_cache import map_pages
from .snapshot import Snapshot, SnapshotHolder

_BLOCKS_AT_ONCE = 64
"""Blocks whose pages are mapped before they are hashed."""

WHAT_TO_DO = "`kvmmap verify PATH` lists all damage, `kvmmap repair PATH NEW_PATH` saves what is sound"


def is_verified(holder: SnapshotHolder, layer: int, stop: int) -> bool:
    """True if nothing of a layer's positions [0, stop) is left to compare: the usual case, and quickly answered."""
    slot, verified = holder.current.slot, holder.current.verified
    return verified is None or verified.below[layer] >= min(stop, slot.seq_len, holder.inherited_len)


class UnreadBlocks:
    """Blocks of a layer that this handle reads for the first time, and their checksums: computed here, or by attention.

    Args:
        mapped: the file.
        holder: of the snapshot.
        snapshot: what is read.
        layer: which.
        blocks: their numbers, ascending.
    """

    __slots__ = ("_blocks", "_holder", "_layer", "_mapped", "_snapshot")

    def __init__(
        self, mapped: MappedFile, holder: SnapshotHolder, snapshot: Snapshot, layer: int, blocks: NDArray[np.int64]
    ) -> None:
        self._mapped = mapped
        self._holder = holder
        self._snapshot = snapshot
        self._layer = layer
        self._blocks = blocks

    @property
    def arguments(self) -> UnreadArguments:
        size, stop = self._mapped.geometry.block_tokens, self._snapshot.slot.seq_len
        return self._layer, self._blocks, size, stop, *self._expected()

    def note(self) -> None:
        """Remember that the blocks match their checksums."""
        slot, verified = self._snapshot.slot, self._snapshot.verified
        assert verified is not None
        verified.note_all(self._layer, self._blocks, slot.seq_len)
        verified.sum_up(self._layer, min(slot.seq_len, self._holder.inherited_len))

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
        sums, of_first = self._expected()
        expected = sums[of_first + self._blocks]
        wrong = found != expected
        if not wrong.any():
            return
        slot, verified = self._snapshot.slot, self._snapshot.verified
        assert verified is not None
        verified.note_all(self._layer, self._blocks[~wrong], slot.seq_len)
        rows = self._mapped.slabs(self._layer)
        for i in np.flatnonzero(wrong).tolist():
            _compare(
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


def unread_blocks(mapped: MappedFile, holder: SnapshotHolder, layer: int, ranges: Ranges) -> UnreadBlocks | None:
    """Return the blocks of a layer that ranges of positions touch, but for those that this handle has verified; None if
    there are no others."""
    snapshot = holder.current
    if snapshot.verified is None:
        return None
    blocks = snapshot.verified.missing(layer, ranges, min(snapshot.slot.seq_len, holder.inherited_len))
    return UnreadBlocks(mapped, holder, snapshot, layer, blocks) if len(blocks) else None


def verify_rows(mapped: MappedFile, holder: SnapshotHolder, layer: int, ranges: Ranges, threads: int = 1) -> None:
    """Compare the blocks of a layer that ranges of positions touch, unless this handle has done so before.

    Raises:
        CorruptCacheError: a block does not match its checksum.
        CacheChangedError: its rows were truncated meanwhile.
    """
    unread = unread_blocks(mapped, holder, layer, ranges)
    if unread is not None:
        unread.verify(threads)


def _map_pages(mapped: MappedFile, layer: int, blocks: NDArray[np.int64], covered: int) -> None:
    """Map the pages of blocks by one call an array, in place of a page fault for every few of them."""
    size = mapped.geometry.block_tokens
    start, stop = int(blocks[0]) * size, min((int(blocks[-1]) + 1) * size, covered)
    if stop - start > 2 * size * len(blocks):
        return  # most of what lies between is not wanted
    for extent in mapped.blocks.row_extents(layer, start, stop):
        map_pages(mapped.rows_memory, extent.offset, extent.offset + extent.size)


def verify_tokens(mapped: MappedFile, holder: SnapshotHolder, stop: int) -> None:
    """Compare the token ids of positions [0, stop), as `verify_rows` does rows."""
    snapshot, track = holder.current, mapped.geometry.num_layers
    slot, verified = snapshot.slot, snapshot.verified
    covered = min(slot.token_len, holder.inherited_tokens)
    if verified is None or verified.below[track] >= min(stop, covered):
        return
    ids, sums = mapped.token_ids(), mapped.token_checksums(slot)
    blocks = verified.missing(track, np.array([[0, stop]], np.int64), covered)
    size = mapped.geometry.block_tokens
    found = row_digests([ids], track, blocks, size, slot.token_len)
    if not np.array_equal(found, sums[blocks]):
        for block in blocks.tolist():
            _compare(mapped, holder, snapshot, [ids], track, block, slot.token_len, int(sums[block]))
    verified.note_all(track, blocks, slot.token_len)
    verified.sum_up(track, covered)


def _compare(
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
