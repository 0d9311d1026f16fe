"""What the system is told of how a file will be read, where it can be told: ahead of time, or at random."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_READ_AHEAD_BYTES = 128 << 10

if hasattr(os, "posix_fadvise"):

    def read_ahead(fd: int, offset: int, size: int) -> None:
        """Start reading `size` bytes from `offset` on into memory."""
        # Linux limits a request to the disk's read-ahead size, which is rarely less than this.
        for start in range(offset, offset + size, _READ_AHEAD_BYTES):
            count = min(_READ_AHEAD_BYTES, offset + size - start)
            os.posix_fadvise(fd, start, count, os.POSIX_FADV_WILLNEED)

    @contextlib.contextmanager
    def at_random(fd: int) -> Iterator[None]:
        """Have the system read what is asked for and no more, as long as the block runs.

        Read-ahead would fill holes behind what is read with zeros, in pages of up to 2 MiB, and ext4 then takes ten
        times as long to write a row there, since it looks at each 4 KiB of such a page.
        """
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        try:
            yield
        finally:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_NORMAL)

else:

    def read_ahead(fd: int, offset: int, size: int) -> None:
        """Do nothing: the system can't be told."""

    @contextlib.contextmanager
    def at_random(fd: int) -> Iterator[None]:
        """Run the block: the system can't be told."""
        yield
