"""The one writer of a Zarr-backed cache: append, commit, truncate, close.

Rows gather in memory, a shard a layer, and are stored when a shard is full or a commit asks for it. Objects beyond the
last commit do not count until the root says so, and within it they only ever get longer. So the order is: rows,
checksums and token ids first, and when all of them are stored the root, in one conditional put. A truncation puts the
shorter root before anything is written past it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, wait

import numpy as np
from numpy.typing import NDArray

from ...format import NO_TOKEN, checksum
from ...metadata import Document
from ..after_fork import refuse_forked
from ..checksums import digest
from ..objects.protocol import Lock, Objects
from ..protocols import Durability, Storage
from .checkpoints import ZarrWriterCheckpoints
from .outgoing import OutgoingShards
from .reader import ZarrReader
from .root import Root
from .root_commit import RootCommit
from .shard_cache import CACHE_BYTES
from .writer_layer import ZarrWriterLayer


class ZarrWriter(ZarrReader):
    """A group open for appending. Holds the writer's lock until it is closed.

    Args:
        objects, root, tag, cache_bytes: as in `ZarrReader`.
        lock: the writer's lock, held.
        durability: "commit" commits every append.
        copying: stamp of the copy that fills the group, until it is complete.
    """

    writable = True
    checkpoints: ZarrWriterCheckpoints

    def __init__(
        self,
        objects: Objects,
        root: Root,
        tag: str,
        lock: Lock,
        *,
        durability: Durability = "publish",
        cache_bytes: int = CACHE_BYTES,
        copying: str | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._writer_lock = lock
        self._durability = durability
        self._descriptions: dict[str, tuple[bytes, Future[None]]] = {}
        self._new_document: Document | None = None
        self._ids: NDArray[np.int32] | None = None
        self.copying = copying
        super().__init__(objects, root, tag, cache_bytes=cache_bytes)
        self._root_commit = RootCommit(self.handle)

    def _prepare(self) -> None:
        self._outgoing = OutgoingShards(self.handle, self.shards, self.checksums)
        self._writers: list[ZarrWriterLayer] = []
        self.checkpoints = ZarrWriterCheckpoints(self.handle, self)

    def _make_layer(self, number: int) -> ZarrWriterLayer:
        layer = ZarrWriterLayer(self, number, self.handle, self.shards, self._outgoing)
        self._writers.append(layer)
        return layer

    def _continuable(self, root: Root) -> int:
        return root.seq_len  # `resume` truncates, and copies bring rows before their checkpoints

    # Appending

    def check_writable(self) -> None:
        """Raise unless this handle may write."""
        self.check()
        if os.getpid() != self._pid:
            refuse_forked(self.path, self._pid)
        if self._root_commit.overtaken:
            self._root_commit.refuse_overtaken()

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        stop = start + len(ids)
        if self._ids is None or stop > len(self._ids):
            recorded = self.read_tokens(self.token_len)
            self._ids = np.full(max(1024, 2 * stop), NO_TOKEN, np.int32)
            self._ids[: len(recorded)] = recorded
        self._ids[start:stop] = ids

    def publish_tokens(self, length: int) -> None:
        self.token_len = length

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        return super().read_tokens(count) if self._ids is None else self._ids[:count].copy()

    def publish_step(self, length: int) -> None:
        Storage.publish_step(self, length)

    def appended(self) -> None:
        if self._durability == "commit":
            self.commit()

    # Committing

    def describe(self, metadata: Mapping[str, bytes]) -> None:
        """Start storing the zarr.json of the arrays and groups, by key; the next commit waits for them."""
        self._descriptions = {
            key: (data, self.handle.pool.submit(self.objects.put, key, [data])) for key, data in metadata.items()
        }

    def finish_describing(self) -> None:
        """Wait until what `describe` was given is stored; what failed gets a second chance, and raises then."""
        for key, (data, putting) in list(self._descriptions.items()):
            if putting.exception() is not None:
                self.objects.put(key, [data])
            del self._descriptions[key]

    def set_document(self, document: Document) -> None:
        self.check_writable()
        document.encode()
        self._new_document = document

    @property
    def document(self) -> Document:
        return self._new_document or self.root.document

    def commit(self, *, closing: bool = False) -> None:
        """Store what is not stored, and then the root; nothing is done if there is nothing new."""
        with self.lock:
            self.check_writable()
            self._root_commit.resolve()
            for layer in self._writers:
                if layer.ahead:
                    layer.roll_back()
            length = self.seq_len
            tokens = min(self.token_len, length)
            if self.checkpoints.staged == length:
                self.checkpoints.name_staged()
            root = self.root
            same = (root.seq_len, root.token_len, root.copying) == (length, tokens, self.copying)
            same = same and root.checkpoints == self.checkpoints.to_commit(length)
            same = same and not any(layer.has_unsaved_recent for layer in self._writers)
            if same and self._new_document is None and (root.closed or not closing):
                return
            self._commit(length, tokens, closing=closing)

    def commit_again(self) -> None:
        """Commit, even if nothing has changed."""
        length = self.seq_len
        self._commit(length, min(self.token_len, length), closing=False)

    def _commit(self, length: int, tokens: int, *, closing: bool) -> None:
        self._outgoing.store(length)
        self._store_recent(length)
        self._store_sums(length)
        self._store_tokens(tokens)
        self.finish_describing()
        self.objects.settle()
        self._put_root(length, tokens, self.root.generation, closed=closing)
        self._outgoing.return_borrowed()

    def _store_recent(self, length: int) -> None:
        """Store the rows in 16 bits of all layers, as many at once as there are threads."""
        putting = []
        for layer in self._writers:
            records = layer.unsaved_records(length)
            if records is not None:
                put, key = self.objects.put, self.layout.recent_key(layer.index)
                putting.append((layer, self.handle.pool.submit(put, key, [records])))
        for layer, future in putting:
            future.result()
            layer.note_saved()

    def _put_root(self, length: int, tokens: int, generation: int, *, closed: bool) -> None:
        """Make another root count. Everything that it refers to is stored."""
        self._root_commit.put(
            self.root.successor(
                seq_len=length,
                token_len=tokens,
                generation=generation,
                closed=closed,
                document=self.document,
                tails=self._tails(length),
                sums_digests=tuple(checksum(part.tobytes()) for part in self._sums_of(length)),
                token_digests=tuple(checksum(part.tobytes()) for part in self._token_parts(tokens)),
                checkpoints=self.checkpoints.to_commit(length),
                copying=self.copying,
            )
        )
        self._new_document = None

    def store_rows(self, length: int) -> None:
        """Store the positions below `length` without counting them; `commit` does."""
        with self.lock:
            self.check_writable()
            self._outgoing.store(length)

    def sums_below(self, length: int) -> NDArray[np.uint64]:
        """Return the checksums of all blocks below `length`, stored ones, u64 [blocks, num_layers]."""
        parts = list(self._sums_of(length))
        if length % self.geometry.block_tokens:
            parts.append(np.array([self._tails(length)], np.uint64))
        return np.concatenate([np.zeros((0, self.geometry.num_layers), np.uint64), *parts])

    def _tails(self, length: int) -> tuple[int, ...]:
        """Return each layer's checksum of its incomplete block; 0 for a layer without rows."""
        found = [0] * self.geometry.num_layers
        for layer in self._writers:
            found[layer.index] = self._tail(layer, length)
        return tuple(found)

    def _tail(self, layer: ZarrWriterLayer, length: int) -> int:
        """Return the checksum of a layer's incomplete block, where there are `length` positions."""
        size = self.geometry.block_tokens
        block, rest = divmod(length, size)
        if not rest:
            return 0
        if length == self.root.seq_len:
            return self.root.tails[layer.index]
        tail = self._outgoing.stored_tail(layer.index, length)
        return digest(layer.rows(block * size, length), layer.index, block, 0, rest) if tail is None else tail

    def _sums_of(self, length: int) -> Iterator[NDArray[np.uint64]]:
        """Yield the checksums of all complete blocks, chunk by chunk."""
        blocks, size = length // self.geometry.block_tokens, self.layout.shard_blocks
        for chunk in range(-(-blocks // size)):
            yield self.checksums.get(chunk)[: blocks - chunk * size]

    def _store_sums(self, length: int) -> None:
        size = self.layout.shard_blocks
        first = self.root.seq_len // self.layout.shard_tokens  # earlier chunks are complete, and do not change
        for chunk, sums in enumerate(self._sums_of(length)):
            if chunk >= first:
                whole = np.zeros((size, self.geometry.num_layers), "<u8")
                whole[: len(sums)] = sums
                self.objects.put(self.layout.sums_key(chunk), [whole])

    def _token_parts(self, length: int) -> Iterator[NDArray[np.int32]]:
        """Yield recorded token ids, chunk by chunk."""
        ids, size = self.read_tokens(length).astype("<i4"), self.layout.shard_tokens
        for start in range(0, length, size):
            yield ids[start : start + size]

    def _store_tokens(self, length: int) -> None:
        size = self.layout.shard_tokens
        first = self.root.token_len // size
        for chunk, ids in enumerate(self._token_parts(length)):
            if chunk >= first:
                whole = np.full(size, NO_TOKEN, "<i4")
                whole[: len(ids)] = ids
                self.objects.put(self.layout.tokens_key(chunk), [whole])

    # Truncating

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; durable on return as far as they were committed."""
        with self.lock:
            self.check_writable()
            self._root_commit.resolve()
            shard, rest = divmod(length, self.layout.shard_tokens)
            for layer in self._writers:
                layer.roll_back()
                if rest and shard not in self._outgoing.open[layer.index] and layer.length > length:
                    # The block that is cut gets a new checksum: fetching it compares the old one.
                    self._outgoing.adopt(layer.index, shard, rest)
            tokens = min(self.root.token_len, length)
            if length < self.root.seq_len or tokens < self.root.token_len:
                # Before anything is written past it: the root that counts promises what would be overwritten.
                self._put_root(min(length, self.root.seq_len), tokens, self.root.generation + 1, closed=False)
            self.checkpoints.cut(length)
            for layer in self._writers:
                layer.length = min(layer.length, length)
                layer.roll_back()  # and forget what it keeps in 16 bits beyond
            self.handle.truncations += 1
            self.shards.drop(length // self.geometry.block_tokens)
            self.publish_tokens(min(self.token_len, length))

    def refresh(self) -> bool:
        """The writer sees all there is already."""
        self.check()
        return False

    # Closing

    def close(self) -> None:
        """Commit, and release the lock. An error of the commit is raised, and the cache is closed all the same."""
        with self.lock:
            try:
                if not self.closed and os.getpid() == self._pid and not self._root_commit.overtaken:
                    self.commit(closing=True)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Release the lock without a commit: the cache is as of the last one."""
        with self.lock:
            if self.closed:
                return
            try:
                if os.getpid() == self._pid:
                    self._outgoing.settle_all()
                    wait([putting for _, putting in self._descriptions.values()])
                    self._writer_lock.release()
                else:
                    self._writer_lock.abandon()
            finally:
                self._release()
