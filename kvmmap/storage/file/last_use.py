"""When a cache file was last used: its access time, which kvmmap sets itself.

A use is reading rows, attending over them, or appending through a handle that was opened for that. Looking at a cache
(`inspect`, `verify`, `find`, `report`, `gc`, copying) is none: such handles open the file with O_NOATIME. The system's
own rules for access times (relatime, noatime) are too coarse, and count every reader; so each use stores the present
time, at most once a minute a handle.

The time is kept outside the file's bytes, because a reader never writes into a cache.
"""

from __future__ import annotations

import contextlib
import time

from ..posix import PosixFile

INTERVAL = 60.0
"""Seconds for which a handle does not store its use again."""


def last_use_ns(file: PosixFile) -> int:
    """Return when the file was last used, in nanoseconds since 1970: read or written, whichever is later."""
    status = file.stat()
    return max(status.st_atime_ns, status.st_mtime_ns)


class UseRecorder:
    """Stores that one open file is in use, seldom enough to cost nothing."""

    def __init__(self, file: PosixFile) -> None:
        self._file = file
        self.due = 0.0
        """When the use is to be stored again, by `time.monotonic`."""

    def record(self) -> None:
        """Store the present time. The caller ensures that the file is not closed meanwhile.

        A file that can't be changed (a read-only file system, another user's file) keeps what the system stores. On
        overlayfs that is left to the system as well: to change anything of a file that lies in a lower layer would
        copy all of it, and leave this handle on the original.
        """
        self.due = time.monotonic() + INTERVAL
        if self._file.closed or self._file.on_overlay():
            return
        with contextlib.suppress(OSError):
            self._file.set_access_time(time.time_ns())
