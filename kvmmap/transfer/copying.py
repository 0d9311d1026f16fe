"""Copies of caches between storages, bit by bit: file to group, group to file, one to its like; resumable, verified.

A copy to a file grows beside its place under a name of its own and takes the place when it is whole. A copy to a group
commits as it goes, and its root says what it is a copy of until it is whole. Either is gone on with by the same copy
started again, as long as the source has only grown: its identity and generation say so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cache import QuantizedKvCache
from ..errors import CacheExistsError, CacheNotFoundError, CorruptCacheError, FormatError
from ..opening import group_at, local_path, not_compressed, open_cache
from ..paths import PathLike
from ..storage.file.placement import METADATA_ROOM, place_file, place_of, remove_file
from ..storage.file.reader import MappedReader
from ..storage.file.writer import MappedWriter
from ..storage.objects.protocol import Objects
from ..storage.protocols import Progress, Storage, VerifyReport, seq_len
from ..storage.temporary import partial_path
from .filling import Plan, Putting, Writing, fill

if TYPE_CHECKING:
    from ..storage.zarr.writer import ZarrWriter

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
        plan = Plan.make(cache, start, stop, layers, capacity)
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
    with open_cache(source, storage_options=options, record_use=False) as cache:
        yield cache


def _to_file(plan: Plan, path: str, overwrite: bool, verify: bool, progress: Progress | None) -> CopyReport:
    path = place_of(path, overwrite=overwrite)
    partial = partial_path(path, plan.stamp)
    meter = _Meter(plan, verify, progress)
    with contextlib.closing(_open_partial(plan, partial)) as writer:
        resumed = seq_len(writer)
        with Writing(writer) as writing:
            for stop in fill(plan, writer, writing, check=True):
                meter.reached(stop)
        if plan.keeps_sums and plan.length == plan.source.committed_len:
            size = plan.geometry.block_tokens
            sums = plan.source.committed_checksums(writer.committed_len // size, -(-plan.length // size))
            writer.tell_sums(plan.length, sums)
    if verify:
        with contextlib.closing(MappedReader.open(partial)) as reader:
            _refuse_unsound(reader.verify(meter.verifying))
    place_file(partial, path, overwrite=overwrite)
    return _report(plan, path, resumed, verify)


def _open_partial(plan: Plan, partial: str) -> MappedWriter:
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
    plan: Plan,
    objects: Objects,
    compressor: str | None,
    overwrite: bool,
    verify: bool,
    break_lock: bool,
    progress: Progress | None,
) -> CopyReport:
    from ..storage.zarr.placement import create_group, open_locked
    from ..storage.zarr.reader import read_root

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
        for stop in fill(plan, writer, Putting(writer), check=not plan.keeps_sums):
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


def _compare(plan: Plan, writer: ZarrWriter, start: int, stop: int) -> None:
    """Compare blocks that were stored with the checksums that the source has of them."""
    size, committed = plan.geometry.block_tokens, plan.source.committed_len
    last = -(-stop // size) if stop == committed else min(stop, committed) // size
    if last <= start // size:
        return
    expected = plan.source.committed_checksums(start // size, last)
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

    def __init__(self, plan: Plan, verify: bool, progress: Progress | None) -> None:
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


def _report(plan: Plan, target: str, resumed: int, verified: bool) -> CopyReport:
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
    return np.array_equal(one.committed_checksums(0, blocks), other.committed_checksums(0, blocks)) and np.array_equal(
        one.read_tokens(one.token_len), other.read_tokens(other.token_len)
    )
