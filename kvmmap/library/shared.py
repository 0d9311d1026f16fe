"""A library's methods that concern an object store. Looking after it on this machine is `upkeep`'s."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any, cast

from ..errors import KvmmapError
from ..paths import PathLike
from ..storage.objects.remote import objects_at
from .background import LONGEST_PAUSE, Background
from .hashing import Prompt
from .manifests import ListedObjects
from .sharing import FETCH_ERRORS, LEAST_GAIN, CleanUp, Sharing
from .upkeep import LibraryUpkeep


class LibrarySharing(LibraryUpkeep):
    """The part of `Library` that shares segments with other machines."""

    def __init__(
        self,
        path: PathLike,
        max_bytes: int | None = None,
        *,
        ttl: float | None = None,
        create: bool = True,
        remote: str | None = None,
        storage_options: Mapping[str, Any] | None = None,
        write_through: bool = True,
        follow_every: float | None = 5.0,
    ) -> None:
        if remote is not None:
            _objects_at(remote, storage_options)  # a library remembers its store: refuse what is none before that
        super().__init__(path, max_bytes, ttl=ttl, create=create, remote=remote)
        self._sharing: Sharing | None = None
        self._background: Background | None = None
        self._remote = url = self._settings.remote
        if url is not None:
            try:
                objects = _objects_at(url, storage_options)
            except BaseException:
                self._database.release()
                raise
            self._sharing = Sharing(self.path, self._index, self._room, self._checker, objects)
            if write_through or follow_every is not None:
                self._background = Background(self._sharing, follow_every or LONGEST_PAUSE, push=write_through)

    @property
    def remote(self) -> str | None:
        """URL of the object store that the library is shared through; None without one."""
        return self._remote

    @property
    def remote_error(self) -> Exception | None:
        """Why the last attempt in the background to reach the store failed; None if it did not."""
        return None if self._background is None else self._background.error

    def push(self) -> int:
        """Store every committed segment in the object store now; return how many it did not have.

        Raises:
            KvmmapError: the library has no object store.
            StoreError: the store can't be reached, or fails. What was stored until then stays.
        """
        return self._require_sharing().push()

    def flush(self, *, remote: bool = False) -> None:
        """Wait until the object store has every committed segment that no session writes. Sessions commit themselves.

        Args:
            remote: wait for the store; without it there is nothing to wait for.

        Raises:
            As `push`.
        """
        self._require_open()
        if remote:
            self.push()

    def pull(self, *, segments: bool = False) -> int:
        """Take in what other machines have stored since: what there is, and with `segments` all of it, here.

        Args:
            segments: fetch the segments as well, as far as the budget goes without evicting.

        Returns:
            How many manifests were new, or segments were fetched.

        Raises:
            As `push`.
        """
        sharing = self._require_sharing()
        new = sharing.follow()
        if not segments:
            return new
        fetched = 0
        for entry in sorted(self._index.remotes(), key=lambda entry: entry.start):
            limit = self._settings.max_bytes
            if limit is not None and self._index.usage()[0] + entry.disk_bytes > limit:
                break
            fetched += sharing.fetch(entry) > 0
        return fetched

    def compact_log(self) -> int:
        """Replace the manifests in the object store by one snapshot; return how many were deleted.

        Any machine may do so at any time. Others that follow read the snapshot.

        Raises:
            As `push`.
        """
        return self._require_sharing().compact_log()

    def clean_up(self, *, max_bytes: int | None = None, older_than: float | None = None) -> CleanUp:
        """Remove segments from the object store, the longest there first, and compact its log.

        Any one machine may do so. Who is fetching such a segment has it, or goes on without.

        Args:
            max_bytes: keep at most so much.
            older_than: remove what was stored longer ago than so many seconds, by the server's clock.

        Raises:
            As `push`.
        """
        return self._require_sharing().clean_up(max_bytes, older_than)

    def _require_sharing(self) -> Sharing:
        self._require_open()
        if self._sharing is None:
            raise KvmmapError(
                f'{self.path}: has no object store: open it with remote="s3://bucket/prefix"', path=self.path
            )
        return self._sharing

    def _kick(self) -> None:
        if self._background is not None:
            self._background.kick()

    def _fetch_longer(self, digest: str, prompt: Prompt, length: int) -> bool:
        """Fetch what the object store has of a prompt, if that is more than is here; True if something was fetched."""
        if self._sharing is None:
            return False
        found, entry = self._sharing.find(digest, prompt)
        if entry is None or found < length + LEAST_GAIN:
            return False
        with contextlib.suppress(*FETCH_ERRORS):
            size = self._sharing.fetch(entry)
            self._metrics.add(segments_fetched=size > 0, bytes_fetched=size)
            return size > 0
        self._metrics.add(fetch_failures=1)
        return False

    def close(self) -> None:
        """Close the index. Sessions that are open stay so, and become part of the library when they are closed.

        What the object store has not yet is pushed when a process opens the library next; `flush(remote=True)` waits
        for it.
        """
        if self._background is not None:
            self._background.stop()
        super().close()


def _objects_at(url: Any, storage_options: Mapping[str, Any] | None) -> ListedObjects:
    """Return an object store that a library can be shared through.

    Raises:
        As `kvmmap.storage.objects.remote.objects_at`, and
        KvmmapError: it can't be one.
    """
    if not isinstance(url, str) or url.lower().startswith("file:"):
        raise KvmmapError(
            f"{url!r}: no library can be shared through it: give the URL of a place in an object store, such as "
            '"s3://bucket/prefix"'
        )
    objects = objects_at(url, storage_options)
    if not hasattr(objects, "list_after"):
        raise KvmmapError(f"{url}: can't be listed in order, so no library can be shared through it", path=url)
    return cast(ListedObjects, objects)
