"""The bytes of a state, in a file or in memory, read piece by piece. A piece that is not all there is an error."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheNotFoundError, NotACacheError
from ...paths import PathLike, place_text


class Source:
    """Bytes with a length; a reader advances through them."""

    def __init__(self, name: str, size: int, *, fd: int = -1, data: NDArray[np.uint8] | None = None) -> None:
        self.name, self.size = name, size
        self._fd, self._data = fd, data

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes from `offset` on.

        Raises:
            NotACacheError: the state ends before.
        """
        if not 0 <= size <= self.size - offset:
            raise self.refused(f"it ends at byte {self.size}, and bytes {offset} to {offset + size} are needed")
        if self._data is not None:
            return self._data[offset : offset + size]
        out = np.empty(size, np.uint8)
        done = 0
        while done < size:
            count = os.preadv(self._fd, [out[done:].data], offset + done)
            if not count:  # another program is writing the file
                raise self.refused("it has become shorter while it was read")
            done += count
        return out

    def records(self, offset: int, dtype: np.dtype[Any], count: int, step: int) -> NDArray[Any]:
        """Return `count` records, each `step` bytes behind the one before.

        Raises:
            NotACacheError: the state ends before.
        """
        if self._data is None or not count:
            parts = [self.read(offset + step * n, dtype.itemsize) for n in range(count)]
            return np.frombuffer(b"".join([part.tobytes() for part in parts]), dtype)
        self.read(offset + step * (count - 1), dtype.itemsize)
        return np.ndarray(count, dtype, self._data.data, offset, (step,))

    def refused(self, reason: str) -> NotACacheError:
        """Return the error that says why this is no state."""
        return NotACacheError(f"{self.name}: not a state of llama.cpp that can be read: {reason}", path=self.name)


class Reader:
    """Numbers one after another."""

    def __init__(self, source: Source, offset: int = 0) -> None:
        self.source, self.offset = source, offset

    @property
    def left(self) -> int:
        """Bytes that are left."""
        return self.source.size - self.offset

    def take(self, size: int) -> NDArray[np.uint8]:
        """Return the next `size` bytes."""
        found = self.source.read(self.offset, size)
        self.offset += size
        return found

    def skip(self, size: int) -> int:
        """Go on behind `size` bytes, which must be there; return where they begin."""
        if not 0 <= size <= self.left:
            raise self.source.refused(
                f"it ends at byte {self.source.size}, and {size} bytes from {self.offset} on are needed"
            )
        start, self.offset = self.offset, self.offset + size
        return start

    def array(self, dtype: Any, count: int) -> NDArray[Any]:
        """Return the next numbers of a dtype."""
        kind = np.dtype(dtype)
        return np.frombuffer(self.take(kind.itemsize * count).tobytes(), kind)

    def u32(self) -> int:
        """Return the next number."""
        return int.from_bytes(self.take(4).tobytes(), "little")

    def i32(self) -> int:
        """Return the next number."""
        return int.from_bytes(self.take(4).tobytes(), "little", signed=True)

    def u64(self) -> int:
        """Return the next number."""
        return int.from_bytes(self.take(8).tobytes(), "little")


@contextlib.contextmanager
def open_source(path_or_data: PathLike | bytes | bytearray | memoryview | NDArray[np.uint8]) -> Iterator[Source]:
    """Open a file, or bytes in memory.

    Raises:
        CacheNotFoundError: there is no such file.
        NotACacheError: a folder or a device.
        OSError: it can't be read.
    """
    if isinstance(path_or_data, bytes | bytearray | memoryview | np.ndarray):
        data = np.frombuffer(path_or_data, np.uint8)
        yield Source("the state", len(data), data=data)
        return
    path = place_text(path_or_data)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe must not hang
    except FileNotFoundError:
        raise CacheNotFoundError(f"{path}: there is no such file", path=path) from None
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            what = "a folder" if stat.S_ISDIR(found.st_mode) else "not a regular file"
            raise NotACacheError(f"{path}: not a state of llama.cpp: it is {what}", path=path)
        yield Source(path, found.st_size, fd=fd)
    finally:
        os.close(fd)
