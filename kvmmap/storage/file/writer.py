"""The one writer of a `.kvm` file: create, append and publish, truncate. Commits are in `committer`.

Publishing writes data, then the length. Truncating below a commit writes the shorter commit to both slots, then lowers
lengths, then bumps the generation, and only then may rows be overwritten.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError, KvmmapError
from ...format import Parent, Section
from ...geometry import CacheGeometry
from ...metadata import Document
from ..posix import closing_on_error
from ..protocols import Durability, Verify
from .committer import Committer
from .file_sketches import Kept
from .placement import METADATA_ROOM, already_exists, build_file, lock_file, place_of, replace_file
from .verify import check_blocks, check_tokens
from .writer_layer import ScratchRows, WriterLayer


class MappedWriter(Committer):
    """A `.kvm` file open for appending. Holds the writer's lock until it is closed or the process ends."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._publishing = False
        """True while a step is being published: interrupted, it is no part of the cache."""
        self._truncating: int | None = None
        """The length that a truncation lowers to, until it is complete."""
        super().__init__(*arguments, **options)

    # Opening

    @classmethod
    def open_locked(
        cls,
        path: str,
        *,
        timeout: float,
        durability: Durability = "publish",
        recover: bool = False,
        verify: Verify = "read",
        record_use: bool = False,
    ) -> MappedWriter:
        """Open for appending, waiting up to `timeout` seconds for another writer to finish."""
        file, superblock = lock_file(path, timeout)
        with closing_on_error(file):
            return cls(file, superblock, durability=durability, recover=recover, verify=verify, record_use=record_use)

    @classmethod
    def create(
        cls,
        path: str,
        geometry: CacheGeometry,
        document: Document,
        *,
        durability: Durability = "publish",
        overwrite: bool = False,
        timeout: float = 0,
        metadata_room: int = METADATA_ROOM,
        parent: Parent | None = None,
        durable: bool = True,
    ) -> MappedWriter:
        """Make a new file, put it at `path` whole, and hold it for appending.

        Args:
            path, geometry, document, durability, overwrite, timeout, metadata_room: as in `kvmmap.create`.
            parent: the file that it continues.
            durable: False: the first commit makes the file and its name durable, and nothing is synced before.
        """
        path = place_of(path, overwrite=overwrite)
        file, superblock = build_file(
            path, geometry, document, metadata_room=metadata_room, parent=parent, durable=durable
        )
        try:
            file.try_lock()
            if overwrite and os.path.lexists(path):
                replace_file(file, path, timeout)
            else:
                file.link_to(path, durable=durable)
            writer = cls(file, superblock, durability=durability)
            writer.durable = durable
            return writer
        except BaseException as error:
            if file.path != path:
                file.discard()
            else:
                file.close()
            if isinstance(error, FileExistsError) and not isinstance(error, KvmmapError):
                raise already_exists(path) from None
            raise

    _scratch: ScratchRows | None = None

    def _make_layer(self, number: int) -> WriterLayer:
        if self._scratch is None:
            self._scratch = ScratchRows(self.geometry.capacity)
        return WriterLayer(self, number, self.mapped, self.holder, self.first_reads, self._scratch)

    # Appending

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        offset = self.superblock.section(Section.TOKEN_IDS).offset + 4 * start
        self.file.write((offset,), (np.ascontiguousarray(ids, "<i4"),))

    def publish_tokens(self, length: int) -> None:
        try:
            self.live.put("token_len", length)
            self.token_len = length
        except BaseException:
            self.interrupt()
            raise

    def publish_step(self, length: int) -> None:
        # Before anything is published, so that an interruption at any point finds it noted.
        self._publishing = True
        state = self._state
        self.interrupt()
        try:
            for layer in self.row_layers:
                layer.publish(length)
            self._publishing = False
            self._state = state
        except BaseException:
            self._reload()  # at once: callers that catch the error read the lengths, and continue from them
            raise

    def appended(self) -> None:
        if self._durability == "commit":
            self.commit()

    def use_checksums(self, length: int, sums: NDArray[np.uint64]) -> None:
        """Use precomputed checksums for what is appended since the last commit, instead of hashing.

        They must be those of the rows that were meant to be written: other rows are detected when they are read.

        Args:
            length: what they cover, and the next commit with them.
            sums: u64 [blocks, num_layers], from the block that the last commit ends in.
        """
        self._checksums.use_precomputed(length, sums)

    def write_sketches(self, first: int, stop: int, kept: Mapping[int, Kept]) -> None:
        """Write the sketches of blocks [first, stop), whose rows came from elsewhere with their checksums: see
        `SketchWriter.write`."""
        self._sketches.write(first, stop, kept)

    def write_sketches_ahead(self, layer: int, stop: int, kept: Kept | None = None) -> None:
        """Write the sketches of a layer's blocks below `stop` before they are committed: see `SketchWriter`."""
        self._sketches.write_ahead(layer, stop, kept)

    # Truncating

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; durable on return as far as they were committed."""
        with self.lock:
            self.check_writable()
            slot = self.snapshot.slot
            if length < slot.seq_len or length < slot.token_len:
                self._verify_block(length)
                self._sync_name()
                tokens = min(slot.token_len, length)
                self._note_verified(min(slot.seq_len, length), tokens)
                state = self._state
                self.interrupt()  # until the commit is complete: the rewound checksums may not fit the file
                self._rewind(length, tokens)
                # Both slots: the older one covers rows that are about to be overwritten.
                self._commit(length, tokens, self._generation + 2, closed=False, both=True)
                self._state = state
            try:
                self._roll_back(length)
            except BaseException:
                self._reload()  # at once, as in `publish_step`
                raise

    def _roll_back(self, length: int) -> None:
        """Lower the lengths. The generation is even meanwhile, so that the next writer, if this one dies, knows that
        some may be lower than readers have seen them."""
        try:
            self._truncating = length
            self.live.put("generation", self._generation + 1)
            self.checkpoints.cut(length)
            for layer in self.row_layers:
                layer.publish(min(layer.length, length))
            self.publish_tokens(min(self.token_len, length))
            holder = self.holder
            holder.inherited_len = min(holder.inherited_len, length)
            holder.inherited_tokens = min(holder.inherited_tokens, length)
            verified = self.snapshot.verified
            self._change_generation(self._generation + 2, verified and verified.cut(length))
            self._truncating = None
        except BaseException:
            self.interrupt()
            raise

    def _reload(self) -> None:
        super()._reload()
        if self._publishing:
            self._truncating = self.seq_len
            self._publishing = False
        if self._truncating is not None:
            self._roll_back(self._truncating)

    def _verify_block(self, length: int) -> None:
        """Verify the block that a truncation cuts, because it gets a new checksum."""
        size, slot = self.geometry.block_tokens, self.snapshot.slot
        if length % size:
            block = length // size
            damages = [
                *check_blocks(self.mapped, block, block + 1, slot),
                *check_tokens(self.mapped, slot, block, block + 1),
            ]
            for damage in damages:
                raise CorruptCacheError(
                    f"{self.path}: {damage.what}; nothing was truncated: truncate({length // size * size}) leaves "
                    "the damaged block out",
                    path=self.path,
                    layer=damage.layer,
                    position=damage.start,
                )
