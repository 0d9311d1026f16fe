"""The storage contract: what layers and caches are written against, and what a storage implements.

A storage implements `LayerStore.rows` and `LayerStore.write`, names that class as its `layer_type`, and implements
`Storage.commit`, which stores rows, token ids and metadata where they outlive the process, if it has such a place.
Everything else has a default, to be overridden where a storage can do better.

An append calls `begin` (check permission and room), then `stage` and `write` any number of times, then `publish`.
Nothing is visible to anyone before `publish`.

A read takes the `version` first, then the length, then the rows, and then calls `validate(version)`. Other threads may
append, truncate, refresh and close through the same handle meanwhile. A truncating thread lowers the lengths, then
changes the version, and only then may overwrite rows (a seqlock), so a read of a length and rows that do not belong
together fails validation.
"""

from __future__ import annotations

import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from ..attention.source import Ranges, Unread
from ..format import NO_TOKEN
from ..geometry import CacheGeometry, LayerGeometry
from ..metadata import Document
from ..ranges import check_room
from ..rows import Rows as Rows
from .checkpoints import Checkpoints, MemoryCheckpoints
from .locks import Lock
from .recent_store import RecentStore
from .refusals import closed_error, refuse_truncated
from .step_store import StepStore
from .verify_report import Damage as Damage
from .verify_report import VerifyReport as VerifyReport
from .verify_report import damaged_record as damaged_record

Verify = Literal["read", "open", "none"]
"""When rows are compared with their checksums automatically: each block when a handle first reads it; all of them on
opening, if the machine crashed while a writer had the file open; or never."""

Durability = Literal["publish", "commit"]
"""When an append survives power loss: at the next `flush` or `close`, or when the call returns."""

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in total)."""

STAGE_BYTES = 2 * 1024 * 1024
"""Rows that `LayerStore.stage` allocates at most, by default."""


class LayerStore(RecentStore, StepStore, ABC):
    """The rows of one layer in a storage.

    Args:
        storage: the storage that the layer belongs to. The layer does not keep it alive.
        index: the layer's number.
    """

    in_memory: ClassVar[bool] = False
    """True if any rows can be returned as views at no cost. Otherwise callers use `iter_rows`."""

    in_extents: ClassVar[bool] = False
    """True if all rows can be returned as views, but not in one: `extents` returns them."""

    geometry: LayerGeometry
    capacity: int
    length: int
    """Positions stored, as this handle sees them."""

    _storage: Storage

    def __init__(self, storage: Storage, index: int) -> None:
        self._bind(storage, index, storage.geometry)
        self.length = 0

    def _bind(self, storage: Storage, index: int, geometry: CacheGeometry) -> None:
        """Initialise all but the length, for layers that keep that elsewhere."""
        RecentStore.__init__(self, geometry, index)
        self.geometry = geometry.layers[index]
        self.capacity = geometry.capacity
        # No reference cycle: a writer that is dropped without `close` releases its lock at once.
        self._storage = weakref.proxy(storage)

    # A storage implements these two

    @abstractmethod
    def rows(self, start: int, stop: int) -> Rows:
        """Return stored positions [start, stop), read-only: views where they are contiguous in memory, else a copy."""

    @abstractmethod
    def write(self, start: int, rows: Rows) -> None:
        """Write rows from position `start` on. They become part of the layer with `publish`.

        Rows that `stage` did not return are borrowed: the caller does not modify them before the next commit.
        """

    # Appending

    def begin(self, count: int) -> int:
        """Check that `count` positions may be appended, and return the position of the first.

        Raises:
            CapacityExceededError, ReadOnlyError, ClosedError: they may not.
        """
        self._storage.check_writable()
        check_room(self.length, count, self.capacity, layer=self.index)
        return self.length

    def stage(self, start: int, count: int) -> Rows:
        """Return a buffer for at most `count` positions from `start` on, at least one, to quantise into."""
        most = max(1, STAGE_BYTES // self.geometry.position_bytes)
        return Rows.empty(self.geometry, min(count, most))

    def publish(self, length: int) -> None:
        """Make everything below `length` part of the layer."""
        self.length = length

    # Reading

    def slabs(self) -> Rows:
        """Return read-only views of all rows, over the whole capacity where the storage has it; a copy where rows are
        not in memory."""
        return self.rows(0, self.length)

    def extents(self) -> Sequence[tuple[int, Rows]]:
        """Return read-only views of all rows, each with its first position, in order; the last one over the rest of the
        capacity. Each covers the positions up to the next one's first, and may cover more."""
        return [(0, self.slabs())]

    def iter_rows(self, start: int, stop: int) -> Iterator[Rows]:
        """Yield stored positions [start, stop) in parts, as they are stored. Later parts may be fetched meanwhile."""
        yield self.rows(start, stop)

    def scan(self, start: int, stop: int) -> Iterator[Rows]:
        """As `iter_rows`, and release the memory of each part when the next is asked for."""
        return self.iter_rows(start, stop)

    def is_verified(self, stop: int) -> bool:
        """True if `ensure_verified` would have nothing to do for stored positions [0, stop)."""
        return True

    def ensure_verified(self, ranges: NDArray[np.int64], threads: int = 1) -> None:
        """Compare the blocks of positions that the caller will read through `slabs` with their checksums, where this
        handle has not done so before. `rows`, `iter_rows` and `scan` do it themselves.

        Args:
            ranges: [k, 2], each (start, stop).
            threads: at most so many hash.

        Raises:
            CorruptCacheError: a block does not match.
        """

    def unread_blocks(self, ranges: Ranges) -> Sequence[Unread | None]:
        """Return what `ensure_verified` would compare, for attention to compare the checksums as it reads the rows.
        The caller notes what matched; where something differs it verifies, and discards what it has computed.

        Args:
            ranges: [k, 2], each (start, stop).

        Returns:
            An entry for each of `extents`; None where nothing is left to compare.
        """
        return [None] * len(self.extents())

    def prefetch(self, start: int, stop: int) -> None:
        """Start fetching stored positions [start, stop), where that takes time."""

    def release(self, start: int, stop: int) -> None:
        """Free the memory of stored positions [start, stop), where they can be read again."""

    # Validation

    def version(self) -> int:
        """Return the version of what is stored. Take it before the length."""
        return self._storage.version()

    def validate(self, version: int) -> None:
        """Raise if what was read since `version` can't be used: the storage was closed, or positions were truncated."""
        self._storage.validate(version)

    def check(self) -> None:
        """Raise if the storage was closed, or positions that this handle counts on were truncated."""
        self._storage.check()


