"""What a handle reads for the first time: blocks that were not compared with their checksums yet, and pages not mapped.

What comparing is lives in `unread_blocks`.
"""

from __future__ import annotations

import numpy as np

from ...attention.source import Ranges
from ..checksums import row_digests
from .mapped_file import LAYERS_AT_ONCE, MappedFile
from .snapshot import Snapshot, SnapshotHolder
from .unread_blocks import UnmappedBlocks, UnreadBlocks, compare

NewBlocks = UnreadBlocks | UnmappedBlocks


class FirstReads:
    """What is new to a handle in its layers.

    Args:
        mapped: the file.
        holder: of the snapshot.
    """

    def __init__(self, mapped: MappedFile, holder: SnapshotHolder) -> None:
        self._mapped = mapped
        self._holder = holder
        self._touched = [0] * mapped.geometry.num_layers
        """By layer, where nothing is compared: 1 once it was read."""
        self._prepared: tuple[Snapshot, int, Ranges, dict[int, NewBlocks]] | None = None
        """For a snapshot, positions inherited and ranges: by layer, what `unread` will return."""

    def all_read(self, layer: int, stop: int) -> bool:
        """True if nothing of a layer's positions [0, stop) is new: the usual case, and quickly answered."""
        holder = self._holder
        slot, verified = holder.current.slot, holder.current.verified
        if verified is None:
            return self._touched[layer] != 0
        return verified.below[layer] >= min(stop, slot.seq_len, holder.inherited_len)

    def unread(self, layer: int, ranges: Ranges) -> NewBlocks | None:
        """Return the blocks of a layer that ranges of positions touch, but for those that this handle has read; None if
        there are no others."""
        holder, prepared = self._holder, self._prepared
        snapshot, inherited = holder.current, holder.inherited_len
        if type(ranges) is not list or len(ranges) != 1:
            return self._find(snapshot, layer, ranges)
        if prepared is None or prepared[0] is not snapshot or prepared[1:3] != (inherited, ranges):
            prepared = self._prepared = snapshot, inherited, ranges, {}
        # Each is used once: whatever happens then, the layer is looked at anew.
        found = prepared[3].pop(layer, None)
        if found is None:
            found = self._find(snapshot, layer, ranges)
            if found is not None:
                self._prepare(found, layer + 1, prepared[3])
        return found

    def _prepare(self, unread: NewBlocks, first: int, found: dict[int, NewBlocks]) -> None:
        """Prepare what the layers from `first` on will be asked for, if they are read as the one before was."""
        layers = self._mapped.geometry.layers
        for layer in range(first, min(first + LAYERS_AT_ONCE - 1, len(layers))):
            other = unread.of_layer(layer) if layers[layer].has_rows else None
            if other is not None:
                found[layer] = other

    def _find(self, snapshot: Snapshot, layer: int, ranges: Ranges) -> NewBlocks | None:
        mapped, slot = self._mapped, snapshot.slot
        if snapshot.verified is not None:
            blocks = snapshot.verified.missing(layer, ranges, min(slot.seq_len, self._holder.inherited_len))
            return UnreadBlocks(mapped, self._holder, snapshot, layer, blocks) if len(blocks) else None
        if self._touched[layer]:
            return None
        if len(ranges) == 1:
            size, start, stop = mapped.geometry.block_tokens, int(ranges[0][0]), int(ranges[0][1])
            if start < stop:
                blocks = np.arange(start // size, -(-stop // size))
                return UnmappedBlocks(layer, blocks, size, stop, self._touched)
        self._touched[layer] = 1  # of a selection, page faults map what is read and no more
        return None

    def to_compare(self, layer: int, ranges: Ranges) -> UnreadBlocks | None:
        """Return the blocks of a layer that ranges of positions touch and that are to be compared now, without
        attention."""
        self._prepared = None  # it may have some of them
        if self._holder.current.verified is None:
            self._touched[layer] = 1
            return None
        found = self._find(self._holder.current, layer, ranges)
        return found if isinstance(found, UnreadBlocks) else None


def verify_rows(first_reads: FirstReads, layer: int, ranges: Ranges, threads: int = 1) -> None:
    """Compare the blocks of a layer that ranges of positions touch, unless their handle has done so before.

    Raises:
        CorruptCacheError: a block does not match its checksum.
        CacheChangedError: its rows were truncated meanwhile.
    """
    unread = first_reads.to_compare(layer, ranges)
    if unread is not None:
        unread.verify(threads)


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
            compare(mapped, holder, snapshot, [ids], track, block, slot.token_len, int(sums[block]))
    verified.note_all(track, blocks, slot.token_len)
    verified.sum_up(track, covered)
