"""What all parts of an open group share: its objects, the commit that the handle sees, threads, the closed state."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Executor, ThreadPoolExecutor

from ...errors import CacheChangedError, CacheNotFoundError
from ..objects.protocol import MissingObjectError, Objects
from ..refusals import closed_error, refuse_truncated
from .layout import ROOT_KEY
from .root import Root

REMOTE_THREADS = 32
LOCAL_THREADS = 4


class GroupHandle:
    """The state of one open group.

    Args:
        objects: where it is.
        root: what was found there.
        tag: the root's version, for conditional puts.
        writable: True for the handle of a writer.
    """

    def __init__(self, objects: Objects, root: Root, tag: str, *, writable: bool) -> None:
        self.objects = objects
        self.path: str = objects.url
        self.root = root
        self.tag = tag
        self.layout = root.layout
        self.geometry = root.layout.geometry
        self.writable = writable
        self.lock = threading.RLock()
        self.fetch_lock = threading.RLock()
        """Held around everything that looks at, or changes, what is fetched."""
        self.lengths = [root.seq_len] * self.geometry.num_layers
        """Positions of each layer, as this handle sees them."""
        self.truncations = 0
        """How often positions that this handle had were truncated."""
        self.closed = False
        self._pool: ThreadPoolExecutor | None = None
        self._pool_pid = 0

    @property
    def pool(self) -> Executor:
        """Threads that wait for disks and servers; made when first needed, and anew in a forked child."""
        pool = self._pool  # another thread may close the cache between two looks
        if pool is None or self._pool_pid != os.getpid():
            self.check()
            count = REMOTE_THREADS if self.objects.remote else LOCAL_THREADS
            pool = self._pool = ThreadPoolExecutor(count, thread_name_prefix="kvmmap")
            self._pool_pid = os.getpid()
        return pool

    def close_pool(self) -> None:
        """End the threads."""
        if self._pool is not None and self._pool_pid == os.getpid():
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    @property
    def seq_len(self) -> int:
        """Positions complete in every layer that has rows."""
        return min([self.lengths[layer] for layer in self.geometry.row_layers])

    def check(self) -> None:
        """Raise if the group was closed."""
        if self.closed:
            raise closed_error(self.path)

    def validate(self, version: int) -> None:
        """Raise if the group was closed, or truncated since a version."""
        self.check()
        if self.truncations != version:
            refuse_truncated(self.path)

    @contextlib.contextmanager
    def watching_closing(self) -> Iterator[None]:
        """Raise ClosedError for what fails because another thread has closed the group."""
        try:
            yield
        except (RuntimeError, CancelledError):  # the threads that it was given to are gone
            self.check()
            raise

    def refuse_changed(self) -> None:
        """Look at the root again.

        Raises:
            CacheChangedError: positions that this handle has were truncated, or another cache is there.
        """
        root, _ = read_root(self.objects)
        if (root.cache_id, root.generation) != (self.root.cache_id, self.root.generation):
            what = "truncated by its writer" if root.cache_id == self.root.cache_id else "replaced by another cache"
            raise CacheChangedError(
                f"{self.path}: was {what} since this handle last looked; call refresh()", path=self.path
            )

    def block_rows(self, layer: int, block: int) -> int:
        """Return the positions of a block that are stored and have a checksum."""
        size = self.geometry.block_tokens
        if (block + 1) * size <= self.lengths[layer]:
            return size  # also where a writer has stored it whole since the last commit
        return max(0, min(size, self.root.seq_len - block * size))


def read_root(objects: Objects) -> tuple[Root, str]:
    """Read a group's root, and its version's tag.

    Raises:
        CacheNotFoundError: there is nothing.
        FormatError: it is no cache, or damaged.
    """
    try:
        data, tag = objects.get_tagged(ROOT_KEY)
    except MissingObjectError as error:
        raise CacheNotFoundError(f"{error}; kvmmap.create() makes a cache there", path=objects.url) from None
    return Root.decode(data, objects.url), tag
