"""Which pages of a mapped file are in memory: reading them ahead, scanning, and dropping them.

Works on byte ranges of a file and its map, whatever they contain. All calls are advice to the system: none changes what
is read, and where a system does not support one, nothing happens.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from concurrent.futures import Future

Ranges = Sequence[tuple[int, int]]
"""(start, stop) in bytes of the file."""

SCAN_BYTES = 12 << 20
"""Bytes of a part of `scan`. Two parts are in memory at a time; with smaller ones, disk and threads start too often."""

_PAGE = mmap.PAGESIZE
_DROP = getattr(mmap, "MADV_DONTNEED", None)
_POPULATE_READ = 22  # MADV_POPULATE_READ, which Python has no name for


def drop_pages(memory: mmap.mmap, ranges: Ranges) -> None:
    """Drop the pages that are entirely within byte ranges of a map. They are read again when they are next used.

    This process's memory gets smaller; the system keeps what it has read until it needs the room, for all processes.
    """
    if _DROP is None:
        return
    for start, stop in ranges:
        first, last = _up(start), _down(stop)
        if first < last:
            memory.madvise(_DROP, first, last - first)


def map_pages(memory: mmap.mmap, start: int, stop: int) -> None:
    """Map the pages of a byte range that is about to be read; those that the disk can't give stay as they are."""
    with contextlib.suppress(OSError):  # systems before Linux 5.14 do not know it
        memory.madvise(_POPULATE_READ, _down(start), stop - _down(start))


def expect_few_pages(memory: mmap.mmap, size: int) -> None:
    """Tell the kernel not to read around what is touched in the first `size` bytes of a map.

    It would, as far as the disk's read-ahead goes (128 KiB to 8 MiB), holes included: opening a thousand caches would
    push gigabytes of zeros through the page cache.
    """
    if hasattr(mmap, "MADV_RANDOM"):
        memory.madvise(mmap.MADV_RANDOM, 0, size)


def scan(memory: mmap.mmap, offsets: Sequence[int], row_bytes: Sequence[int], start: int, stop: int) -> Iterator[range]:
    """Yield positions [start, stop) in parts whose pages are in memory already, and drop the pages of past parts.

    While a part is used, two threads touch the pages of the next one, an array each, in file order, which suits the
    system's read-ahead best. Measured with attention over cold files, one such thread is 1.2 times as fast as none, and
    two are 1.3 times as fast as one. MADV_WILLNEED for the next part is slower than nothing, because it reads single
    pages.

    Args:
        memory: the map of the whole file.
        offsets: where each array begins in it.
        row_bytes: bytes of one position in each array.
        start: first position.
        stop: one past the last.
    """
    step = max(1, SCAN_BYTES // sum(row_bytes))
    parts = [range(first, min(first + step, stop)) for first in range(start, stop, step)]

    def ranges(part: range) -> Ranges:
        # A page that two parts share belongs to the second: each begins with the page of its first byte.
        return [
            (_down(at + part.start * row), at + part.stop * row) for at, row in zip(offsets, row_bytes, strict=True)
        ]

    if not parts:
        return
    # Imported here because it takes longer to load than a file to open, and few programs scan.
    from concurrent.futures import ThreadPoolExecutor, wait

    with ThreadPoolExecutor(2) as helpers:

        def touch(part: range) -> list[Future[None]]:
            return [helpers.submit(touch_pages, memory, low, high) for low, high in ranges(part)]

        ready = touch(parts[0])
        try:
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                wait(ready)
                if following is not None:
                    ready = touch(following)
                yield part
                drop_pages(memory, ranges(part))
        finally:
            wait(ready)
            drop_pages(memory, [(low, _up(high)) for low, high in ranges(range(start, stop))])


def touch_pages(memory: mmap.mmap, start: int, stop: int) -> None:
    """Read one byte of every page of a byte range, so that they are in memory; other threads run meanwhile."""
    if start < stop:
        np.frombuffer(memory, np.uint8)[start:stop:_PAGE].max()  # numpy releases the GIL for it


def _down(offset: int) -> int:
    return offset - offset % _PAGE


def _up(offset: int) -> int:
    return _down(offset + _PAGE - 1)
