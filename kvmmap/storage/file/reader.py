"""A `.kvm` file mapped for reading: open, read, refresh, close. `writer` extends it for appending.

A reader takes no lock and never waits. It sees a snapshot: the positions that were complete in every layer when it was
opened or last refreshed. Several threads may share a handle.
"""

from __future__ import annotations

import os
import weakref
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, CorruptCacheError, ReadOnlyError
from ...format import FORMAT_VERSION, Slot, Superblock
from ...metadata import Document
from ..checkpoints import Checkpoints
from ..on_demand import OnDemand
from ..posix import PosixFile, closing_on_error
from ..protocols import LayerStore, Progress, Verify, VerifyReport
from ..readonly import ReadOnlyStorage
from ..rowless import RowlessLayer
from .checkpoints import FileCheckpoints
from .first_read import FirstReads, verify_tokens
from .last_use import UseRecorder, last_use_ns
from .live_record import LiveRecord
from .mapped_file import MappedFile, open_file, read_parent, read_superblock
from .reader_layer import MappedLayer
from .snapshot import Snapshot, SnapshotHolder
from .unread_blocks import WHAT_TO_DO
from .verify import check_blocks, verify_file


class MappedReader(ReadOnlyStorage):
    """An open `.kvm` file. Of one that continues a parent it shows its own positions, counted from 0."""

    writable = False

    def __init__(
        self,
        file: PosixFile,
        superblock: Superblock,
        *,
        recover: bool = False,
        verify: Verify = "read",
        record_use: bool = False,
    ) -> None:
        self.mapped = MappedFile(file, superblock, writable=self.writable, rows_needed=self.writable or record_use)
        self.path: str = file.path
        self.geometry = superblock.geometry
        self.lock = self.mapped.lock
        self.superblock = superblock
        self.parent = read_parent(file, superblock)
        self.file = file
        self._verify = verify
        use = UseRecorder(file) if record_use else None
        self.holder = SnapshotHolder(self.mapped, recover=recover, verify=verify == "read", use=use)
        self.first_reads = FirstReads(self.mapped, self.holder)
        self.checkpoints: Checkpoints = FileCheckpoints(self.mapped, self.holder)
        self._length = 0
        """Length of layers that have not been made."""
        self.layers: OnDemand[LayerStore] = self._layers_on_demand()
        self.token_len = 0
        self._document: tuple[Slot, Document] | None = None
        self._show(self.holder.current)
        if verify == "open" and not self._closed_cleanly():
            self._refuse_damage()
        self.holder.note_use()

    @classmethod
    def open(
        cls, path: str, *, recover: bool = False, verify: Verify = "read", record_use: bool = False
    ) -> MappedReader:
        """Open a file for reading.

        Args:
            path: of the file.
            recover: use commits alone.
            verify: as in `kvmmap.open`.
            record_use: reading through this handle is a use of the cache, and sets the time of its last use.
        """
        with closing_on_error(open_file(path, writable=False, used=record_use)) as file:
            return cls(file, read_superblock(file), recover=recover, verify=verify, record_use=record_use)

    def _layers_on_demand(self) -> OnDemand[LayerStore]:
        me = weakref.proxy(self)  # no reference cycle: see `LayerStore`
        return OnDemand(self.geometry.num_layers, lambda number: me._new_layer(number), self.lock)

    def _new_layer(self, number: int) -> LayerStore:
        if not self.geometry.layers[number].has_rows:
            return RowlessLayer(self, number)
        layer = self._make_layer(number)
        layer.length = self._length
        return layer

    def _make_layer(self, number: int) -> MappedLayer:
        return MappedLayer(self, number, self.mapped, self.holder, self.first_reads)

    def mapped_layer(self, number: int) -> MappedLayer:
        """Return a layer that has rows."""
        layer = self.layers[number]
        assert isinstance(layer, MappedLayer)
        return layer

    def _closed_cleanly(self) -> bool:
        """False after a machine crash or a failed sync while a writer had the file open."""
        return self.snapshot.live or (self.snapshot.slot.closed and not self.live.in_use())

    def _refuse_damage(self) -> None:
        report = self.verify()
        for damage in report.damages:
            more = f" (and {len(report.damages) - 1} more)" if len(report.damages) > 1 else ""
            raise CorruptCacheError(
                f"{self.path}: was not closed, and is damaged: {damage.what}{more}. {WHAT_TO_DO}",
                path=self.path,
                layer=damage.layer,
                position=damage.start,
            )

    # State

    @property
    def seq_len(self) -> int:
        lengths = [layer.length for layer in self.layers.made() if layer.geometry.has_rows]
        if len(lengths) < len(self.geometry.row_layers):
            lengths.append(self._length)
        return min(lengths)

    @property
    def snapshot(self) -> Snapshot:
        """The current snapshot."""
        return self.holder.current

    @property
    def live(self) -> LiveRecord:
        """The live record."""
        return self.mapped.live

    @property
    def closed(self) -> bool:
        return self.mapped.closed

    def check(self) -> None:
        self.validate(self.version())

    def version(self) -> int:
        return self.holder.version()

    def validate(self, version: int) -> None:
        self.holder.validate(version)

    def refuse_write(self) -> NoReturn:
        self.check()
        raise ReadOnlyError(f'{self.path}: is open for reading; kvmmap.open(path, mode="a") appends', path=self.path)

    def _show(self, snapshot: Snapshot) -> None:
        """Make a snapshot this handle's view: positions complete in every layer."""
        length = min(snapshot.lengths)
        if snapshot.checkpoints:
            length = self._continuable(snapshot)
        self._length = length
        for layer in self.layers.made():
            layer.length = length
        self.token_len = min(snapshot.token_len, length)
        # Last: a read in another thread then has the version of the lengths before, or the lengths of this one.
        self.holder.current = snapshot

    def _continuable(self, snapshot: Snapshot) -> int:
        """Return the positions up to the last checkpoint: those beyond it have rows, and no states to continue with."""
        length = min(snapshot.lengths)
        last = max([entry.position for entry in snapshot.checkpoints if entry.position <= length] + [0])
        self.rows_beyond = length - last
        return last

    def refresh(self) -> bool:
        """Update the snapshot; True if there is more or less than before, or another commit.

        Raises:
            CacheChangedError: another file has taken this one's place.
        """
        with self.lock:
            if self.superseded():
                raise CacheChangedError(
                    f"{self.path}: was replaced by a new file (resized or compacted); open it again",
                    path=self.path,
                )
            if self.mapped.copied_up():
                raise CacheChangedError(
                    f"{self.path}: overlayfs copied it to its upper layer for a writer, and this handle maps the "
                    "original; open it again",
                    path=self.path,
                )
            return self.look()

    def look(self) -> bool:
        """As `refresh`, whether or not another file has taken this one's place."""
        with self.lock:
            before = self.snapshot
            self._show(self.holder.look(before))
            return self.snapshot != before

    def superseded(self) -> bool:
        """True if another file stands at the path in this one's place."""
        if self.live.get("superseded") == 1:
            return True
        # The word is set right after the replacement; if its setter died in between, the name tells. (A process that
        # was forked from a writer has closed the file, and has the word alone.)
        return not self.file.closed and self.mapped.status().st_nlink == 0 and os.path.exists(self.path)

    # Contents

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        verify_tokens(self.mapped, self.holder, count)
        return self.mapped.token_ids()[:count].copy()

    @property
    def document(self) -> Document:
        slot, known = self.snapshot.slot, self._document
        if known is None or known[0] is not slot:
            known = self._document = slot, self.mapped.document(slot)
        return known[1]

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        self.check()
        return verify_file(self.mapped, self.holder, self.seq_len, progress)

    @property
    def committed_len(self) -> int:
        return self.snapshot.slot.seq_len

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        return self.mapped.checksums(self.snapshot.slot, first, stop)

    def verify_rows(self, start: int, stop: int) -> None:
        if self._verify == "read":
            return
        size, slot = self.geometry.block_tokens, self.snapshot.slot
        for damage in check_blocks(self.mapped, start // size, -(-min(stop, slot.seq_len) // size), slot):
            raise CorruptCacheError(
                f"{self.path}: {damage.what}", path=self.path, layer=damage.layer, position=damage.start
            )

    # Description

    def identity(self) -> str | None:
        return f"{self.superblock.file_id.hex()}/{self.live.get('generation')}"

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` shows of the file."""
        with self.lock:
            slot, live = self.snapshot.slot, self.live
            status = self.mapped.status()
            return {
                "kind": "kvm",
                "format_version": FORMAT_VERSION,
                "file_bytes": status.st_size,
                "disk_bytes": status.st_blocks * 512,
                "created_ns": self.superblock.created_ns,
                "commit_sequence": slot.sequence,
                "committed_len": slot.seq_len,
                "commit_ns": slot.commit_ns,
                "generation": live.get("generation"),
                "state": self._describe_state(),
                "writer_pid": max(live.get("writer_pid"), 0) if live.in_use() else 0,
                "last_use_ns": last_use_ns(self.file),
            }

    def _describe_state(self) -> str:
        if not self.live.in_use():
            return "closed" if self.snapshot.slot.closed else "interrupted"
        return "open for writing" if self.live.trusted() else "interrupted"

    def close(self) -> None:
        """Close the file. Views that were returned keep their pages mapped until they are dropped themselves."""
        with self.lock:
            if not self.closed:
                self.mapped.close()
                for layer in self.layers.made():
                    if isinstance(layer, MappedLayer):
                        layer.forget_map()
