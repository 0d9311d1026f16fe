"""Copies of caches between storages, bit by bit: file to group, group to file, one to its like; resumable, verified.

A copy to a file grows beside its place under a name of its own and takes the place when it is whole. A copy to a group
commits as it goes, and its root says what it is a copy of until it is whole. Either is gone on with by the same copy
started again, as long as the source has only grown: its identity and generation say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import secrets
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from .cache import QuantizedKvCache
from .errors import CacheExistsError, CacheNotFoundError, CorruptCacheError, FormatError
from .geometry import CacheGeometry, check_range, check_room, index
from .opening import PathLike, group_at, local_path, not_compressed, open_cache
from .storage.base import LayerStore, Progress, Rows, Storage, VerifyReport, seq_len
from .storage.mapped import MappedReader
from .storage.placing import METADATA_ROOM, place_file, place_of, remove_file
from .storage.writer import MappedWriter
from .storage.zarr_objects import Objects

if TYPE_CHECKING:
    from .storage.zarr_writer import ZarrWriter

STEP_TOKENS = 8192
"""Positions of a layer that are copied at once."""

AHEAD_BYTES = 128 * 2**20
"""Rows that are fetched ahead of those being written."""

WRITERS = 2
"""Threads that write to a file."""

BACKLOG_BYTES = 64 * 2**20
"""Rows that may wait for these."""

COMMIT_BYTES = 512 * 2**20
"""A group commits after so much: an interrupted copy has at most that to do again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyReport:
    """What a copy did."""

    target: str
    """Where the copy is."""

    seq_len: int
    """Positions in it."""

    bytes: int
    """Bytes of codes and scales in it."""

    resumed: int
    """Positions of these that an earlier, interrupted copy had brought over."""

    verified: bool
    """True if the whole copy was read back and compared with its checksums."""