class Storage(ABC):
    """All layers of a cache, with its token ids, metadata and commits.

    By default token ids and metadata are kept in memory, and nothing has checksums.

    Args:
        geometry: the shapes of all layers.
        document: model and metadata.
        path: path or URL; None in memory.
    """

    kind: ClassVar[str] = "storage"
    """Name of the kind of storage, for `inspect`."""

    layer_type: ClassVar[type[LayerStore] | None] = None
    """Class of the layers, which are made with the storage; None for a storage that sets `layers` itself."""

    writable: bool = True

    geometry: CacheGeometry
    path: str | None
    lock: Lock
    """Held during every append, so that appends of several threads follow one another."""
    layers: Sequence[LayerStore]
    checkpoints: Checkpoints
    """Checkpoints of the states, none of them beyond the last position."""
    rows_beyond: int = 0
    """Positions with rows that were left out on opening, because no checkpoint has their states."""
    token_len: int
    """Positions, from 0, whose token ids are recorded."""
    _row_layers: Sequence[LayerStore] | None = None  # a cached property would make every attribute slower to reach

    def __init__(self, geometry: CacheGeometry, document: Document | None = None, path: str | None = None) -> None:
        self.geometry = geometry
        self.path = path
        self.lock = threading.RLock()
        self.token_len = 0
        self.checkpoints = MemoryCheckpoints(geometry, path)
        self._notes = document or Document(None, {})
        self._token_ids = np.full(geometry.capacity, NO_TOKEN, np.int32)
        self._truncations = 0
        self._closed = False
        if self.layer_type is not None:
            self.layers = [self.layer_type(self, index) for index in range(geometry.num_layers)]

    @property
    def row_layers(self) -> Sequence[LayerStore]:
        """The layers that have rows; at least one. Those without are as long as these."""
        found = self._row_layers
        if found is None:
            found = self._row_layers = [self.layers[number] for number in self.geometry.row_layers]
        return found

    # A storage implements this

    @abstractmethod
    def commit(self) -> None:
        """Make all positions that are complete in every layer survive power loss, as far as the storage can."""

    # State

    @property
    def seq_len(self) -> int:
        """Positions that are complete in every layer that has rows."""
        return min([layer.length for layer in self.row_layers])

    @property
    def closed(self) -> bool:
        """True after `close`."""
        return self._closed

    def check(self) -> None:
        """Raise if the storage was closed, or positions that this handle counts on were truncated."""
        if self.closed:
            raise closed_error(self.path)

    def check_writable(self) -> None:
        """Raise unless this handle may append."""
        self.check()

    def version(self) -> int:
        """As `LayerStore.version`."""
        return self._truncations

    def validate(self, version: int) -> None:
        """As `LayerStore.validate`."""
        self.check()
        if self._truncations != version:
            refuse_truncated(self.path)

    def refresh(self) -> bool:
        """Look for what other processes have published; True if there is anything new."""
        self.check()
        return False

    # Metadata and token ids

    @property
    def document(self) -> Document:
        """Model and metadata, with changes that are not committed yet."""
        return self._notes

    def set_document(self, document: Document) -> None:
        """Replace model and metadata, as part of the next commit.

        Raises:
            MetadataError: not plain JSON, or too large for the storage.
        """
        self.check_writable()
        document.encode()
        self._notes = document

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        """Write token ids from position `start` on. `publish_tokens` records them."""
        self._token_ids[start : start + len(ids)] = ids

    def publish_tokens(self, length: int) -> None:
        """Record the token ids of all positions below `length`."""
        self.token_len = length

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        """Return a copy of the first `count` recorded token ids."""
        return self._token_ids[:count].copy()

    # Appending

    def publish_step(self, length: int) -> None:
        """Make everything below `length` part of every layer or, if interrupted (Ctrl-C), of none."""
        try:
            for layer in self.layers:
                layer.publish(length)
        except BaseException:
            self.truncate(self.seq_len)
            raise

    def resume(self) -> int:
        """Truncate to the last checkpoint, where there are states: positions beyond it can't be continued.

        Returns:
            The positions that were dropped.
        """
        length = self.seq_len
        last = self.checkpoints.last(length) if self.geometry.states else length
        if last < length:
            self.truncate(last)
            self.rows_beyond = length - last
        return length - last

    def appended(self) -> None:
        """Called after each published append. Commits, if the storage is to commit every append."""

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions, durably as far as they were committed."""
        with self.lock:
            self.check_writable()
            self._lower(length)
            self.commit()

    def _lower(self, length: int) -> None:
        """Lower what this handle counts to `length` positions, and change the version."""
        for layer in self.layers:
            layer.length = min(layer.length, length)
            layer.forget_recent(layer.length)
        self.token_len = min(self.token_len, length)
        self.checkpoints.cut(length)
        self._truncations += 1

    def close(self) -> None:
        """Commit, if this handle writes, and release everything but views; does nothing the second time."""
        with self.lock:
            if not self.closed:
                try:
                    if self.writable:
                        self.commit()
                finally:
                    self._closed = True

    # Checksums

    @property
    def committed_len(self) -> int:
        """Positions that checksums cover."""
        return 0

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        """Return the checksums of blocks [first, stop), u64 [stop - first, num_layers]. The last may be incomplete."""
        return np.zeros((0, self.geometry.num_layers), np.uint64)

    def verify_rows(self, start: int, stop: int) -> None:
        """Compare the committed blocks of positions [start, stop) with their checksums, unless every read does.

        Raises:
            CorruptCacheError: a block does not match.
        """

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Compare every committed block with its checksum."""
        self.check()
        return VerifyReport(path=self.path, seq_len=self.seq_len, verified=0)

    # Description

    def identity(self) -> str | None:
        """Return a name of the cache and its generation, if it has one: as long as it is the same, so are positions."""
        return None

    def facts(self) -> dict[str, Any]:
        """Return what `inspect` shows of the storage itself."""
        return {"kind": self.kind}
