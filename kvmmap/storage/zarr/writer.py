"""The one writer of a Zarr-backed cache: append, commit, truncate, close.

Rows gather in memory, a shard a layer, and go out when a shard is full or a commit asks for it. Objects beyond the
last commit mean nothing until the root counts them, and within it they only ever get longer, so the order is simple:
rows, checksums and token ids first, and when all of them are there the root, in one conditional put. A truncation
puts the shorter root before anything is written past it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Literal, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, FormatError, StoreError
from ...format import checksum
from ...geometry import LayerGeometry, check_room
from ...metadata import Document
from ..after_fork import refuse_forked
from ..checksums import digest
from ..objects.protocol import Lock, ObjectChangedError, Objects
from ..protocols import Rows, Storage, seq_len
from .download import ShardRows
from .layer import ZarrLayer
from .layout import NO_TOKEN, ROOT_KEY
from .reader import CACHE_BYTES, ZarrReader
from .root import Root
from .upload import Upload

ATTEMPTS = 8
"""How often a commit is repeated because other programs have changed the group's attributes in between."""

UNDER_WAY = 2**27
"""Bytes of rows that may be on their way out before an append waits."""


class OpenShard:
    """A shard that is being filled, or not stored yet."""

    def __init__(self, memory: ShardRows, stored: int = 0, tail: int = 0) -> None:
        self.memory = memory
        self.stored = stored
        """Positions, from its first, that the store has."""
        self.tail = tail
        """Checksum of the incomplete block at `stored`, 0 if there is none."""


class ZarrWriterLayer(ZarrLayer):
    """One layer, appended to."""

    _storage: ZarrWriter

    def __init__(self, storage: ZarrWriter, index: int, geometry: LayerGeometry) -> None:
        super().__init__(storage, index, geometry)
        self.open: dict[int, OpenShard] = {}
        """By number: the shard that the length ends in, and those that are not stored yet."""
        self.ahead = False
        """True from the first write of an append to its publication."""

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        check_room(self.length, count, self.capacity, layer=self.index)
        if self.ahead:
            self._storage.roll_back(self)
        size = self._storage.layout.shard_tokens
        shard = self.length // size
        if count and self.length % size and shard not in self.open:
            # The block that an append goes on with gets a new checksum: fetching it sees that its old one holds.
            self._storage.adopt(self, shard, self.length % size)
        return self.length

    def stage(self, start: int, count: int) -> Rows:
        size = self._storage.layout.shard_tokens
        shard, offset = divmod(start, size)
        if shard not in self.open:
            self.open[shard] = OpenShard(ShardRows(self.geometry, self._storage.layout))
        self.own(shard)
        return self.open[shard].memory.rows.part(offset, min(size, offset + count))

    def own(self, shard: int) -> None:
        """See that an open shard's memory is ours, to be filled further."""
        opened = self.open[shard]
        if opened.memory.borrowed:
            own = ShardRows(self.geometry, self._storage.layout)
            rows = opened.memory.rows
            own.rows.part(0, len(rows[0])).fill(rows)
            opened.memory = own

    def return_borrowed(self) -> None:
        """After a commit: keep no rows that are the caller's."""
        size = self._storage.layout.shard_tokens
        for shard, opened in list(self.open.items()):
            if opened.memory.borrowed:
                if opened.stored == min(size, self.length - shard * size):
                    del self.open[shard]
                else:  # this layer is ahead of others
                    self.own(shard)

    def write(self, start: int, rows: Rows) -> None:
        """Take rows, staged here or the caller's own. The latter are stored from where they lie if a shard begins with
        them, and must stay as they are until the next commit."""
        self.ahead = True
        size = self._storage.layout.shard_tokens
        done, count = 0, len(rows[0])
        while done < count:
            shard, offset = divmod(start + done, size)
            stop = min(count, done + size - offset)
            part = rows.part(done, stop)
            if not offset and shard not in self.open:
                self.open[shard] = OpenShard(ShardRows.of(part, self._storage.layout))
            else:
                staged = self.stage(start + done, stop - done)
                if not np.may_share_memory(staged[-1], part[-1]):
                    staged.fill(part)
            if offset + stop - done == size:
                self._storage.send(self, shard, size)
            done = stop

    def publish(self, length: int) -> None:
        """Make positions below `length` this handle's; others see them from the next commit on."""
        self.length = length
        self.ahead = False

    def stored(self, shard: int) -> None:
        """A shard is stored whole: let go of its rows, unless a failing append would come back to it."""
        size = self._storage.layout.shard_tokens
        if not shard * size < self.length < (shard + 1) * size:
            self.open.pop(shard, None)


