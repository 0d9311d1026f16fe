"""What a segment's file holds, for the index: its committed length, token ids, hashes and checkpoints.

A segment that nobody writes, and whose writer died, is committed as far as it was published before it is described.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..cache_reader import CacheReader
from ..errors import CacheLockedError, CorruptCacheError, KvmmapError
from ..format import PAGE, Section, Superblock
from ..geometry import BLOCK_TOKENS
from ..opening import open_cache
from ..storage.file.chain import ChainStorage
from ..storage.file.mapped_file import read_superblock
from ..storage.file.placement import refuse_locked
from ..storage.file.reader import MappedReader
from ..storage.posix import PosixFile
from .hashing import Prompt, block_hashes, head_of
from .index import Contents
from .namespace import NOTES, digest_of
from .segment import Segment

NO_TOKEN_ID = -1


class Description(NamedTuple):
    """A segment's file, described by itself."""

    namespace: str
    """Digest of its namespace."""
    document: dict[str, Any]
    """That of the namespace."""
    model: str
    position_bytes: int
    parent: str | None
    """Name of its parent."""
    start: int
    contents: Contents


def read_own_tokens(segment: Segment, count: int) -> NDArray[np.int32]:
    """Return a segment's first own token ids, at most `count`, as they are in its file; none if it is gone."""
    # Opened and read without any of the rest: a lookup reads those of a whole chain. What is damaged matches nothing.
    try:
        fd = os.open(segment.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return np.empty(0, np.int32)
    try:
        data = os.pread(fd, 4 * max(count, 0), segment.token_offset)
    except OSError:
        return np.empty(0, np.int32)
    finally:
        os.close(fd)
    return np.frombuffer(data[: len(data) // 4 * 4], "<i4")


def known_length(cache: CacheReader, committed: int) -> int:
    """Return how many committed positions, from 0, have token ids."""
    ids = cache.token_ids[:committed]
    unknown = np.flatnonzero(ids == NO_TOKEN_ID)
    return int(unknown[0]) if len(unknown) else len(ids)


def own_file(cache: CacheReader) -> tuple[PosixFile, Superblock]:
    """Return the file of an open segment itself, without those that it continues."""
    storage = cache.storage
    own = storage.own if isinstance(storage, ChainStorage) else storage
    assert isinstance(own, MappedReader)
    return own.file, own.superblock


def contents_of(cache: CacheReader, seed: bytes, start: int) -> Contents:
    """Describe an open segment for the index.

    Args:
        cache: the segment, open.
        seed: the namespace's.
        start: its first own position.

    Raises:
        CorruptCacheError: token ids do not match their checksums.
    """
    committed = min(cache.storage.committed_len, cache.seq_len)
    stop = known_length(cache, committed)
    ids = cache.token_ids[:stop]
    file, superblock = own_file(cache)
    hashes = b"".join(block_hashes(seed, ids, start // cache.geometry.block_tokens))
    checkpoints = cache.checkpoints if cache.states else None
    old = sum(not found.pinned for found in checkpoints[:-1]) if checkpoints else 0
    return Contents(
        stop=max(start, stop),
        head=head_of(ids[start:]),
        hashes=hashes,
        token_offset=superblock.section(Section.TOKEN_IDS).offset,
        checkpoints=None if checkpoints is None else tuple([found.position for found in checkpoints]),
        disk_bytes=file.stat().st_blocks * 512,
        spare_bytes=old * superblock.checkpoint_layout.size if old else 0,
        points=_points(seed, ids, [found.position for found in checkpoints or ()]),
    )


def _points(seed: bytes, ids: NDArray[np.int32], positions: Sequence[int]) -> tuple[tuple[int, bytes, bytes], ...]:
    """Return what the index has of checkpoints: see `Contents.points`."""
    prompt = Prompt(seed, ids)
    return tuple(
        [
            (position, prompt.hash(position // BLOCK_TOKENS), prompt.hash_at(position))
            for position in positions
            if position <= len(ids)
        ]
    )


def describe(path: str) -> Description:
    """Describe a segment by its file alone.

    Raises:
        FormatError, CacheNotFoundError, OSError: it can't be read, or is not a segment of a library.
        CacheLockedError: a session writes it.
    """
    commit_published(path)
    with open_cache(path, record_use=False) as cache:
        notes = cache.metadata.get(NOTES)
        if not isinstance(notes, dict) or not isinstance(notes.get("namespace"), dict):
            raise CorruptCacheError(f"{path}: is not a segment of a library: add it with put()", path=path)
        document = notes["namespace"]
        digest = digest_of(document)
        storage = cache.storage
        parent, start = None, 0
        if isinstance(storage, ChainStorage):
            parent, start = storage.ancestors[-1].record.name.removesuffix(".kvm"), storage.base
        return Description(
            namespace=digest,
            document=document,
            model=(cache.model.name if cache.model else None) or "",
            position_bytes=sum(layer.position_bytes for layer in cache.geometry.layers) + 4,
            parent=parent,
            start=start,
            contents=contents_of(cache, bytes.fromhex(digest), start),
        )


def commit_published(path: str) -> None:
    """Commit what a dead process has published of a segment and not committed.

    Raises:
        CacheLockedError: a writer has it open.
        FormatError, CacheNotFoundError, OSError: it can't be opened.
    """
    with open_cache(path, record_use=False) as cache:
        whole = cache.facts()["state"] == "closed"
    if not whole:
        open_cache(path, "a", record_use=False).close()


def was_committed(path: str) -> bool:
    """False for a file of which nothing was ever durable, because the machine crashed before its first commit.

    The file system then has its name, and zeros where its superblock or its commits should be.
    """
    try:
        with contextlib.closing(PosixFile.open(path, writable=False)) as file:
            if not any(file.read(0, PAGE)):
                return False
            superblock = read_superblock(file)
            slots = [superblock.section(section) for section in (Section.SLOT_A, Section.SLOT_B)]
            return any(any(file.read(slot.offset, slot.size)) for slot in slots)
    except (KvmmapError, OSError):
        return True


@contextlib.contextmanager
def held(path: str) -> Iterator[PosixFile]:
    """Hold a segment's writer lock, so that no session appends to it meanwhile.

    Raises:
        CacheLockedError: a session does.
        FileNotFoundError: there is no such file.
        FormatError: it is no cache.
    """
    with contextlib.closing(PosixFile.open(path, writable=False)) as file:
        if not file.try_lock():
            refuse_locked(file, read_superblock(file))
        if not file.is_at(path):
            raise FileNotFoundError(path)
        yield file


def is_written(path: str) -> bool:
    """True if a session has a segment open for appending."""
    try:
        with held(path):
            return False
    except CacheLockedError:
        return True
    except OSError:
        return False


def disk_bytes(path: str) -> int:
    """Return a file's bytes on the disk; 0 if it is gone."""
    try:
        return os.stat(path).st_blocks * 512
    except FileNotFoundError:
        return 0