def copy(
    source: PathLike | QuantizedKvCache,
    target: PathLike,
    *,
    start: int = 0,
    stop: int | None = None,
    layers: Sequence[int] | None = None,
    capacity: int | None = None,
    compressor: str | None = None,
    overwrite: bool = False,
    verify: bool = True,
    durable: bool = True,
    break_lock: bool = False,
    source_options: Mapping[str, Any] | None = None,
    target_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> CopyReport:
    """Copy a cache to another place, of the same kind or another: codes, scales, token ids and metadata, bit by bit.

    Committed blocks of the source are compared with their checksums on the way. Interrupted, the source is untouched,
    and the target not there (a file) or as of its last commit (a group); the same call again goes on from there.

    Args:
        source: path or URL of a cache, or an open one.
        target: path or URL; what it ends with says what is made, as in `create`.
        start: first position to copy.
        stop: one past the last; all that are stored by default.
        layers: indices of the layers to copy, in the order that they get; all by default.
        capacity: positions to reserve; the source's by default.
        compressor: of a group: None, or "zstd".
        overwrite: replace a cache that is there already.
        verify: read the whole copy back, and compare it with its checksums, before it counts as whole.
        durable: a group in a folder survives power loss on return; without, when the system has written it.
        break_lock: of an object store: take the lock from a writer that is certainly gone.
        source_options, target_options: `storage_options` of either.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CacheExistsError: there is something at `target` that is no part of this copy; or it is the source, a group.
        CorruptCacheError: a block does not match its checksum, in the source or read back.
        PositionOutOfRangeError, LayerOutOfRangeError: there are no such positions or layers.
        CapacityExceededError: `capacity` is too small.
        CacheChangedError: the source's writer took positions back meanwhile.
        CacheLockedError: somebody writes to the target.
        CacheNotFoundError, FormatError, StoreError, OSError: as in `open` and `create`.
    """
    with opened(source, source_options) as cache:
        plan = _Plan.make(cache, start, stop, layers, capacity)
        group = group_at(target, target_options, durable=durable)
        if group is None:
            if compressor is not None:
                raise not_compressed(target)
            return _to_file(plan, local_path(target), overwrite, verify, progress)
        return _to_group(plan, group, compressor, overwrite, verify, break_lock, progress)


def fetch(
    source: PathLike,
    target: PathLike,
    *,
    overwrite: bool = False,
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> QuantizedKvCache:
    """Bring a remote cache to this machine once, and open it here: download it into a `.kvm` file, mapped for reading.

    A file at `target` that holds the very same already is opened as it is, after one request; otherwise the file
    appears when it is whole. Interrupted, the same call goes on.

    Args:
        source: path or URL of a cache.
        target: path of the file.
        overwrite: replace a cache that is there and holds something else.
        verify: as in `copy`.
        storage_options: the source's.
        progress: called with (bytes done, bytes in all) now and then.

    Raises:
        CacheExistsError: there is something else at `target`.
        CacheNotFoundError, CorruptCacheError, StoreError, OSError: as in `copy`.
    """
    with open_cache(source, storage_options=storage_options) as cache:
        if os.path.exists(local_path(target)):
            with contextlib.suppress(FormatError):
                present = open_cache(target)
                if _same(present.storage, cache.storage):
                    return present
                present.close()
        copy(cache, target, overwrite=overwrite, verify=verify, progress=progress)
    return open_cache(target)


@contextlib.contextmanager
def opened(source: PathLike | QuantizedKvCache, options: Mapping[str, Any] | None) -> Iterator[QuantizedKvCache]:
    """Open a source, or take one that is open already, and leave it so."""
    if isinstance(source, QuantizedKvCache):
        yield source
        return
    with open_cache(source, storage_options=options) as cache:
        yield cache


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is to be copied."""

    source: Storage
    layers: list[int]
    start: int
    length: int
    """Positions to copy."""
    tokens: int
    """Token ids to copy."""
    geometry: CacheGeometry
    stamp: str
    """Names the copy: the same as long as what is copied begins the same."""

    @classmethod
    def make(
        cls,
        cache: QuantizedKvCache,
        start: int,
        stop: int | None,
        layers: Sequence[int] | None,
        capacity: int | None,
    ) -> _Plan:
        source = cache.storage
        start, stop = check_range(start, cache.seq_len if stop is None else stop, cache.seq_len)
        chosen = [cache.layers.check(layer) for layer in (range(cache.num_layers) if layers is None else layers)]
        geometry = replace(
            cache.geometry,
            layers=tuple(cache.geometry.layers[layer] for layer in chosen),
            capacity=cache.capacity if capacity is None else index(capacity, "capacity"),
        )
        check_room(0, stop - start, geometry.capacity)
        identity = source.identity() or secrets.token_hex(8)  # what lies in memory can't be known again
        facts = [identity, start, chosen, geometry.capacity, source.document.encode().decode()]
        stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        tokens = max(0, min(cache.token_len, stop) - start)
        return cls(source, chosen, start, stop - start, tokens, geometry, stamp)

    @property
    def position_bytes(self) -> int:
        return sum(layer.position_bytes for layer in self.geometry.layers)

    @property
    def keeps_sums(self) -> bool:
        """True if blocks of the copy have the checksums that they have in the source."""
        return self.start == 0 and self.layers == list(range(len(self.source.layers)))


def _to_file(plan: _Plan, path: str, overwrite: bool, verify: bool, progress: Progress | None) -> CopyReport:
    path = place_of(path, overwrite=overwrite)
    partial = f"{path}.{plan.stamp}.partial"
    meter = _Meter(plan, verify, progress)
    if not os.path.exists(partial):
        next(_reading_ahead(plan, _edges(plan, 0)), None)  # it comes while the file is made
    with contextlib.closing(_open_partial(plan, partial)) as writer:
        resumed = seq_len(writer)
        with _Writing(writer) as writing:
            for stop in _fill(plan, writer, writing, check=True):
                meter.reached(stop)
        if plan.keeps_sums and plan.length == plan.source.committed_len:
            size = plan.geometry.block_tokens
            sums = plan.source.committed_sums(writer.committed_len // size, -(-plan.length // size))
            writer.tell_sums(plan.length, sums)
    if verify:
        with contextlib.closing(MappedReader.open(partial)) as reader:
            _refuse_unsound(reader.verify(meter.verifying))
    place_file(partial, path, overwrite=overwrite)
    return _report(plan, path, resumed, verify)


class _Putting:
    """Puts rows where they belong in a group, which has threads of its own."""

    def __init__(self, target: Storage) -> None:
        self._target = target

    def put(self, layer: int, start: int, rows: Rows) -> None:
        self._target.layers[layer].write(start, rows)

    def wait(self) -> None:
        """Their source may forget them: a group has taken them."""


class _Writing:
    """Writes rows to a file by other threads, while this one waits for the next; and the disk begins at once."""

    def __init__(self, target: MappedWriter) -> None:
        self._layers = target.layers
        self._pool = ThreadPoolExecutor(WRITERS)
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def put(self, layer: int, start: int, rows: Rows) -> None:
        """Start; wait if there is much to write already."""
        size = sum(array.nbytes for _, array in rows.named())
        self._under_way.append((size, self._pool.submit(self._write, layer, start, rows)))
        self._bytes += size
        while self._bytes > BACKLOG_BYTES and len(self._under_way) > 1:
            self._wait_for_one()

    def _write(self, layer: int, start: int, rows: Rows) -> None:
        self._layers[layer].write(start, rows)
        self._layers[layer].start_sync(start, start + len(rows.key_codes))

    def _wait_for_one(self) -> None:
        size, writing = self._under_way.popleft()
        self._bytes -= size
        writing.result()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: something is not.
        """
        while self._under_way:
            self._wait_for_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)


def _open_partial(plan: _Plan, partial: str) -> MappedWriter:
    """Go on with what an interrupted copy has left, or begin."""
    try:
        writer = MappedWriter.open_locked(partial, timeout=0)
        if writer.geometry == plan.geometry and seq_len(writer) <= plan.length:
            return writer
        writer.close()
        remove_file(partial, 0)
    except CacheNotFoundError:
        pass
    except FormatError:
        os.unlink(partial)  # nobody but a copy gives files such names
    room = max(METADATA_ROOM, len(plan.source.document.encode()))
    return MappedWriter.create(partial, plan.geometry, plan.source.document, metadata_room=room)


def _to_group(
    plan: _Plan,
    objects: Objects,
    compressor: str | None,
    overwrite: bool,
    verify: bool,
    break_lock: bool,
    progress: Progress | None,
) -> CopyReport:
    from .storage.zarr_place import create_group, open_locked
    from .storage.zarr_reader import read_root

    going_on = False
    with contextlib.suppress(CacheNotFoundError, FormatError):  # making one finds out what is there
        present = read_root(objects)[0]
        going_on = present.copying == plan.stamp
        if f"{present.cache_id}/{present.generation}" == plan.source.identity():
            raise CacheExistsError(
                f"{objects.url}: is the source itself, and would be lost before it is copied: name another place",
                path=objects.url,
            )
    if going_on:
        writer = open_locked(objects, keep_copying=True, break_lock=break_lock)
        if seq_len(writer) > plan.length:
            writer.truncate(plan.length)
    else:
        writer = create_group(
            objects,
            plan.geometry,
            plan.source.document,
            compressor=compressor,
            overwrite=overwrite,
            break_lock=break_lock,
            copying=plan.stamp,
        )
    try:
        resumed = seq_len(writer)
        meter = _Meter(plan, verify, progress)
        for stop in _fill(plan, writer, _Putting(writer), check=not plan.keeps_sums):
            meter.reached(stop)
            committed = writer.root.seq_len
            if stop == plan.length or (stop - committed) * plan.position_bytes >= COMMIT_BYTES:
                writer.store_rows(stop)
                if plan.keeps_sums:
                    _compare(plan, writer, committed, stop)
                writer.commit()
        if verify:
            _refuse_unsound(writer.verify(meter.verifying))
        writer.copying = None
        writer.close()
    except BaseException:
        writer.abandon()  # as of its last commit
        raise
    return _report(plan, writer.path, resumed, verify)


def _fill(plan: _Plan, target: Storage, rows: _Putting | _Writing, *, check: bool) -> Iterator[int]:
    """Append to the target what it lacks, and yield its length after every step.

    Args:
        rows: how they are put there.
        check: compare the source's rows with their checksums first; without, whoever asks does so afterwards.
    """
    source, first = plan.source, plan.start
    edges = _edges(plan, seq_len(target))
    ids = source.read_tokens(first + plan.tokens)[first:]
    ahead = _reading_ahead(plan, edges)
    for start, stop in itertools.pairwise(edges):
        if check:
            source.check_rows(first + start, first + stop)
        for number, layer in enumerate(plan.layers):
            next(ahead)
            position = target.layers[number].begin(stop - start)
            for part in _pieces(source.layers[layer], first + start, first + stop, check=check):
                rows.put(number, position, part)
                position += len(part.key_codes)
        rows.wait()
        source.check()  # the rows were still the source's when they had been read
        recorded = target.token_len
        if recorded < min(stop, plan.tokens):
            target.write_tokens(recorded, ids[recorded:stop])
            target.publish_tokens(min(stop, plan.tokens))
        for store in target.layers:
            store.publish(stop)
        yield stop


def _pieces(layer: LayerStore, start: int, stop: int, *, check: bool) -> Iterator[Rows]:
    """Yield positions of a layer; compared with their checksums, unless they lie in a map and that is done later."""
    if layer.in_memory and not check:
        yield layer.slabs().part(start, stop)
    else:
        yield from layer.stretches(start, stop)


def _edges(plan: _Plan, begun: int) -> list[int]:
    """Return where steps start and end, from a length that the target has."""
    return [begun, *range(begun // STEP_TOKENS * STEP_TOKENS + STEP_TOKENS, plan.length, STEP_TOKENS), plan.length]


def _reading_ahead(plan: _Plan, edges: Sequence[int]) -> Iterator[None]:
    """Once for every layer of every step: see that what comes next is on its way."""
    work = [(start, stop, layer) for start, stop in itertools.pairwise(edges) for layer in plan.layers]
    sizes = [(stop - start) * plan.source.geometry.layers[layer].position_bytes for start, stop, layer in work]
    asked, room = 0, AHEAD_BYTES
    for number, size in enumerate(sizes):
        while asked < len(work) and (room > 0 or asked <= number):
            start, stop, layer = work[asked]
            plan.source.layers[layer].expect(plan.start + start, plan.start + stop)
            room -= sizes[asked]
            asked += 1
        room += size
        yield


def _compare(plan: _Plan, writer: ZarrWriter, start: int, stop: int) -> None:
    """Compare blocks that were stored with the checksums that the source has of them."""
    size, committed = plan.geometry.block_tokens, plan.source.committed_len
    last = -(-stop // size) if stop == committed else min(stop, committed) // size
    if last <= start // size:
        return
    expected = plan.source.committed_sums(start // size, last)
    found = writer.sums_below(stop)[start // size : last]
    for block, layer in zip(*np.nonzero(expected != found), strict=True):
        position = (start // size + int(block)) * size
        raise CorruptCacheError(
            f"{plan.source.path}: layer {layer} is damaged in positions [{position}, {min(position + size, stop)}): "
            "checksum does not match; the copy ends before",
            path=plan.source.path,
            layer=int(layer),
            position=position,
        )


class _Meter:
    """Counts bytes for a progress function: those copied, and those verified again."""

    def __init__(self, plan: _Plan, verify: bool, progress: Progress | None) -> None:
        self._progress = progress
        self._position_bytes = plan.position_bytes
        self._copied = plan.length * plan.position_bytes
        self._total = self._copied * (2 if verify else 1)

    def reached(self, length: int) -> None:
        if self._progress:
            self._progress(length * self._position_bytes, self._total)

    def verifying(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(min(self._total, self._copied + done), self._total)


def _refuse_unsound(report: VerifyReport) -> None:
    for damage in report.damages:
        raise CorruptCacheError(
            f"{report.path}: the copy was read back and is damaged: {damage.what}",
            path=report.path,
            layer=damage.layer,
            position=damage.start,
        )


def _report(plan: _Plan, target: str, resumed: int, verified: bool) -> CopyReport:
    size = plan.length * plan.position_bytes
    return CopyReport(target=target, seq_len=plan.length, bytes=size, resumed=resumed, verified=verified)


def _same(one: Storage, other: Storage) -> bool:
    """True if two caches certainly hold the same: rows, token ids, model and metadata."""
    length = one.committed_len
    if not length == seq_len(one) == seq_len(other) == other.committed_len:
        return False
    shapes = [(storage.geometry.layers, storage.geometry.block_tokens, storage.token_len) for storage in (one, other)]
    if shapes[0] != shapes[1] or one.document.encode() != other.document.encode():
        return False
    blocks = -(-length // one.geometry.block_tokens)
    return np.array_equal(one.committed_sums(0, blocks), other.committed_sums(0, blocks)) and np.array_equal(
        one.read_tokens(one.token_len), other.read_tokens(other.token_len)
    )
