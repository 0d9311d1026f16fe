"""A Zarr-backed cache open for reading: looks at the root, fetches blocks, keeps some of them in memory.

A reader sees the commit that it found when it last looked. Every block that it fetches is compared with the checksum
that this commit gives it, so what a writer has changed since can't pass for it; positions below a commit change only
after `truncate`, which the next root tells by its generation. What a writer does besides is in `zarr_writer`.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import (
    CacheChangedError,
    CacheNotFoundError,
    CorruptCacheError,
    ReadOnlyError,
)
from ...format import checksum
from ...geometry import LayerGeometry
from ...metadata import Document
from ..objects.lock import is_local
from ..objects.protocol import MissingObjectError, Objects
from ..protocols import Progress, Rows, VerifyReport, closed_error, refuse_truncated
from ..readonly import ReadOnlyStorage
from ..streaming import WriteBytes
from .download import Block, Fetch, ShardRows
from .layer import ZarrLayer
from .layout import ROOT_KEY
from .root import LAYOUT_VERSION, Root
from .streaming import ShardStream, ShardStreams

CACHE_BYTES = 256 * 2**20
"""Fetched rows that are kept in memory, unless asked for otherwise."""

AHEAD_BYTES = 64 * 2**20
"""Rows that are under way from an object store while earlier ones are used."""

Sums = Future[NDArray[np.uint64] | None]
"""Checksums of a shard's blocks, [shard_blocks, num_layers], on their way; None if they are damaged."""

SPARES = 8
"""Shards' room that is kept empty for the next ones."""

REMOTE_THREADS = 32
LOCAL_THREADS = 4


