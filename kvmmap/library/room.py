"""A library's budget, kept: room is made before an append, by evicting what is worth least.

Bytes are those on the disk, and those that sessions have reserved. A segment that a session writes is held by its
writer lock, and never goes. Processes that have an evicted file open keep reading it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import replace

from ..errors import CacheLockedError, KvmmapError, LibraryFullError
from ..storage.file.thinning import drop_old_checkpoints
from ..storage.process import is_running
from . import policy
from .contents import disk_bytes, held, is_written
from .index import GOING, Index, is_made_name
from .policy import Choice
from .segment import Segment

EMERGENCY_BYTES = 4 << 20
"""Bytes that are evicted at once where a full disk keeps the index from being written."""

SPARE_BYTES = 16 << 20
"""Bytes of the file system that are left free, for commits and for the index."""


class Room:
    """Keeps a library within its budget.

    Args:
        folder: the library's.
        index: its index.
        limit: returns the bytes to keep at most, or None.
        settle: brings the index up to date with segments whose writer has died.
    """

    def __init__(self, folder: str, index: Index, limit: Callable[[], int | None], settle: Callable[[], None]) -> None:
        self._folder = folder
        self._index = index
        self._limit = limit
        self._settle = settle
        self._emergency = threading.local()
        self.evicted: Callable[[int], None] = lambda size: None
        """Called with the bytes of a segment that was evicted."""

    def reserve(self, name: str, size: int) -> list[Choice]:
        """Reserve bytes for an append to a segment, evicting others as necessary; return which.

        Raises:
            LibraryFullError: there is not enough that may go.
        """
        settled = False
        gone: list[Choice] = []
        while True:
            need = self._missing_on_disk(size)
            if need <= 0 and self._index.reserve(name, size, self._limit()):
                return gone
            need = max(need, self._over(size))
            if need <= 0:
                continue
            if evicted := self.evict(need, keep=name):
                gone += evicted
                continue
            if not settled:  # what a dead process had reserved
                self._settle()
                settled = True
                continue
            self._refuse(size)

    def _over(self, size: int) -> int:
        limit = self._limit()
        return 0 if limit is None else self._index.usage()[0] + size - limit

    def _missing_on_disk(self, size: int) -> int:
        status = os.statvfs(self._folder)
        spare = min(SPARE_BYTES, status.f_blocks * status.f_frsize // 64)
        return size + spare - status.f_bavail * status.f_frsize

    def _refuse(self, size: int) -> None:
        limit, (used, count) = self._limit(), self._index.usage()
        if limit is not None and used + size > limit:
            raise LibraryFullError(
                f"{self._folder}: {size:,} bytes more don't fit: {used:,} of {limit:,} are used by {count:,} segments, "
                "and none of them may go (they are pinned, being written, or needed by one that is); nothing was "
                "appended: unpin some, or raise max_bytes",
                path=self._folder,
                expected=limit,
                actual=used + size,
            )
        raise LibraryFullError(
            f"{self._folder}: the disk is full, {size:,} bytes more don't fit, and no segment may go; nothing was "
            "appended: free some space",
            path=self._folder,
            actual=size,
        )

    # Evicting

    def evict(self, need: int, *, keep: str | None = None) -> list[Choice]:
        """Remove segments until so many bytes are free, or none may go; return which.

        Args:
            need: bytes.
            keep: name of a segment that stays.
        """
        gone: list[Choice] = []
        freed = 0
        tried: set[str] = {keep} if keep else set()
        thinner: set[str] = set()
        leaves: list[Segment] = []
        known_all = False
        while freed < need:
            if len(leaves) < policy.WINDOW and not known_all:
                # More than are chosen from, so that not every one that goes costs a query.
                found = self._index.oldest_leaves(2 * policy.WINDOW + len(tried))
                known_all = len(found) < 2 * policy.WINDOW + len(tried)
                leaves = [leaf for leaf in found if leaf.name not in tried]
            if not leaves:
                break
            leaf = policy.next_to_go(leaves)
            if policy.loses_checkpoints(leaf) and leaf.name not in thinner:
                thinner.add(leaf.name)
                if size := self._drop_checkpoints(leaf):
                    gone.append(policy.explain(leaf, "checkpoints", time.time()))
                    freed += size
                    leaves[leaves.index(leaf)] = replace(leaf, bytes=leaf.bytes - size)
                continue
            leaves.remove(leaf)
            if self.remove(leaf, evicting=True):
                gone.append(policy.explain(leaf, "broken" if leaf.broken else "room", time.time()))
                freed += leaf.bytes
                if leaf.parent_id:  # that may be a leaf now
                    leaves, known_all = [], False
            else:
                tried.add(leaf.name)
        return gone

    def make_room(self) -> bool:
        """Evict something on a disk that is too full to write to the index; False if nothing could go."""
        if getattr(self._emergency, "active", False):
            return False  # an index's method that is called below
        self._emergency.active = True
        try:
            freed = 0
            for leaf in self._index.oldest_leaves(2 * policy.WINDOW):
                if is_made_name(leaf.name) and self._remove_at_once(leaf):
                    freed += leaf.bytes
                if freed >= EMERGENCY_BYTES:
                    break
            return freed > 0
        finally:
            self._emergency.active = False

    def _remove_at_once(self, segment: Segment) -> bool:
        """Remove a leaf's file, and its row if the index can be written then; else `check` removes that."""
        with contextlib.suppress(LibraryFullError):
            return self.remove(segment, evicting=True)
        with contextlib.suppress(CacheLockedError, FileNotFoundError), held(segment.path):
            os.unlink(segment.path)
            with contextlib.suppress(LibraryFullError):
                self._index.remove(segment.name, evicted=True)
            self.evicted(segment.bytes)
            return True
        return False

    def _drop_checkpoints(self, segment: Segment) -> int:
        """Drop all but a segment's last checkpoint; return the bytes that this frees, 0 if nothing could be dropped."""
        try:
            kept = drop_old_checkpoints(segment.path)
        except (KvmmapError, OSError):
            return 0  # being written, gone, or damaged
        size = disk_bytes(segment.path)
        self._index.set_checkpoints(segment.name, kept, size)
        return max(0, segment.bytes - size)

    def plan(self, need: int, without: Collection[str] = ()) -> list[Choice]:
        """Return what `evict` would remove, and why; nothing is removed.

        Args:
            need: bytes.
            without: names of segments that have gone already.
        """
        segments = {segment.id: segment for segment in self._index.segments() if segment.name not in without}
        leaves = [one for one in segments.values() if not (one.children or one.pinned or one.writing)]
        return policy.choose(
            leaves,
            need,
            time.time(),
            lambda segment: is_made_name(segment.name) and not is_written(segment.path),
            lambda segment: segments.get(segment.parent_id),
        )

    def expiring(self) -> list[Choice]:
        """Return what `expire` would remove first."""
        now = time.time()
        leaves = [leaf for leaf in self._index.expired(now) if not is_written(leaf.path)]
        return [policy.explain(leaf, "expired", now) for leaf in leaves]

    def expire(self) -> list[Choice]:
        """Remove segments whose time to live is over; return which."""
        gone: list[Choice] = []
        now = time.time()
        while leaves := [leaf for leaf in self._index.expired(now) if self.remove(leaf, evicting=True)]:
            gone += [policy.explain(leaf, "expired", now) for leaf in leaves]
        return gone

    def remove(self, segment: Segment, *, evicting: bool = False) -> bool:
        """Remove a segment that nobody writes or needs; False if it stays. Files that no library made are not evicted.

        The index has its row until the file is gone, so that a process which dies in between leaves no lost space.
        """
        if evicting and not is_made_name(segment.name):
            return False
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(held(segment.path))
            except CacheLockedError:
                return False
            except FileNotFoundError:
                if segment.writing and segment.broken != GOING and is_running(segment.writer_pid):
                    return False  # its session is about to make the file
            if not self._index.begin_removal(segment.name, pinned=not evicting):
                return False
            for path in (segment.path, pin_path(segment.path)):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path)
            self._index.remove(segment.name, evicted=evicting)
        if evicting:
            self.evicted(segment.bytes)
        return True


def pin_path(path: str) -> str:
    """Return the path of the empty file that says that a segment is pinned: pins survive the loss of the index."""
    return f"{path.removesuffix('.kvm')}.pin"
