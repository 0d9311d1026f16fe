"""Copying the undamaged part of a damaged `.kvm` file to a new one. The damaged file is only read.

Positions are kept from 0 up to the first block that does not match its checksum in some layer. Later rows would
otherwise move, or leave a gap, and keys are rotated by their position. A caller that prefers a block of zeros to losing
what follows names the block; the new file's metadata lists such blocks.

Rows are verified and written from the same bytes, so no unverified row gets a checksum.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ...errors import CorruptCacheError, ParentError
from ...format import NO_TOKEN, PAGE, Parent, Section
from ...metadata import Document
from ...recent import RecentRows
from ...rows import zero_rows
from ..posix import closing_on_error
from ..protocols import Damage, Progress
from .mapped_file import open_file, read_parent, read_superblock
from .placement import already_exists, build_file, place_of, refuse_locked
from .recent_records import LayerRecords
from .recovery import DamagedFile, Reach
from .writer import MappedWriter

MARK = "kvmmap.repair"
"""The key in the new file's metadata that lists blocks of zeros."""

Place = tuple[int | None, int]
"""A layer, or None for token ids, and a block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RepairReport:
    """What `repair` kept."""

    path: str
    """The damaged file."""

    new_path: str
    """What was made of it."""

    first: int
    """Positions of parents that come before the file's own. All numbers below are of its own positions, from 0."""

    stored: int
    """Positions that the damaged file seems to have had."""

    seq_len: int
    """Positions kept, from 0."""

    restorable: int
    """Positions up to the last checkpoint kept, which a cache with states is continued from; else `seq_len`."""

    unverified: int
    """Those of them, the last ones, that no commit covered, and so no checksum."""

    stored_token_len: int
    """Positions whose token ids it seems to have had."""

    token_len: int
    """Positions, from 0, whose token ids were kept."""

    metadata: Literal["kept", "earlier", "lost"]
    """What became of model and metadata: kept, of the commit before the last, or lost."""

    damages: list[Damage] = field(default_factory=list)
    """What was found wrong, up to where positions end: see `VerifyReport`; `verify` lists all there is."""

    zeroed: list[Damage] = field(default_factory=list)
    """Blocks that were replaced by zeros on request."""

    @property
    def complete(self) -> bool:
        """True if nothing was lost."""
        return (self.seq_len, self.token_len, self.metadata) == (
            self.stored,
            self.stored_token_len,
            "kept",
        ) and not self.zeroed


def repair_file(
    path: str,
    new_path: str,
    *,
    zero: Collection[Place] = (),
    progress: Progress | None = None,
) -> RepairReport:
    """Copy the undamaged part of the file at `path` to a new one at `new_path`.

    Raises:
        CacheExistsError: there is something at `new_path`.
        CacheLockedError: a writer holds the damaged file.
        CorruptCacheError: nothing of it can be saved.
    """
    new_path = place_of(new_path, overwrite=False)
    with contextlib.closing(open_file(path, writable=False)) as file:
        old = DamagedFile(file)
        if not file.try_lock():
            refuse_locked(file, old.superblock)
        return _Repair(old, frozenset(zero)).run(new_path, progress)


