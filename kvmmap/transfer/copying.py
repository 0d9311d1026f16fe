"""Copies of caches between storages: file to group, group to file, one to its like; resumable, verified.

Rows are copied bit by bit, unless the copy is to have other codecs: then they are decoded and encoded again.

A copy to a file grows beside its place under a name of its own and takes the place when it is whole. A copy to a group
commits as it goes, and its root says what it is a copy of until it is whole. Either is continued by the same copy
started again, as long as the source has only grown: its identity and generation say so.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..cache import QuantizedKvCache
from ..codecs.presets import Codecs, chosen_codecs, chosen_recent
from ..errors import CorruptCacheError, FormatError
from ..opening import file_path, open_cache, place_of
from ..paths import PathLike
from ..storage.protocols import Progress, Storage, VerifyReport
from ..storage.receiving import CopyOptions, Receiver
from .filling import fill
from .plan import Plan, Recode
from .transcoding import LayerLoss


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
    """Positions of these that an earlier, interrupted copy had stored already."""

    verified: bool
    """True if the whole copy was read back and compared with its checksums."""

    source_bytes: int
    """Bytes of codes and scales that the same positions take in the source."""

    losses: tuple[LayerLoss, ...] = ()
    """What each layer lost by another codec, over the positions that this call copied; empty if codecs are the same."""


def copy(
    source: PathLike | QuantizedKvCache,
    target: PathLike,
    *,
    start: int = 0,
    stop: int | None = None,
    layers: Sequence[int] | None = None,
    capacity: int | None = None,
    key_codec: Codecs | None = None,
    value_codec: Codecs | None = None,
    preset: str | None = None,
    recent_window: int | None = None,
    sinks: int | None = None,
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

    If the cache has states, its checkpoints are copied, and positions up to the last checkpoint at or before `stop`.
    With other codecs than the source's, rows are decoded and encoded again, part by part; `CopyReport.losses` says what
    that cost. Keys or values whose codec stays the same are copied bit by bit.

    Committed blocks of the source are compared with their checksums on the way. Interrupted, the source is untouched,
    and the target not there (a file) or as of its last commit (a group); the same call again continues from there.

    Args:
        source: path or URL of a cache, or an open one.
        target: path or URL; what it ends with says what is made, as in `create`.
        start: first position to copy.
        stop: one past the last; all that are stored by default.
        layers: indices of the layers to copy, in the order that they get; all by default.
        capacity: positions to reserve; the source's by default.
        key_codec, value_codec: names of the codecs that the copy is to have; one for all, or one a layer of the copy;
            the preset's unless given, and without one the source's.
        preset: a pair of codecs, and whether some positions are kept in 16 bits besides, as in `create`.
        recent_window, sinks: last and first positions that the copy is to keep in 16 bits besides; the preset's unless
            given, and without one the source's. It keeps what the source has of them, and new ones as they come.
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
        NoCheckpointError: the source has states, and `start` is not 0.
        CapacityExceededError: `capacity` is too small.
        DtypeError: there is no such codec, or no such preset.
        ShapeMismatchError: a codec that can't have rows of a layer's head_dim, or not one a layer.
        NonFiniteError: a number that the other codec can't have; names layer, position and head.
        CacheChangedError: the source's writer truncated meanwhile.
        CacheLockedError: a writer has the target open.
        CacheNotFoundError, FormatError, StoreError, OSError: as in `open` and `create`.
    """
    with opened(source, source_options) as cache:
        if preset is not None:
            key_codec, value_codec = chosen_codecs(preset, key_codec, value_codec)
            recent_window, sinks = chosen_recent(preset, recent_window, sinks, key_codec, value_codec)
        recode = Recode(key_codec=key_codec, value_codec=value_codec, recent_window=recent_window, sinks=sinks)
        plan = Plan.make(cache, start, stop, layers, capacity, recode)
        options = CopyOptions(
            overwrite=overwrite, verify=verify, compressor=compressor, durable=durable, break_lock=break_lock
        )
        receiver = place_of(target, target_options).receive(plan.incoming, options)
        return _run(plan, receiver, options, progress)


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
    appears when it is whole. Interrupted, the same call continues.

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
        if os.path.exists(file_path(target)):
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


def _run(plan: Plan, receiver: Receiver, options: CopyOptions, progress: Progress | None) -> CopyReport:
    """Copy what a plan says into a receiver."""
    try:
        resumed = receiver.storage.seq_len
        meter = _Meter(plan, options.verify, progress)
        for length in fill(plan, receiver):
            meter.reached(length)
            receiver.stored(length)
        receiver.put_checkpoints()
        receiver.complete()
        if options.verify:
            _refuse_damaged(receiver.verify(meter.verifying))
        target = receiver.place()
    except BaseException:
        receiver.cancel()
        raise
    return CopyReport(
        target=target,
        seq_len=plan.length,
        bytes=plan.length * plan.incoming.position_bytes,
        resumed=resumed,
        verified=options.verify,
        source_bytes=plan.length * plan.source_position_bytes,
        losses=plan.losses(),
    )


class _Meter:
    """Counts bytes for a progress function: those copied, and those verified again."""

    def __init__(self, plan: Plan, verify: bool, progress: Progress | None) -> None:
        self._progress = progress
        self._position_bytes = plan.incoming.position_bytes
        self._copied = plan.length * self._position_bytes
        self._total = self._copied * (2 if verify else 1)

    def reached(self, length: int) -> None:
        if self._progress:
            self._progress(length * self._position_bytes, self._total)

    def verifying(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(min(self._total, self._copied + done), self._total)


def _refuse_damaged(report: VerifyReport) -> None:
    for damage in report.damages:
        raise CorruptCacheError(
            f"{report.path}: the copy was read back and is damaged: {damage.what}",
            path=report.path,
            layer=damage.layer,
            position=damage.start,
        )


def _same(one: Storage, other: Storage) -> bool:
    """True if two caches certainly hold the same: rows, token ids, model and metadata."""
    length = one.committed_len
    if not length == one.seq_len == other.seq_len == other.committed_len:
        return False
    shapes = [(replace(storage.geometry, capacity=0), storage.token_len) for storage in (one, other)]
    if shapes[0] != shapes[1] or one.document.encode() != other.document.encode():
        return False
    if one.geometry.states != other.geometry.states or one.checkpoints.all() != other.checkpoints.all():
        return False
    positions = [found.position for found in one.checkpoints.all()]
    if any(one.checkpoints.digests(position) != other.checkpoints.digests(position) for position in positions):
        return False
    blocks = -(-length // one.geometry.block_tokens)
    return np.array_equal(one.committed_checksums(0, blocks), other.committed_checksums(0, blocks)) and np.array_equal(
        one.read_tokens(one.token_len), other.read_tokens(other.token_len)
    )
