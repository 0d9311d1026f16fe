"""Another capacity for a `.kvm` file: a new file is built beside it and takes its place.

The old file is never changed, so processes that have it mapped continue to read it, and detect
the replacement at `refresh`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence

from ...errors import CapacityExceededError, CorruptCacheError
from ..checkpoints import copy_checkpoints
from ..protocols import LayerStore, Progress
from .mapped_file import read_superblock
from .placement import build_file
from .verify import check_blocks
from .writer import MappedWriter


def resize_file(path: str, capacity: int | None, *, timeout: float = 0, progress: Progress | None = None) -> None:
    """Rebuild the file at `path` with room for `capacity` positions; None for just as many as are stored.

    Raises:
        CapacityExceededError: more positions are stored.
        CacheLockedError: a writer holds the file.
        CorruptCacheError: a block does not match its checksum; nothing was changed.
    """
    with contextlib.closing(MappedWriter.open_locked(path, timeout=timeout)) as old:
        # So that checksums cover everything; and closed, because nothing can be saved in it once it is replaced.
        old.commit(closing=True)
        length = old.seq_len
        # Those of a parent are no rows of this file, and count all the same.
        before = 0 if old.parent is None else old.parent.length
        wanted = before + length if capacity is None else capacity
        _refuse_loss(wanted, before + length)
        geometry = dataclasses.replace(old.geometry, capacity=wanted - before)
        file, _ = build_file(old.path, geometry, old.document, parent=old.parent)
        try:
            file.copy_access(old.file)
            new = MappedWriter(file, read_superblock(file), durability="publish")
            with contextlib.closing(new):
                _copy(old, new, length, progress)
                new.commit(closing=True)
                file.replace(old.path)
                new.path = old.path
            old.live.put("superseded", 1)
        except BaseException:
            if file.path != old.path:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.path)
            file.close()
            raise


def _refuse_loss(capacity: int, length: int) -> None:
    if capacity < length:
        raise CapacityExceededError(
            f"{length} positions are stored, and a capacity of {capacity} would lose some; truncate() first",
            capacity=capacity,
            expected=length,
            actual=capacity,
        )


def _copy(old: MappedWriter, new: MappedWriter, length: int, progress: Progress | None) -> None:
    size, blocks = old.geometry.block_tokens, old.mapped.blocks
    total = length * sum(layer.position_bytes for layer in old.geometry.layers)
    for start in range(0, length, size):
        stop = min(start + size, length)
        # A damaged block must not get a new, good checksum.
        for damage in check_blocks(old.mapped, start // size, start // size + 1, old.snapshot.slot):
            raise CorruptCacheError(
                f"{old.path}: {damage.what}; nothing was changed",
                path=old.path,
                layer=damage.layer,
                position=start,
            )
        for layer in new.row_layers:
            # Not through the map: what the disk can't read is an error to report then.
            layer.write(layer.begin(stop - start), blocks.rows(layer.index, start, stop))
            layer.publish(stop)
        if progress:
            progress(total * stop // length, total)
    copy_recent(old.layers, new.layers, length)
    new.write_tokens(0, old.read_tokens(min(old.token_len, length)))
    new.publish_tokens(min(old.token_len, length))
    copy_checkpoints(old.checkpoints, new.checkpoints, length)


def copy_recent(sources: Sequence[LayerStore], targets: Sequence[LayerStore], length: int) -> None:
    """Copy what is kept in 16 bits of the first `length` positions, whose coded rows were copied."""
    for source, target in zip(sources, targets, strict=True):
        kept = source.recent_rows()
        if kept is not None:
            target.take_recent(kept, 0, length)
            target.save_recent()