class _Repair:
    """One repair under way."""

    def __init__(self, old: DamagedFile, zero: frozenset[Place]) -> None:
        self.old = old
        self.zero = zero
        self.reach: Reach = old.reach()
        self.damages = [Damage(trouble) for trouble in old.troubles()]
        self.zeroed: list[Damage] = []

    def run(self, new_path: str, progress: Progress | None) -> RepairReport:
        """Build the complete new file, and rename it to its path."""
        old, reach = self.old, self.reach
        document, newest = old.document()
        if document is None or not newest:
            self.damages.append(
                Damage("metadata damaged" + (": that of the commit before is kept" if document else ""))
            )
        room = old.superblock.section(Section.METADATA).size // 2 + (PAGE if self.zero else 0)
        parent = self._parent(new_path)
        file, _ = build_file(new_path, old.geometry, document or Document(None, {}), metadata_room=room, parent=parent)
        try:
            file.copy_access(old.file)
            file.try_lock()
            with closing_on_error(file):
                new = MappedWriter(file, read_superblock(file), durability="publish")
            with contextlib.closing(new):
                kept = self._copy_rows(new, progress)
                unverified = self._copy_published(new) if kept == reach.committed else 0
                if reach.stored and not kept + unverified:
                    troubles = "; ".join(damage.what for damage in self.damages)
                    raise CorruptCacheError(
                        f"{old.path}: {troubles}: not even the first block is sound in every layer; nothing was made",
                        path=old.path,
                        position=0,
                    )
                self._copy_recent(new, kept + unverified)
                tokens = self._copy_tokens(new, kept)
                self._copy_checkpoints(new, kept + unverified)
                restorable = new.checkpoints.last(kept + unverified) if new.geometry.states else kept + unverified
                self._mark(new)
                new.commit(closing=True)
                file.link_to(new_path)
                new.path = new_path
        except BaseException as error:
            file.discard() if file.path != new_path else file.close()
            if type(error) is FileExistsError:
                raise already_exists(new_path) from None
            raise
        return RepairReport(
            path=old.path,
            new_path=new_path,
            first=0 if parent is None else parent.length,
            stored=max(reach.stored, kept),
            seq_len=kept + unverified,
            restorable=restorable,
            unverified=unverified,
            stored_token_len=max(reach.tokens, tokens),
            token_len=tokens,
            metadata="lost" if document is None else "kept" if newest else "earlier",
            damages=self.damages,
            zeroed=self.zeroed,
        )

    def _parent(self, new_path: str) -> Parent | None:
        """Return what the new file continues, as the old one does."""
        parent = read_parent(self.old.file, self.old.superblock)
        folder = os.path.dirname(self.old.path)
        if parent is not None and not os.path.samefile(os.path.dirname(new_path) or ".", folder):
            raise ParentError(
                f"{new_path}: {self.old.path} continues {parent.name}, so what is saved of it has to stand in the same "
                "folder",
                path=new_path,
                actual=os.path.join(folder, parent.name),
            )
        return parent

    # Rows

    def _copy_rows(self, new: MappedWriter, progress: Progress | None) -> int:
        """Copy blocks up to the first that does not match; return the positions copied."""
        size, reach = self.old.geometry.block_tokens, self.reach
        kept, most = 0, max(reach.complete, reach.committed)
        while kept < most:
            block = kept // size
            rows = self._copy_block(new, block)
            if not rows:
                break
            kept += rows
            for layer in new.layers:
                layer.publish(kept)
            if progress:
                progress(kept, most)
            if rows < size:
                break
        return kept

    def _copy_block(self, new: MappedWriter, block: int) -> int:
        """Copy a block of all layers, unpublished; return its positions, 0 if it does not match."""
        size, reach = self.old.geometry.block_tokens, self.reach
        start = block * size
        tail = min(reach.committed - start, size)
        if start + size <= reach.complete and self._copy_layers(new, block, size, counts=tail == size):
            return size
        if 0 < tail < size and self._copy_layers(new, block, tail, counts=True):
            return tail
        return 0

    def _copy_layers(self, new: MappedWriter, block: int, count: int, *, counts: bool) -> bool:
        """Copy the first `count` positions of a block; False if those of some layer don't match.

        Args:
            counts: the last valid commit covers them, so that a mismatch is damage.
        """
        start = block * self.old.geometry.block_tokens
        damages: list[Damage] = []
        zeroed: list[Damage] = []
        for store in new.row_layers:
            layer = store.index
            rows = self.old.rows(layer, start, start + count)
            if not self.old.matches(layer, block, rows):
                what = f"layer {layer}, positions [{start}, {start + count}): checksum does not match"
                damage = Damage(what, layer, start, start + count)
                damages.append(damage)
                if not counts or (layer, block) not in self.zero:
                    continue
                zeroed.append(damage)
                rows = zero_rows(store.geometry, count)
            if len(damages) == len(zeroed):
                store.write(start, rows)
        if counts:
            self.damages += damages
        if len(damages) > len(zeroed):
            return False
        self.zeroed += zeroed
        return True

    def _copy_published(self, new: MappedWriter) -> int:
        """Copy what was published and never committed; return how many positions."""
        start, stop = self.reach.committed, self.reach.published
        for first in range(start, stop, self.old.geometry.block_tokens):
            last = min(first + self.old.geometry.block_tokens, stop)
            for store in new.row_layers:
                store.write(first, self.old.rows(store.index, first, last))
            for store in new.layers:
                store.publish(last)
        return stop - start

    def _copy_recent(self, new: MappedWriter, length: int) -> None:
        """Copy what holds of the rows in 16 bits; what does not costs nothing but exactness."""
        for number, layer in enumerate(new.layers):
            rows = RecentRows.of(self.old.geometry, number)
            if rows is not None:
                LayerRecords(self.old.superblock, number).load(rows, layer.slabs().part, length, self.old.read)
                layer.take_recent(rows, 0, length)

    def _copy_checkpoints(self, new: MappedWriter, length: int) -> None:
        """Copy the checkpoints that match their checksums, up to a length."""
        for entry, slot in self.old.checkpoints():
            found = self.old.read_checkpoint(slot, entry)
            if isinstance(found, str):
                what = f"checkpoint at position {entry.position}: {found}"
                self.damages.append(Damage(what, None, entry.position, entry.position))
            elif entry.position <= length:
                new.checkpoints.write(entry.position, found)
                new.checkpoints.name_staged(pin=entry.pinned)

    # Token ids

    def _copy_tokens(self, new: MappedWriter, kept: int) -> int:
        """Copy token ids up to the first block of them that does not match; return how many."""
        old, size = self.old, self.old.geometry.block_tokens
        track, most = old.geometry.num_layers, self.reach.tokens
        if not old.slots:  # how many were recorded is unknown: take complete blocks that match
            most = kept - kept % size
        done = 0
        while done < most:
            block, stop = done // size, min(done + size, most)
            ids = old.tokens(done, stop)
            if not old.matches(track, block, [ids]):
                damage = Damage(f"token ids, positions [{done}, {stop}): checksum does not match", None, done, stop)
                if old.slots:
                    self.damages.append(damage)
                if (None, block) not in self.zero:
                    break
                self.zeroed.append(damage)
                ids = np.full(stop - done, NO_TOKEN, np.int32)
            new.write_tokens(done, ids)
            done = stop
        for damage in self.zeroed:  # rows of zeros must not pass for those of their tokens
            if damage.start is not None and damage.stop is not None and damage.start < done:
                new.write_tokens(damage.start, np.full(min(damage.stop, done) - damage.start, NO_TOKEN, np.int32))
        new.publish_tokens(min(done, kept))
        return min(done, kept)

    def _mark(self, new: MappedWriter) -> None:
        """Write into the new file's metadata which blocks hold zeros."""
        if self.zeroed:
            before = new.document
            zeroed = [{"layer": one.layer, "start": one.start, "stop": one.stop} for one in self.zeroed]
            new.set_document(Document(before.model, {**before.metadata, MARK: {"zeroed": zeroed}}))
