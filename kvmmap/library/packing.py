"""A segment's file as a stream of bytes, without its holes: what an object store keeps of it.

    8 bytes "KVMPACK1", u32 n, n bytes of JSON {"size": file bytes, "extents": [[start, stop], ...]}, then the extents

The stream is cut into parts, one object each, with a digest each: they are sent, fetched, hashed and written side by
side.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import xxhash

from .. import _core
from ..errors import CorruptCacheError
from ..format import PAGE
from ..storage.posix import PosixFile

MAGIC = b"KVMPACK1"
PART_BYTES = 16 << 20
"""Bytes of a part, the last one excepted."""

AT_ONCE = 4
"""Parts that are sent or fetched at once."""

SYNC_BYTES = 4 << 20
"""Bytes that are written before the system is asked to begin writing them to the disk. A request for each MiB takes a
fetch to two thirds of the speed, and none leaves all of it to the sync at the end."""

_LENGTH = struct.Struct("<I")
_MOST_HEADER = 8 << 20

Part = list[memoryview]
Fetch = Callable[[], Iterable[memoryview]]
"""Fetches a part, in pieces."""


class Packed:
    """The stream of a file that nobody writes.

    Args:
        file: the file, open; it must stay so.
    """

    def __init__(self, file: PosixFile) -> None:
        extents = list(file.data_extents())
        size = file.stat().st_size
        header = json.dumps({"size": size, "extents": extents}).encode()
        head = MAGIC + _LENGTH.pack(len(header)) + header
        memory, start = file.map(0, size)
        view = memoryview(memory)[start:]
        self._views = [memoryview(head), *(view[low:high] for low, high in extents)]
        self.size = sum(len(view) for view in self._views)
        """Bytes of the stream."""

    def parts(self) -> Iterator[Part]:
        """Yield the parts, each as views of the mapped file."""
        part: Part = []
        room = PART_BYTES
        for view in self._views:
            while len(view):
                part.append(view[:room])
                room -= len(part[-1])
                view = view[len(part[-1]) :]
                if not room:
                    yield part
                    part, room = [], PART_BYTES
        if part:
            yield part


def digest(part: Iterable[memoryview]) -> str:
    """Return the digest of a part, 32 hexadecimal digits."""
    state = xxhash.xxh3_128()
    for view in part:
        state.update(view)
    return state.hexdigest()


def unpack(parts: Sequence[Fetch], fd: int, path: str, digests: Sequence[str]) -> None:
    """Write a stream to an empty file, fetching some of its parts at once.

    Args:
        parts: of the stream, in order.
        fd: the file.
        path: for messages.
        digests: of the parts.

    Raises:
        CorruptCacheError: the stream is not what it should be.
        OSError: the disk is full or failing.
        Whatever fetching raises.
    """
    if not parts or len(parts) != len(digests):
        raise _damaged(path)
    target = _Target(fd, path)
    with ThreadPoolExecutor(min(AT_ONCE, len(parts))) as pool:
        sizes = list(pool.map(target.take, itertools.count(), parts, digests))
    target.check(sum(sizes))


def _damaged(path: str) -> CorruptCacheError:
    return CorruptCacheError(f"{path}: what the object store has of it is damaged or cut off", path=path)


class _Written:
    """What one thread has written to a file and the system has not begun to write to the disk."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._low = self._high = 0

    def add(self, low: int, count: int) -> None:
        """Count bytes that were written."""
        if low != self._high:
            self.start_sync()
            self._low = low
        self._high = low + count
        if self._high - self._low >= SYNC_BYTES:
            # Not the page that the next write continues: that would wait until it is on the disk.
            whole = self._high - self._high % PAGE
            _core.start_sync(self._fd, self._low, whole - self._low)
            self._low = whole

    def start_sync(self) -> None:
        """Let the system begin with all."""
        if self._high > self._low:
            _core.start_sync(self._fd, self._low, self._high - self._low)
            self._low = self._high


class _Target:
    """A file that parts of a stream are written to, whichever comes first."""

    def __init__(self, fd: int, path: str) -> None:
        self._fd = fd
        self._path = path
        self._known = threading.Event()
        """Set when the header was read, or can't be."""
        self._starts: list[int] | None = None
        """Where in the stream each extent starts, and where the last one ends."""
        self._extents: list[list[int]] = []

    def take(self, number: int, fetch: Fetch, expected: str) -> int:
        """Write a part where it belongs; return its bytes."""
        try:
            return self._take(number, fetch, expected)
        finally:
            if number == 0:
                self._known.set()  # also after an error: the others wait for it

    def _take(self, number: int, fetch: Fetch, expected: str) -> int:
        state = xxhash.xxh3_128()
        written = _Written(self._fd)
        head = bytearray()
        begin = at = number * PART_BYTES
        for piece in fetch():
            state.update(piece)
            at += len(piece)
            if number == 0 and self._starts is None:
                head += piece
                used = self._read_header(head)
                if used:
                    self._write(used, memoryview(bytes(head[used:])), written)
                continue
            self._known.wait()
            if self._starts is None:
                raise _damaged(self._path)
            self._write(at - len(piece), piece, written)
        written.start_sync()
        if state.hexdigest() != expected:
            raise _damaged(self._path)
        return at - begin

    def check(self, size: int) -> None:
        """Raise unless a stream of so many bytes is complete."""
        if self._starts is None or self._starts[-1] != size:
            raise _damaged(self._path)

    def _read_header(self, data: bytearray) -> int:
        """Read the header; return its bytes, or 0 if more is needed."""
        start = len(MAGIC) + _LENGTH.size
        if len(data) < start:
            return 0
        (length,) = _LENGTH.unpack_from(data, len(MAGIC))
        if not data.startswith(MAGIC) or length > _MOST_HEADER:
            raise _damaged(self._path)
        if len(data) < start + length:
            return 0
        try:
            header = json.loads(data[start : start + length])
            size, extents = int(header["size"]), [[int(low), int(high)] for low, high in header["extents"]]
        except (ValueError, TypeError, KeyError) as error:
            raise _damaged(self._path) from error
        ends = [0, *(end for extent in extents for end in extent), size]
        if ends != sorted(ends):
            raise _damaged(self._path)
        os.ftruncate(self._fd, size)
        self._extents = extents
        self._starts = list(itertools.accumulate((high - low for low, high in extents), initial=start + length))
        self._known.set()
        return start + int(length)

    def _write(self, at: int, data: memoryview, written: _Written) -> None:
        """Write what the stream has from `at` on."""
        starts = self._starts
        assert starts is not None
        while len(data):
            number = bisect.bisect_right(starts, at) - 1
            if not 0 <= number < len(self._extents):
                raise _damaged(self._path)
            low, high = self._extents[number]
            low += at - starts[number]
            count = os.pwrite(self._fd, data[: high - low], low)
            written.add(low, count)
            data, at = data[count:], at + count
