"""A chain of files as one storage: the first positions of other files, and then those of the cache's own.

Reading goes to whichever file has a position; appending, commits and metadata are the own file's alone. The files
before it are open for reading, and may have writers of their own: only their first positions count, and `Ancestor`
checks that these stay what they were.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, CorruptCacheError, PositionOutOfRangeError
from ...format import NO_TOKEN
from ...metadata import Document
from ..checkpoints import Checkpoints
from ..checksums import digest
from ..on_demand import OnDemand
from ..protocols import LayerStore, Progress, Storage, VerifyReport
from ..rowless import RowlessLayer
from .ancestor import Ancestor, counted_from
from .chain_checkpoints import ChainCheckpoints
from .chain_layer import ChainLayer
from .chain_verify import verify_chain, verify_needed
from .committer import Committer
from .first_read import verify_tokens
from .reader import MappedReader


class ChainStorage(Storage):
    """A chain of `.kvm` files.

    Args:
        own: the cache's own file, for reading or appending.
        ancestors: the files before it, from the first on; at least one.
    """

    kind = "kvm"

    def __init__(self, own: MappedReader, ancestors: Sequence[Ancestor]) -> None:
        self.own = own
        self.ancestors = tuple(ancestors)
        self.base = ancestors[-1].record.length
        """Positions before the own file's."""
        self.geometry = dataclasses.replace(own.geometry, capacity=self.base + own.geometry.capacity)
        self.path: str = own.path
        self.lock = own.lock
        self.writable = own.writable
        self._admit: Callable[[int], int] | None = None
        me = weakref.proxy(self)  # no reference cycle: see `LayerStore`
        self.layers: OnDemand[LayerStore] = OnDemand(own.geometry.num_layers, lambda number: me._make(number), own.lock)
        self.checkpoints: Checkpoints = ChainCheckpoints(self.geometry, self.path, own, self.base)

    def _make(self, number: int) -> LayerStore:
        if not self.geometry.layers[number].has_rows:
            return RowlessLayer(self, number)
        return ChainLayer(self, self.own.mapped_layer(number), self.ancestors)

    @property
    def seq_len(self) -> int:
        return self.base + self.own.seq_len

    @property
    def rows_beyond(self) -> int:
        """As the contract says."""
        return self.own.rows_beyond

    @rows_beyond.setter
    def rows_beyond(self, count: int) -> None:
        self.own.rows_beyond = count

    @property
    def token_len(self) -> int:
        """Positions whose token ids are recorded. Those before the own file's can't be recorded any more."""
        return self.base + self.own.token_len

    @token_len.setter
    def token_len(self, length: int) -> None:
        self.own.token_len = max(0, length - self.base)

    # State

    @property
    def closed(self) -> bool:
        return self.own.closed

    def check(self) -> None:
        self.own.check()

    def check_writable(self) -> None:
        self.own.check_writable()

    def version(self) -> int:
        for ancestor in self.ancestors:
            if ancestor.changed:
                ancestor.settle()
        return self.own.version()

    def validate(self, version: int) -> None:
        self.own.validate(version)
        for ancestor in self.ancestors:
            ancestor.reader.holder.note_use()
            if ancestor.changed and not ancestor.settle():
                raise CacheChangedError(
                    f"{self.path}: its parent {ancestor.reader.path} was truncated during the read: read again",
                    path=self.path,
                    actual=ancestor.reader.path,
                )

    def refresh(self) -> bool:
        for ancestor in self.ancestors:
            if ancestor.changed:
                ancestor.settle()
        return self.own.refresh()

    # Metadata and token ids

    @property
    def document(self) -> Document:
        return self.own.document

    def set_document(self, document: Document) -> None:
        self.own.set_document(document)

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        self.own.write_tokens(start - self.base, ids)

    def publish_tokens(self, length: int) -> None:
        self.own.publish_tokens(length - self.base)

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        ids = np.full(count, NO_TOKEN, np.int32)
        for ancestor in self.ancestors:
            stop = min(ancestor.tokens, count - ancestor.base)
            if stop > 0:
                ids[ancestor.base : ancestor.base + stop] = _ancestor_tokens(ancestor, stop)
        if count > self.base:
            with counted_from(self.base):
                ids[self.base :] = self.own.read_tokens(count - self.base)
        return ids

    # Appending

    @property
    def admitted(self) -> int:
        """As that of the own file, counted over the chain: see `Committer`."""
        return self.base + self._writer.admitted

    @admitted.setter
    def admitted(self, length: int) -> None:
        self._writer.admitted = length - self.base

    @property
    def admit(self) -> Callable[[int], int] | None:
        """As that of the own file, counted over the chain: see `Committer`."""
        return self._admit

    @admit.setter
    def admit(self, admit: Callable[[int], int] | None) -> None:
        self._admit = admit
        self._writer.admit = None if admit is None else functools.partial(_admit_own, admit, self.base)

    @property
    def _writer(self) -> Committer:
        assert isinstance(self.own, Committer)
        return self.own

    def publish_step(self, length: int) -> None:
        try:
            self.own.publish_step(length - self.base)
        except BaseException:
            self._forget_recent(self.seq_len)
            raise

    def _forget_recent(self, length: int) -> None:
        """Forget the rows in 16 bits of positions that were truncated; the own file has done so with its own."""
        for layer in self.layers.made():
            layer.forget_recent(length)

    def appended(self) -> None:
        self.own.appended()

    def commit(self) -> None:
        self.own.commit()

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions. Those of other files can't be dropped here.

        Raises:
            PositionOutOfRangeError: `length` is below the own file's first position.
        """
        if length < self.base:
            self.check_writable()
            nearest = self.ancestors[-1].reader.path
            raise PositionOutOfRangeError(
                f"{self.path}: its first {self.base} positions are those of its parent {nearest}, and can't be "
                f"truncated here; kvmmap.create(NEW_PATH, parent=..., parent_length={length}) continues from {length}",
                position=length,
                actual=self.base,
                path=self.path,
            )
        try:
            self.own.truncate(length - self.base)
        finally:
            self._forget_recent(self.seq_len)

    def close(self) -> None:
        with self.lock:
            try:
                self.own.close()
            finally:
                for layer in self.layers.made():
                    if isinstance(layer, ChainLayer):
                        layer.forget_maps()
                for ancestor in self.ancestors:
                    ancestor.reader.close()

    # Checksums

    @property
    def committed_len(self) -> int:
        return self.base + self.own.committed_len

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        """As the contract says; computed from verified rows, since each file has those of its own blocks."""
        return self._digests(first, stop, self.committed_len)

    def block_checksums(self, length: int) -> NDArray[np.uint64]:
        """Return the checksums that one whole file of the first `length` positions has, u64 [blocks, num_layers]."""
        return self._digests(0, -(-length // self.geometry.block_tokens), length)

    def _digests(self, first: int, stop: int, length: int) -> NDArray[np.uint64]:
        size = self.geometry.block_tokens
        sums = np.zeros((stop - first, self.geometry.num_layers), np.uint64)
        for block in range(first, stop):
            start, end = block * size, min((block + 1) * size, length)
            for layer in self.layers:
                rows = layer.rows(start, end)
                sums[block - first, layer.index] = digest(rows, layer.index, block, 0, end - start)
        return sums

    def verify_rows(self, start: int, stop: int) -> None:
        for ancestor in self.ancestors:
            low, high = max(0, start - ancestor.base), min(stop - ancestor.base, ancestor.count)
            if low < high and ancestor.reader.snapshot.verified is None:
                for damage in verify_needed(ancestor, low, high):
                    raise CorruptCacheError(
                        f"{ancestor.reader.path}: {damage.what}", path=ancestor.reader.path, layer=damage.layer
                    )
        with counted_from(self.base):
            self.own.verify_rows(max(0, start - self.base), max(0, stop - self.base))

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        self.check()
        return verify_chain(self.own, self.ancestors, progress)

    # Description

    def identity(self) -> str | None:
        return self.own.identity()

    def facts(self) -> dict[str, Any]:
        facts = self.own.facts()
        facts["committed_len"] += self.base
        facts["parents"] = [
            {
                "path": ancestor.reader.path,
                "start": ancestor.base,
                "stop": ancestor.record.length,
                "disk_bytes": ancestor.reader.mapped.status().st_blocks * 512,
            }
            for ancestor in self.ancestors
        ]
        return facts


def _admit_own(admit: Callable[[int], int], base: int, length: int) -> int:
    """Ask for a length of the own file, which begins at `base` of the chain."""
    return admit(length + base) - base


def _ancestor_tokens(ancestor: Ancestor, stop: int) -> NDArray[np.int32]:
    """Return a view of a file's first token ids, verified."""
    reader, size = ancestor.reader, ancestor.reader.geometry.block_tokens
    if reader.snapshot.verified is not None:
        whole = ancestor.tokens - ancestor.tokens % size
        with counted_from(ancestor.base):
            verify_tokens(reader.mapped, reader.holder, min(stop, whole))
        if stop > whole:
            ancestor.verify_tail(reader.geometry.num_layers)
    return reader.mapped.token_ids()[:stop]