class ZarrWriter(ZarrReader):
    """A group open for appending. Holds the writer's lock until it is closed."""

    writable = True
    layers: Sequence[ZarrWriterLayer]

    def __init__(
        self,
        objects: Objects,
        root: Root,
        tag: str,
        lock: Lock,
        *,
        durability: Literal["publish", "commit"] = "publish",
        cache_bytes: int = CACHE_BYTES,
        copying: str | None = None,
    ) -> None:
        self._pid = os.getpid()
        self._writer_lock = lock
        self._durability = durability
        self._uploads: dict[tuple[int, int], Upload] = {}
        self._descriptions: dict[str, tuple[bytes, Future[None]]] = {}
        self._new_document: Document | None = None
        self._doubtful: tuple[Root, bytes] | None = None
        self._overtaken = False
        self._ids: NDArray[np.int32] | None = None
        self.copying = copying
        super().__init__(objects, root, tag, cache_bytes=cache_bytes)

    def _make_layers(self) -> Sequence[ZarrWriterLayer]:
        return [ZarrWriterLayer(self, number, layer) for number, layer in enumerate(self.geometry.layers)]

    # Reading what is not stored yet

    def shard_part(self, layer: int, shard: int, start: int, stop: int, *, streamed: bool = False) -> Rows:
        with self.lock:  # shards open, go out and are adopted as an append goes on
            self.check()
            opened = self.layers[layer].open.get(shard)
            if opened is None:
                self._wait_for(layer, shard)
                return super().shard_part(layer, shard, start, stop, streamed=streamed)
            base = shard * self.layout.shard_tokens
            return opened.memory.views.part(start - base, stop - base)

    def read_ahead(self, layer: int, shard: int, start: int, stop: int) -> None:
        """A writer reads little."""

    def block_rows(self, layer: int, block: int) -> int:
        size = self.geometry.block_tokens
        if (block + 1) * size <= self.layers[layer].length:
            return size  # stored whole since the last commit
        return super().block_rows(layer, block)

    # Appending

    def check_writable(self) -> None:
        """Raise unless this handle may write."""
        self.check()
        if os.getpid() != self._pid:
            refuse_forked(self.path, self._pid)
        if self._overtaken:
            self._refuse_overtaken()

    def adopt(self, layer: ZarrWriterLayer, shard: int, count: int) -> None:
        """Fetch the first `count` positions of a shard, to go on from there."""
        with self._fetch_lock:
            self._wait_for(layer.index, shard)
            memory = self._require(layer.index, shard, 0, count)
            del self._kept[layer.index, shard]
        layer.open[shard] = OpenShard(memory)
        if shard * self.layout.shard_tokens + count == self.root.seq_len:
            layer.open[shard].stored, layer.open[shard].tail = count, self.root.tails[layer.index]

    def send(self, layer: ZarrWriterLayer, shard: int, count: int) -> None:
        """Start storing the first `count` positions of an open shard; wait if much is under way already."""
        place = (layer.index, shard)
        self._settle(*place)  # two puts of one object must not overtake each other
        rows = layer.open[shard].memory.rows
        self._uploads[place] = Upload(self.objects, self.layout, self.pool, place, rows, count)
        while len(self._uploads) > 1 and sum(upload.bytes for upload in self._uploads.values()) > UNDER_WAY:
            self._wait_for(*next(iter(self._uploads)))

    def _settle(self, layer: int, shard: int) -> None:
        """Wait until nothing of a shard is under way any more, and forget how it went."""
        upload = self._uploads.pop((layer, shard), None)
        if upload:
            upload.settle()

    def _wait_for(self, layer: int, shard: int) -> None:
        """Wait until a shard that is on its way is stored, and note its checksums.

        Raises:
            OSError: it is not; it stays open, and the next commit tries again.
        """
        upload = self._uploads.pop((layer, shard), None)
        if upload is None:
            return
        sums = upload.finish()
        store, complete = self.layers[layer], upload.count // self.geometry.block_tokens
        self._own_sums(shard)[:complete, layer] = sums[:complete]
        opened = store.open[shard]
        opened.stored = upload.count
        opened.tail = sums[-1] if upload.count % self.geometry.block_tokens else 0
        if upload.count == self.layout.shard_tokens:
            store.stored(shard)

    def _own_sums(self, chunk: int) -> NDArray[np.uint64]:
        """The checksums of a shard's blocks, to be changed."""
        sums = self._start_sums(chunk).result()
        if sums is None:
            self._explain(0, chunk * self.layout.shard_blocks, "their checksums are missing or damaged")
        return sums

    def roll_back(self, layer: ZarrWriterLayer) -> None:
        """Forget what an append that failed has written past a layer's length."""
        size = self.layout.shard_tokens
        for place in [
            place for place in self._uploads if place[0] == layer.index and (place[1] + 1) * size > layer.length
        ]:
            self._settle(*place)
        for shard in list(layer.open):
            if shard * size >= layer.length:
                del layer.open[shard]
            elif (shard + 1) * size > layer.length:
                opened = layer.open[shard]
                opened.stored = 0  # the store may have more of it than it should
                layer.own(shard)
        layer.ahead = False

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
        """Start storing the zarr.json of the arrays and groups, by key; the next commit sees that all are there."""
        self._descriptions = {
            key: (data, self.pool.submit(self.objects.put, key, [data])) for key, data in metadata.items()
        }

    def finish_describing(self) -> None:
        """Wait until what `describe` was given is stored; what failed gets a second chance, and then says why."""
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
        """Store what is not, and then the root that counts it; nothing is done if there is nothing new."""
        with self.lock:
            self.check_writable()
            self._resolve_doubt()
            for layer in self.layers:
                if layer.ahead:
                    self.roll_back(layer)
            length = seq_len(self)
            tokens = min(self.token_len, length)
            root = self.root
            same = (root.seq_len, root.token_len, root.copying) == (length, tokens, self.copying)
            if same and self._new_document is None and (root.closed or not closing):
                return
            self._store_rows(length)
            self._store_sums(length)
            self._store_tokens(tokens)
            self.finish_describing()
            self.objects.settle()
            self._put_root(length, tokens, root.generation, closed=closing)
            for layer in self.layers:
                layer.return_borrowed()

    def _put_root(self, length: int, tokens: int, generation: int, *, closed: bool) -> None:
        """Make another root count. All that it speaks of is stored."""
        root = self.root.successor(
            seq_len=length,
            token_len=tokens,
            generation=generation,
            closed=closed,
            document=self.document,
            tails=tuple(self._tail(layer, length) for layer in self.layers),
            sums_digests=tuple(checksum(part.tobytes()) for part in self._sums_of(length)),
            token_digests=tuple(checksum(part.tobytes()) for part in self._token_parts(tokens)),
            copying=self.copying,
        )
        for _ in range(ATTEMPTS):
            data = root.encode()
            self._doubtful = root, data
            try:
                self.tag = self.objects.put_if(ROOT_KEY, data, self.tag)
                break
            except ObjectChangedError:
                if not self._resolve_doubt():
                    self._overtaken = True
                    self._refuse_overtaken()
                if self.root.commit_id == root.commit_id:
                    root = self.root  # it had arrived: the answer to an earlier attempt was lost
                    break
                root = replace(root, others=self.root.others)
        else:
            raise StoreError(f"{self.path}: other programs keep changing the group's attributes", path=self.path)
        self.objects.settle()
        self._doubtful = None
        self.root = root
        self._new_document = None

    def _resolve_doubt(self) -> bool:
        """Find out whether a root counts that was put with an error, or no answer; return True unless another writer
        has committed. Attributes that others have changed are taken over."""
        if self._doubtful is None:
            return True
        root, data = self._doubtful
        present, tag = self.objects.get_tagged(ROOT_KEY)
        if bytes(present) == data:
            self.root, self.tag = root, tag
        else:
            with contextlib.suppress(FormatError):
                found = Root.decode(present, self.path)
                for ours in (self.root, root):
                    if found.commit_id == ours.commit_id:
                        self.root, self.tag = replace(ours, others=found.others), tag
                        self._doubtful = None
                        return True
            self._doubtful = None
            return False
        self._doubtful = None
        return True

    def _refuse_overtaken(self) -> NoReturn:
        raise CacheChangedError(
            f"{self.path}: another writer has changed it although this one holds the lock (which somebody must have "
            "broken); nothing more can be stored: open it again",
            path=self.path,
        )

    def _store_rows(self, length: int) -> None:
        """See that all positions below `length` are stored."""
        last, rest = divmod(length, self.layout.shard_tokens)
        for again in (False, True):  # what failed on its way out gets a second chance, and then says why
            for layer in self.layers:
                for shard, opened in list(layer.open.items()):
                    count = self.layout.shard_tokens if shard < last else rest if shard == last else 0
                    if count and opened.stored != count and (layer.index, shard) not in self._uploads:
                        self.send(layer, shard, count)
            for place in list(self._uploads):
                try:
                    self._wait_for(*place)
                except OSError:
                    if again:
                        raise

    def store_rows(self, length: int) -> None:
        """Store the positions below `length`, without counting them yet; `commit` does."""
        with self.lock:
            self.check_writable()
            self._store_rows(length)

    def sums_below(self, length: int) -> NDArray[np.uint64]:
        """Return the checksums of all blocks below `length`, stored ones, u64 [blocks, num_layers]."""
        parts = list(self._sums_of(length))
        if length % self.geometry.block_tokens:
            parts.append(np.array([[self._tail(layer, length) for layer in self.layers]], np.uint64))
        return np.concatenate([np.zeros((0, self.geometry.num_layers), np.uint64), *parts])

    def _tail(self, layer: ZarrWriterLayer, length: int) -> int:
        """Return the checksum of a layer's incomplete block, where there are `length` positions."""
        size = self.geometry.block_tokens
        block, rest = divmod(length, size)
        if not rest:
            return 0
        if length == self.root.seq_len:
            return self.root.tails[layer.index]
        shard, count = divmod(length, self.layout.shard_tokens)
        opened = layer.open.get(shard)
        if opened and opened.stored == count:
            return opened.tail
        return digest(layer.rows(block * size, length), layer.index, block, 0, rest)

    def _sums_of(self, length: int) -> Iterator[NDArray[np.uint64]]:
        """Yield the checksums of all complete blocks, chunk by chunk."""
        blocks, size = length // self.geometry.block_tokens, self.layout.shard_blocks
        for chunk in range(-(-blocks // size)):
            yield self._own_sums(chunk)[: blocks - chunk * size]

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

    # Taking back

    def truncate(self, length: int) -> None:
        """Keep the first `length` positions; durable on return as far as they were committed."""
        with self.lock:
            self.check_writable()
            self._resolve_doubt()
            shard, rest = divmod(length, self.layout.shard_tokens)
            for layer in self.layers:
                self.roll_back(layer)
                if rest and shard not in layer.open and layer.length > length:
                    self.adopt(
                        layer, shard, rest
                    )  # the block that is cut gets a new checksum: see that its old one holds
            tokens = min(self.root.token_len, length)
            if length < self.root.seq_len or tokens < self.root.token_len:
                # Before anything is written past it: the root that counts promises what would be overwritten.
                self._put_root(min(length, self.root.seq_len), tokens, self.root.generation + 1, closed=False)
            for layer in self.layers:
                layer.length = min(layer.length, length)
                self.roll_back(layer)
            self.truncations += 1
            self._drop_kept(length // self.geometry.block_tokens)
            self.publish_tokens(min(self.token_len, length))

    def refresh(self) -> bool:
        """The writer sees all there is already."""
        self.check()
        return False

    # Closing

    def close(self) -> None:
        """Commit, and give the lock back. An error of the commit is raised, and the cache is closed all the same."""
        with self.lock:
            try:
                if not self._closed and os.getpid() == self._pid and not self._overtaken:
                    self.commit(closing=True)
            finally:
                self.abandon()

    def abandon(self) -> None:
        """Give the lock back without a commit: the cache is as of the last one."""
        with self.lock:
            if self._closed:
                return
            try:
                if os.getpid() == self._pid:
                    for place in list(self._uploads):
                        self._settle(*place)
                    wait([putting for _, putting in self._descriptions.values()])
                    self._writer_lock.release()
                else:
                    self._writer_lock.abandon()
            finally:
                self._let_go()
