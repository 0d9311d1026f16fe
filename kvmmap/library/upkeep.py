"""Looking after a library: its segments, sizes, pins and budget, and checks. Matching and sessions are `library`'s."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from ..closing import Closing
from ..errors import CacheLockedError, CacheNotFoundError, ClosedError, KvmmapError, ShapeMismatchError
from ..opening import file_path, open_cache
from ..paths import PathLike
from ..ranges import index as whole
from ..storage.protocols import VerifyReport
from . import settings as stored_settings
from .checking import Checker, CheckReport
from .database import Database
from .making import Maker
from .metrics import LibraryStats, Metrics
from .owner import SessionOwner
from .policy import Choice
from .remote_index import RemoteIndex
from .room import Room, pin_path
from .segment import Segment, StoredNamespace
from .settings import CurrentSettings, Settings
from .telemetry import instrument


class LibraryUpkeep(Closing):
    """The half of `Library` that neither matches nor opens sessions."""

    def __init__(
        self,
        path: PathLike,
        max_bytes: int | None = None,
        *,
        ttl: float | None = None,
        create: bool = True,
        remote: str | None = None,
    ) -> None:
        max_bytes = None if max_bytes is None else whole(max_bytes, "max_bytes")
        if max_bytes is not None and max_bytes < 1:
            raise ShapeMismatchError(f"max_bytes must be at least 1, not {max_bytes}", expected=1, actual=max_bytes)
        self.path = os.path.abspath(file_path(path))
        """Absolute path of the directory."""
        self._closed = False
        settings = stored_settings.load(self.path, create=create, max_bytes=max_bytes, ttl=_seconds(ttl), remote=remote)
        self._current = CurrentSettings(self.path, settings)
        self._database = Database(self.path)
        self._index = RemoteIndex(self._database, self.path)
        self._room = Room(self.path, self._index, self._limit, self._settle)
        self._checker = Checker(self.path, self._index, self._room)
        self._index.refill = self._refill
        self._index.make_room = self._room.make_room
        self._maker = Maker(self.path, self._settings.number, self._index, self._checker.lost, self._room)
        self._metrics = Metrics()
        self._room.evicted = lambda size: self._metrics.add(evictions=1, bytes_evicted=size)
        self._owner = SessionOwner(
            self.path, self._index, self._room, self._metrics, self._settings.ttl, lambda: self._kick()
        )
        try:
            self._index.usage()  # an index that is missing or damaged is made anew here
            self._settle()
            self._room.expire()
        except BaseException:
            self._database.release()
            raise

    # Looking after

    def namespaces(self) -> list[StoredNamespace]:
        """Return the namespaces of which the library has had segments."""
        return self._open_index.namespaces()

    def entries(self) -> list[Segment]:
        """Return all segments, parents before their children."""
        return self._open_index.segments()

    def entry(self, name: str) -> Segment:
        """Return a segment by its name, or by how its name begins or ends, if only one does.

        Raises:
            CacheNotFoundError: there is none, or several.
        """
        found = self._open_index.segment(name) if isinstance(name, str) else None
        if found is not None:
            return found
        known = self.entries() if name and isinstance(name, str) else []
        some = [one for one in known if one.name.startswith(name) or one.name.endswith(name)]
        if len(some) == 1:
            return some[0]
        what = "no segment" if not some else f"{len(some)} segments"
        raise CacheNotFoundError(f"{self.path}: {what} of the name {name!r}; `entries` lists all", path=self.path)

    def stats(self) -> LibraryStats:
        """Return sizes, and what all processes have counted since the library was made."""
        size, count = self._open_index.usage()
        return LibraryStats.of(size, count, self._settings.max_bytes, self._open_index.totals(), self._database.facts())

    def metrics(self) -> dict[str, float]:
        """Return what this handle has counted since it was opened, by name."""
        return self._metrics.values()

    def instrument(self, meter_provider: Any = None) -> None:
        """Register what `metrics` counts, and the library's size, as instruments of OpenTelemetry.

        They are read when a reader of the provider collects, as long as the library is open; once for each handle.

        Args:
            meter_provider: OpenTelemetry's; the global one by default.

        Raises:
            MissingLibraryError: OpenTelemetry is not installed: `pip install 'kvmmap[metrics]'`.
        """
        self._require_open()
        instrument(self.metrics, self._sizes, {"kvmmap.library.path": self.path}, meter_provider)

    def _sizes(self) -> dict[str, float]:
        if self._closed:
            return {"size": 0, "segments": 0}
        size, count = self._index.usage()
        return {"size": size, "segments": count}

    def pin(self, *names: str) -> None:
        """Keep segments, and those they continue, whatever the budget. Pins survive the loss of the index.

        Raises:
            CacheNotFoundError: there is no such segment.
            OSError: the pin can't be stored.
        """
        for name in names:
            for segment in self._open_index.chain(self.entry(name)):
                with open(pin_path(segment.path), "wb"):
                    pass
                self._open_index.set_pinned([segment.name], True)

    def unpin(self, *names: str) -> None:
        """Let segments be evicted again; those that they continue stay pinned.

        Raises:
            CacheNotFoundError: there is no such segment.
        """
        for name in names:
            segment = self.entry(name)
            if os.path.exists(pin_path(segment.path)):
                os.unlink(pin_path(segment.path))
            self._open_index.set_pinned([segment.name], False)

    def ttl(self, name: str, seconds: float | None) -> None:
        """Keep a segment for so many seconds after its last use; None: as long as there is room.

        Raises:
            CacheNotFoundError: there is no such segment.
            ShapeMismatchError: not a number from 0 on.
        """
        self._open_index.set_ttl(self.entry(name).name, _seconds(seconds))

    def remove(self, name: str) -> None:
        """Remove a segment that no other continues, pinned or not.

        Raises:
            CacheNotFoundError: there is no such segment.
            KvmmapError: another one continues it.
            CacheLockedError: a session writes it.
        """
        segment = self.entry(name)
        if not self._room.remove(segment):
            if segment.children:
                raise KvmmapError(f"{segment.path}: {segment.children} segments continue it: remove these first")
            raise CacheLockedError(f"{segment.path}: a session writes it: close that first", path=segment.path)

    def evict(self, max_bytes: int | None = None, *, dry_run: bool = False) -> list[Choice]:
        """Remove what has expired, and then what is worth least, until the library is within its budget.

        Args:
            max_bytes: the budget for this call; the library's own by default.
            dry_run: remove nothing.

        Returns:
            What was removed, or would be, each with the reason.
        """
        self._require_open()
        limit = self._settings.max_bytes if max_bytes is None else whole(max_bytes, "max_bytes")
        if not dry_run:
            self._settle()
        gone = self._room.expiring() if dry_run else self._room.expire()
        over = 0 if limit is None else self._open_index.usage()[0] - limit
        if dry_run:
            over -= sum(choice.segment.bytes for choice in gone)
        if over > 0:
            gone += self._room.plan(over, {one.segment.name for one in gone}) if dry_run else self._room.evict(over)
        return gone

    def check(self) -> CheckReport:
        """Bring the index in line with the files: after processes died, or files came or went. Quick."""
        self._require_open()
        return self._checker.check()

    def rebuild(self) -> CheckReport:
        """Make the index anew from the files. Last uses become the times of last writing; counts and pins stay."""
        self._require_open()
        return self._checker.rebuild()

    def verify(self) -> list[VerifyReport]:
        """Compare every block of every segment with its checksum; damaged segments are not matched any more.

        Returns:
            One report a segment that can be opened. Those that can't be are named as broken by `check`.
        """
        reports = []
        for segment in self.entries():
            try:
                with open_cache(segment.path, verify="none", record_use=False) as cache:
                    reports.append(cache.verify())
            except CacheNotFoundError:
                continue
            except KvmmapError as error:
                self._open_index.mark_broken(segment.name, str(error))
                continue
            if not reports[-1].sound:
                self._open_index.mark_broken(segment.name, reports[-1].damages[0].what)
        return reports

    @property
    def max_bytes(self) -> int | None:
        """Bytes on the disk to keep at most, as any process has set it last; None without a limit."""
        return self._settings.max_bytes

    def __repr__(self) -> str:
        return f"<Library {self.path!r}{', closed' if self._closed else ''}>"

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuse to be copied or pickled.

        Raises:
            KvmmapError: always.
        """
        raise KvmmapError(
            f"{self.path}: a library can't be pickled or copied, since its connections belong to this process: open it "
            "by its path where it is needed",
            path=self.path,
        )

    # Life

    def close(self) -> None:
        """Close the index. Sessions that are open stay so, and become part of the library when they are closed."""
        self._closed = True
        self._database.release()

    # What its parts ask

    @property
    def _open_index(self) -> RemoteIndex:
        self._require_open()
        return self._index

    def _kick(self) -> None:
        """Something was committed."""

    def _require_open(self) -> None:
        if self._closed:
            raise ClosedError(f"{self.path}: the library is closed", path=self.path)

    @property
    def _settings(self) -> Settings:
        return self._current.get()

    def _limit(self) -> int | None:
        return self._settings.max_bytes

    def _settle(self) -> None:
        self._checker.settle()

    def _refill(self) -> None:
        self._checker.check()


def _seconds(seconds: Any) -> float | None:
    if seconds is None:
        return None
    with contextlib.suppress(OverflowError):
        if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= float(seconds) < float("inf"):
            return float(seconds)
    raise ShapeMismatchError(f"a time to live is a number of seconds from 0 on, not {seconds!r:.40}", actual=seconds)
