"""Comparing blocks with their checksums when they are first read through a handle.

What a commit does not cover has no checksum yet: positions published since, and on a writer's handle those that it
wrote itself. Hashing goes through the map, because what is hashed is read right afterwards.
"""

from __future__ import annotations

import numpy as np

from ...errors import CorruptCacheError
from ..checksums import Track, digest, digests
from .mapped_file import MappedFile
from .snapshot import Snapshot, SnapshotHolder
from .verified_blocks import Ranges

WHAT_TO_DO = "`kvmmap verify PATH` lists all damage, `kvmmap repair PATH NEW_PATH` saves what is sound"


def is_verified(holder: SnapshotHolder, layer: int, stop: int) -> bool:
    """True if nothing of a layer's positions [0, stop) is left to compare: the usual case, and quickly answered."""
    slot, verified = holder.current.slot, holder.current.verified
    return verified is None or verified.below[layer] >= min(stop, slot.seq_len, holder.inherited_len)


def verify_rows(mapped: MappedFile, holder: SnapshotHolder, layer: int, ranges: Ranges) -> None:
    """Compare the blocks of a layer that ranges of positions touch, unless this handle has done so before.

    Raises:
        CorruptCacheError: a block does not match its checksum.
        CacheChangedError: its rows were truncated meanwhile.
    """
    snapshot = holder.current
    slot, verified = snapshot.slot, snapshot.verified
    covered = min(slot.seq_len, holder.inherited_len)
    if verified is None:
        return
    blocks = verified.missing(layer, ranges, covered)
    if len(blocks):
        sums, rows = mapped.checksums(slot, int(blocks[0]), int(blocks[-1]) + 1)[:, layer], mapped.slabs(layer)
        for block in blocks.tolist():
            expected = int(sums[block - blocks[0]])
            _compare(mapped, holder, snapshot, rows, layer, block, slot.seq_len, expected)
        verified.sum_up(layer, covered)


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
    found = digests(ids, track, blocks, size, slot.token_len)
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