class ZarrReader(ReadOnlyStorage):
    """A group, open for reading.

    Args:
        objects: where it lies.
        root: what was found there.
        tag: the root's version.
        cache_bytes: fetched rows to keep in memory.
    """

    writable = False

    def __init__(self, objects: Objects, root: Root, tag: str, *, cache_bytes: int = CACHE_BYTES) -> None:
        self.objects = objects
        self.path: str = objects.url
        self.root = root
        self.tag = tag
        self.layout = root.layout
        self.geometry = root.layout.geometry
        self.lock = threading.RLock()
        self.token_len = root.token_len
        self.truncations = 0
        """How often positions that this handle had were truncated."""
        self._closed = False
        self._cache_bytes = cache_bytes
        self._fetch_lock = threading.RLock()
        self._kept: OrderedDict[tuple[int, int], ShardRows] = OrderedDict()
        self._spare: dict[LayerGeometry, list[ShardRows]] = {}
        self._under_way: dict[tuple[int, int], Fetch] = {}
        self._sums: dict[int, Sums] = {}
        self._tokens: NDArray[np.int32] | None = None
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0
        self.layers: Sequence[ZarrLayer] = self._make_layers()

    @classmethod
    def open(cls, objects: Objects, *, cache_bytes: int = CACHE_BYTES) -> ZarrReader:
        """Look at the root: one request."""
        return cls(objects, *read_root(objects), cache_bytes=cache_bytes)

    def _make_layers(self) -> Sequence[ZarrLayer]:
        return [ZarrLayer(self, number, layer) for number, layer in enumerate(self.geometry.layers)]

    @property
    def pool(self) -> Executor:
        """Threads that wait for disks and servers; made when first needed, and anew in a forked child."""
        pool = self._pool  # another thread may close the cache between two looks
        if pool is None or self._pool_pid != os.getpid():
            self.check()
            count = REMOTE_THREADS if self.objects.remote else LOCAL_THREADS
            pool = self._pool = ThreadPoolExecutor(count, thread_name_prefix="kvmmap")
            self._pool_pid = os.getpid()
        return pool

    def check(self) -> None:
        if self._closed:
            raise closed_error(self.path)

    def version(self) -> int:
        return self.truncations

    def validate(self, version: int) -> None:
        self.check()
        if self.truncations != version:
            refuse_truncated(self.path)

    @contextlib.contextmanager
    def _watching_closing(self) -> Iterator[None]:
        """Say so if what goes wrong does so because another thread has closed the cache."""
        try:
            yield
        except (RuntimeError, CancelledError):  # the threads that it was given to are gone
            self.check()
            raise

    def refuse_write(self) -> NoReturn:
        self.check()
        raise ReadOnlyError(f'{self.path}: is open for reading; kvmmap.open(path, mode="a") appends', path=self.path)

    # Fetching

    def shard_part(self, layer: int, shard: int, start: int, stop: int, *, streamed: bool = False) -> Rows:
        """Return views of positions [start, stop) of one shard, fetched and verified."""
        base = shard * self.layout.shard_tokens
        with self._fetch_lock:
            self.check()
            if stop > self.layers[layer].length:  # since its length was looked at
                refuse_truncated(self.path)
            kept = self._require(layer, shard, start - base, stop - base, streamed=streamed)
            # Still locked: room that nobody has views of is used again.
            return kept.views.part(start - base, stop - base)

    def read_ahead(self, layer: int, shard: int, start: int, stop: int) -> None:
        """Start fetching shards from this one on, of positions [start, stop); then of the next layer, if all of this
        one was asked for."""
        size = self.layout.shard_tokens
        last = -(-stop // size)
        with self._fetch_lock:
            self.check()
            coming = [(layer, number) for number in range(shard, last)]
            if (
                self.objects.remote
                and start == 0
                and stop == self.layers[layer].length
                and layer + 1 < len(self.layers)
            ):
                coming += [(layer + 1, number) for number in range(last)]
            room = min(AHEAD_BYTES, self._cache_bytes // 2) if self.objects.remote else 0
            for number, place in enumerate(coming):
                room -= self._shard_bytes(place[0])
                if number > 1 and room < 0:
                    break
                first, end = max(0, start - place[1] * size), min(size, stop - place[1] * size)
                self._start(*place, first, end)

    def prefetch(self, layer: int, start: int, stop: int) -> None:
        """Start fetching positions [start, stop)."""
        size = self.layout.shard_tokens
        with self._fetch_lock:
            self.check()
            for shard in range(start // size, -(-stop // size)):
                self._start(layer, shard, max(0, start - shard * size), min(size, stop - shard * size))

    def stream_bytes(self, layer: int, start: int, stop: int, write: WriteBytes) -> ShardStreams | None:
        """Start streaming positions [start, stop), if they are all that some shards have, not compressed."""
        size, tokens = self.layout.shard_tokens, self.geometry.block_tokens
        partial = start % size or (stop % size and stop != self.root.seq_len)
        if partial or self.writable or self.layout.level is not None:
            return None
        with self._fetch_lock:
            self.check()
            shards = []
            for shard in range(start // size, -(-stop // size)):
                first, count = shard * self.layout.shard_blocks, min(size, stop - shard * size)
                blocks = [Block(n, self.block_rows(layer, first + n)) for n in range(-(-count // tokens))]
                expected = functools.partial(self._expected, layer, blocks, self._start_sums(shard))
                shards.append(
                    ShardStream(self.objects, self.layout, self.pool, (layer, shard), blocks, expected, write)
                )
            return ShardStreams(shards, self._watching_closing)

    def _shard_bytes(self, layer: int) -> int:
        return self.layout.shard_tokens * self.geometry.layers[layer].position_bytes

    def _require(self, layer: int, shard: int, start: int, stop: int, *, streamed: bool = False) -> ShardRows:
        """Have positions [start, stop) of a shard in memory."""
        place = (layer, shard)
        trouble: list[tuple[Block, str]] = []
        for _ in range(3):
            early = place in self._under_way
            self._start(layer, shard, start, stop)
            if place in self._under_way:
                fetch = self._under_way.pop(place)
                try:
                    trouble = fetch.finish()
                except OSError:
                    if not early:  # else it may have failed long ago, and a new try succeed
                        raise
                    continue
                if fetch.target is not None:
                    self._kept[place] = fetch.target
            # It may have been started for other blocks than these.
            if not trouble and not self._missing(layer, shard, start, stop):
                break
        if trouble:
            block, what = trouble[0]
            self._explain(layer, shard * self.layout.shard_blocks + block.number, what)
        return self._keep(layer, shard, streamed=streamed)

    def _start(self, layer: int, shard: int, start: int, stop: int) -> None:
        """Start fetching what is not here and not on its way."""
        if (layer, shard) in self._under_way:
            return
        blocks = self._missing(layer, shard, start, stop)
        if blocks:
            kept = self._kept.get((layer, shard))
            if kept is not None:
                changing = [block.number for block in blocks if kept.borrowed or kept.held[block.number]]
                if changing:
                    self._renew(layer, shard, min(changing))
            elif not self._comes_whole(shard, blocks):
                self._kept[layer, shard] = self._room(self.geometry.layers[layer])
            target = self._kept.get((layer, shard))
            self._under_way[layer, shard] = self.fetch(layer, shard, target, blocks, self._start_sums(shard))

    def _comes_whole(self, shard: int, blocks: Sequence[Block]) -> bool:
        """True if a shard's objects can be kept as they come."""
        stored = -(-self.root.seq_len // self.geometry.block_tokens) - shard * self.layout.shard_blocks
        plain = self.objects.remote and self.layout.level is None and not self.writable
        return plain and len(blocks) == min(self.layout.shard_blocks, stored)

    def _renew(self, layer: int, shard: int, first: int) -> None:
        """Give a shard other room, with what it holds before a block: somebody may be reading where the rest lies."""
        kept = self._kept[layer, shard]
        fresh = self._room(self.geometry.layers[layer])
        rows = first * self.geometry.block_tokens
        fresh.rows.part(0, rows).fill(kept.rows.part(0, rows))
        fresh.held[:first] = kept.held[:first]
        self._kept[layer, shard] = fresh

    def fetch(self, layer: int, shard: int, target: ShardRows | None, blocks: Sequence[Block], sums: Sums) -> Fetch:
        """Start reading blocks of a shard, to be compared with these checksums; without a target, all of them."""
        return Fetch(
            self.objects,
            self.layout,
            self.pool,
            (layer, shard),
            target,
            blocks,
            lambda: self._expected(layer, blocks, sums),
        )

    def _room(self, geometry: LayerGeometry) -> ShardRows:
        spare = self._spare.get(geometry)
        return spare.pop() if spare else ShardRows(geometry, self.layout)

    def _missing(self, layer: int, shard: int, start: int, stop: int) -> list[Block]:
        kept = self._kept.get((layer, shard))
        size = self.geometry.block_tokens
        found = []
        for number in range(start // size, -(-stop // size)):
            held = kept.held[number] if kept else 0
            if held < min(stop - number * size, size):
                found.append(Block(number, self.block_rows(layer, shard * self.layout.shard_blocks + number)))
        return found

    def _keep(self, layer: int, shard: int, *, streamed: bool) -> ShardRows:
        """Mark a shard as used just now, and let go of others if there are too many.

        Of shards that were read on the way through many, the latest go first: who goes through more than fits, again
        and again, would otherwise find none of them still there. Of the rest, those that were not used for longest.
        """
        kept = self._kept[layer, shard]
        kept.streamed = streamed
        self._kept.move_to_end((layer, shard))
        total = sum(self._shard_bytes(place[0]) for place in self._kept)
        if total > self._cache_bytes:
            latest = [place for place in reversed(self._kept) if self._kept[place].streamed]
            rest = [place for place in self._kept if not self._kept[place].streamed]
            for place in latest + rest:
                if total <= self._cache_bytes:
                    break
                if place != (layer, shard) and place not in self._under_way:
                    total -= self._shard_bytes(place[0])
                    self._spare_room(self._kept.pop(place), self.geometry.layers[place[0]])
        return kept

    def _spare_room(self, kept: ShardRows, geometry: LayerGeometry) -> None:
        spare = self._spare.setdefault(geometry, [])
        if len(spare) < SPARES and not kept.lent:
            kept.empty()
            spare.append(kept)

    def _explain(self, layer: int, block: int, trouble: str) -> NoReturn:
        """A block is not what the commit says: find out whether there is another commit by now."""
        self.refuse_changed()
        position = block * self.geometry.block_tokens
        raise CorruptCacheError(
            f"{self.path}: layer {layer} is damaged in positions [{position}, "
            f"{position + self.block_rows(layer, block)}): {trouble}",
            path=self.path,
            layer=layer,
            position=position,
        )

    def refuse_changed(self) -> None:
        """Raise if positions that this handle counts on were taken back, or the cache is another one."""
        root, _ = read_root(self.objects)
        if (root.cache_id, root.generation) != (self.root.cache_id, self.root.generation):
            what = "truncated by its writer" if root.cache_id == self.root.cache_id else "replaced by another cache"
            raise CacheChangedError(
                f"{self.path}: was {what} since this handle last looked; call refresh()", path=self.path
            )

    def _drop_kept(self, first_block: int = 0) -> None:
        """Forget fetched blocks from `first_block` on."""
        with self._fetch_lock:
            for fetch in self._under_way.values():
                fetch.abandon()
            self._under_way.clear()
            size = self.layout.shard_blocks
            for (layer, shard), kept in list(self._kept.items()):
                if shard * size >= first_block:
                    del self._kept[layer, shard]
                elif any(kept.held[first_block - shard * size :]):
                    self._renew(layer, shard, first_block - shard * size)

    # Checksums

    def block_rows(self, layer: int, block: int) -> int:
        """Positions of a block that its checksum covers."""
        size = self.geometry.block_tokens
        return max(0, min(size, self.root.seq_len - block * size))

    def _expected(self, layer: int, blocks: Sequence[Block], sums: Sums) -> list[int] | str:
        """Return the checksums of blocks of a shard, or what is wrong with them."""
        found = []
        for block in blocks:
            if block.rows < self.geometry.block_tokens:
                found.append(self.root.tails[layer])
                continue
            stored = sums.result()
            if stored is None:
                return "their checksums are missing or damaged"
            found.append(int(stored[block.number, layer]))
        return found

    def _start_sums(self, chunk: int) -> Sums:
        """Fetch a chunk of checksums, [blocks, num_layers], if it was not yet."""
        known = self._sums.get(chunk)
        if known is None or (known.done() and known.exception() is not None):
            self._sums[chunk] = self.pool.submit(self.read_sums, chunk, self.root)
        return self._sums[chunk]

    def read_sums(self, chunk: int, root: Root) -> NDArray[np.uint64] | None:
        """Read a chunk of checksums, as far as the root's digest covers it; None if it is not what that says."""
        layers, size = self.geometry.num_layers, self.layout.shard_blocks
        complete = min(size, root.seq_len // self.geometry.block_tokens - chunk * size)
        sums = np.zeros((size, layers), "<u8")
        if complete > 0:
            try:
                data = self.objects.get(self.layout.sums_key(chunk))
                stored = np.frombuffer(data, "<u8", complete * layers).reshape(complete, layers)
            except (MissingObjectError, ValueError):
                return None
            if checksum(stored.tobytes()) != root.sums_digests[chunk]:
                return None
            sums[:complete] = stored
        return sums

    @property
    def committed_len(self) -> int:
        return self.root.seq_len

    def committed_checksums(self, first: int, stop: int) -> NDArray[np.uint64]:
        with self._watching_closing():
            return self._committed_sums(first, stop)

    def _committed_sums(self, first: int, stop: int) -> NDArray[np.uint64]:
        size = self.layout.shard_blocks
        complete = min(stop, self.root.seq_len // self.geometry.block_tokens)
        parts = [np.zeros((0, self.geometry.num_layers), np.uint64)]
        chunks = range(first // size, -(-complete // size))
        for chunk in chunks:
            self._start_sums(chunk)  # all at once
        for chunk in chunks:
            sums = self._start_sums(chunk).result()
            if sums is None:
                self._explain(0, chunk * size, "their checksums are missing or damaged")
            parts.append(sums[max(0, first - chunk * size) : complete - chunk * size])
        if stop > complete:
            parts.append(np.array([self.root.tails], np.uint64))
        return np.concatenate(parts)

    def verify_rows(self, start: int, stop: int) -> None:
        """Reading them does."""

    # Token ids and metadata

    @property
    def document(self) -> Document:
        return self.root.document

    def read_tokens(self, count: int) -> NDArray[np.int32]:
        with self._fetch_lock, self._watching_closing():
            if self._tokens is None or len(self._tokens) < count:
                self._tokens = self._fetch_tokens()
            return self._tokens[:count].copy()

    def _fetch_tokens(self) -> NDArray[np.int32]:
        """Read all recorded token ids."""
        chunks = range(len(self.root.token_digests))
        parts = list(self.pool.map(lambda chunk: self.read_token_chunk(chunk, self.root), chunks))
        for chunk, part in enumerate(parts):
            if part is None:
                self.refuse_changed()
                start = chunk * self.layout.shard_tokens
                raise CorruptCacheError(f"{self.path}: token ids damaged from position {start} on", path=self.path)
        return np.concatenate([np.empty(0, np.int32), *[part for part in parts if part is not None]])

    def read_token_chunk(self, chunk: int, root: Root) -> NDArray[np.int32] | None:
        """Read a chunk of token ids, as far as they are recorded; None if it is not what the root says."""
        size = self.layout.shard_tokens
        count = min(size, root.token_len - chunk * size)
        try:
            ids = np.frombuffer(self.objects.get(self.layout.tokens_key(chunk)), "<i4", count)
        except (MissingObjectError, ValueError):
            return None
        return ids if checksum(ids.tobytes()) == root.token_digests[chunk] else None

    # Looking

    def refresh(self) -> bool:
        """Look again; True if there is another commit.

        Raises:
            CacheChangedError: another cache has taken this one's place.
        """
        with self.lock:
            return self._refresh()

    def _refresh(self) -> bool:
        self.check()
        root, tag = read_root(self.objects)
        if root.cache_id != self.root.cache_id:
            raise CacheChangedError(f"{self.path}: was replaced by another cache; open it again", path=self.path)
        if root.sequence == self.root.sequence:
            return False
        with self._fetch_lock:
            self.check()
            complete = min(root.seq_len, self.root.seq_len) // self.geometry.block_tokens
            self._drop_kept(complete if root.generation == self.root.generation else 0)
            self._sums.clear()
            self._tokens = None
            before, self.root, self.tag = self.root, root, tag
            self.token_len = root.token_len
            for layer in self.layers:
                layer.length = root.seq_len
            if root.generation != before.generation:
                self.truncations += 1
        return True

    def verify(self, progress: Progress | None = None) -> VerifyReport:
        """Read every committed block, and compare it with its checksum."""
        from .verify import verify_group  # here, and not above, because verify uses this module's names

        self.check()
        with self._watching_closing():
            return verify_group(self, progress)

    def facts(self) -> dict[str, Any]:
        """What `inspect` shows of the group."""
        root, owner = self.root, self.objects.owner()
        state = "open for writing" if owner is not None else "closed" if root.closed else "interrupted"
        return {
            "kind": "zarr",
            "format_version": LAYOUT_VERSION,
            "created_ns": root.created_ns,
            "commit_sequence": root.sequence,
            "committed_len": root.seq_len,
            "commit_ns": root.commit_ns,
            "generation": root.generation,
            "state": state,
            "writer_pid": owner["pid"] if owner and is_local(owner) else 0,
        }

    def identity(self) -> str | None:
        return f"{self.root.cache_id}/{self.root.generation}"

    def close(self) -> None:
        """Let go of everything; views that were handed out stay valid."""
        with self.lock:
            if not self._closed:
                self._let_go()

    def _let_go(self) -> None:
        self._closed = True
        with self._fetch_lock:
            self._drop_kept()
            self._spare.clear()
            self._tokens = None
        if self._pool is not None and self._pool_pid == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None


def read_root(objects: Objects) -> tuple[Root, str]:
    """Read a group's root, and its version's tag.

    Raises:
        CacheNotFoundError: there is nothing.
        FormatError: it is no cache, or damaged.
    """
    try:
        data, tag = objects.get_tagged(ROOT_KEY)
    except MissingObjectError as error:
        raise CacheNotFoundError(f"{error}; kvmmap.create() makes a cache there", path=objects.url) from None
    return Root.decode(data, objects.url), tag
