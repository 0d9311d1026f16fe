"""A segment's file as a stream of bytes, without its holes: what an object store keeps of it.

    8 bytes "KVMPACK1", u32 n, n bytes of JSON {"size": file bytes, "extents": [[start, stop], ...]}, then the extents

The stream is cut into parts, one object each. Its digest covers all of them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator

import xxhash

from ..errors import CorruptCacheError
from ..storage.posix import PosixFile

MAGIC = b"KVMPACK1"
PART_BYTES = 64 << 20
"""Bytes of a part: several are sent at once."""

_LENGTH = struct.Struct("<I")
_MOST_HEADER = 16 << 20


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
        digest = xxhash.xxh3_128()
        for one in self._views:
            digest.update(one)
        self.digest = digest.hexdigest()
        """Of the stream, 32 hexadecimal digits."""

    def parts(self) -> Iterator[list[memoryview]]:
        """Yield the parts, each as views of the mapped file."""
        part: list[memoryview] = []
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


def unpack(pieces: Iterable[bytes | memoryview], fd: int, path: str, digest: str) -> None:
    """Write a stream to an empty file.

    Args:
        pieces: of the stream, in order.
        fd: the file.
        path: for messages.
        digest: of the stream.

    Raises:
        CorruptCacheError: the stream is not what it should be.
        OSError: the disk is full or failing.
    """
    state = xxhash.xxh3_128()
    head = bytearray()
    extents: list[list[int]] | None = None
    for piece in pieces:
        state.update(piece)
        rest = memoryview(piece)
        if extents is None:
            head += rest
            found = _header(head, path)
            if found is None:
                continue
            size, extents, used = found
            os.ftruncate(fd, size)
            rest = memoryview(bytes(head[used:]))
        _write(fd, extents, rest, path)
    if extents is None or extents or state.hexdigest() != digest:
        raise CorruptCacheError(f"{path}: what the object store has of it is damaged or cut off", path=path)


def _header(data: bytearray, path: str) -> tuple[int, list[list[int]], int] | None:
    """Return file size, extents, and the bytes that these take; None if more is needed."""
    start = len(MAGIC) + _LENGTH.size
    if len(data) < start:
        return None
    (length,) = _LENGTH.unpack_from(data, len(MAGIC))
    if not data.startswith(MAGIC) or length > _MOST_HEADER:
        raise CorruptCacheError(f"{path}: what the object store has of it is no packed segment", path=path)
    if len(data) < start + length:
        return None
    try:
        header = json.loads(data[start : start + length])
        size, extents = int(header["size"]), [[int(low), int(high)] for low, high in header["extents"]]
    except (ValueError, TypeError, KeyError) as error:
        raise CorruptCacheError(f"{path}: what the object store has of it is damaged: {error}", path=path) from error
    ends = [0, *(end for extent in extents for end in extent), size]
    if ends != sorted(ends):
        raise CorruptCacheError(f"{path}: what the object store has of it is damaged: odd extents", path=path)
    return size, extents, start + length


def _write(fd: int, extents: list[list[int]], data: memoryview, path: str) -> None:
    while len(data):
        if not extents:
            raise CorruptCacheError(f"{path}: what the object store has of it is too long", path=path)
        low, high = extents[0]
        count = os.pwrite(fd, data[: high - low], low)
        data = data[count:]
        extents[0][0] += count
        if extents[0][0] == high:
            extents.pop(0)
