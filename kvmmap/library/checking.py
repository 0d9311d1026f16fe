"""Bringing the index in line with the files: after processes that died, after damage, and from nothing.

The files are right. A segment that can't be used is named as broken and stays where it is; `evict` removes it first.
"""

from __future__ import annotations

import contextlib
import glob
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass

from ..errors import CacheLockedError, CorruptCacheError, FormatError, KvmmapError
from ..storage.file.placement import remove_dead
from ..storage.process import is_running
from ..storage.temporary import is_temporary
from .contents import Description, describe, disk_bytes, is_written, was_committed
from .index import GOING, Index, is_made_name
from .room import Room, pin_path
from .segment import CACHES, Segment

YOUNG_SECONDS = 60.0
"""Seconds for which a segment without a file stays in the index while its writer lives: it may be about to be made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `check` or `rebuild` found and did, by names of segments."""

    segments: int
    """Segments in the index now."""

    bytes: int
    """Their bytes on the disk, and what is reserved."""

    added: tuple[str, ...]
    """Files that the index did not have."""

    updated: tuple[str, ...]
    """Segments whose writer has died: the index has what they committed."""

    removed: tuple[str, ...]
    """Segments that the index had and that are gone, and empty ones that a dead process left."""

    broken: tuple[str, ...]
    """Segments that can't be used."""

    busy: tuple[str, ...]
    """Files that a session writes and the index does not have: it adds them when it closes."""


class Checker:
    """Compares a library's index with its files.

    Args:
        folder: the library's.
        index: its index.
        room: removes segments.
    """

    def __init__(self, folder: str, index: Index, room: Room) -> None:
        self._folder = folder
        self._index = index
        self._room = room

    def settle(self) -> list[str]:
        """Bring the index up to date with segments whose writer has died; return their names."""
        settled = []
        for segment in self._index.written():
            if is_written(segment.path):
                continue
            if not os.path.exists(segment.path):
                if not self._is_young(segment):
                    self.lost(segment)
                    settled.append(segment.name)
                continue
            if segment.broken == GOING:
                self._room.remove(segment)
            elif not self._look_again(segment):
                continue
            settled.append(segment.name)
        return settled

    def check(self) -> CheckReport:
        """Bring the index in line with all files."""
        updated = self.settle()
        self._remove_left_overs()
        known = {segment.name: segment for segment in self._index.segments()}
        files = dict(self._files())
        removed = [name for name in known if name not in files and not self._is_young(known[name])]
        for name in sorted(removed, key=lambda name: -known[name].depth):
            self.lost(known[name])
        added, broken, busy, empty = self._add({name: path for name, path in files.items() if name not in known})
        size, count = self._index.usage()
        broken += [segment.name for segment in self._index.segments() if segment.broken and segment.name not in broken]
        return CheckReport(
            segments=count,
            bytes=size,
            added=tuple(added),
            updated=tuple(updated),
            removed=(*removed, *empty),
            broken=tuple(broken),
            busy=tuple(busy),
        )

    def rebuild(self) -> CheckReport:
        """Forget the index, and fill it from the files."""
        self._index.clear()
        return self.check()

    def take_in(self, name: str, path: str) -> None:
        """Bring the index in line with one file."""
        segment = self._index.segment(name)
        if segment is None:
            self._add({name: path})
        else:
            self._look_again(segment)

    # Files

    def _files(self) -> Iterator[tuple[str, str]]:
        """Yield name and path of each segment's file."""
        caches = os.path.join(self._folder, CACHES)
        with contextlib.suppress(FileNotFoundError):
            for folder in sorted(os.listdir(caches)):
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    for file in sorted(os.listdir(os.path.join(caches, folder))):
                        path = os.path.join(caches, folder, file)
                        if file.endswith(".kvm") and not file.startswith(".") and os.path.isfile(path):
                            yield file.removesuffix(".kvm"), path

    def _remove_left_overs(self) -> None:
        """Remove the temporary files of processes that died while they made a segment."""
        for folder in glob.iglob(os.path.join(glob.escape(self._folder), CACHES, "*")):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError), os.scandir(folder) as entries:
                for entry in entries:
                    if is_temporary(entry.name):
                        with contextlib.suppress(OSError):  # another process was faster
                            remove_dead(entry.path)

    def _add(self, files: dict[str, str]) -> tuple[list[str], list[str], list[str], list[str]]:
        """Add files to the index, parents first; return the names of those added, broken, busy and empty."""
        found: dict[str, Description] = {}
        added: list[str] = []
        broken: list[str] = []
        busy: list[str] = []
        empty: list[str] = []
        for name, path in files.items():
            try:
                found[name] = describe(path)
            except CacheLockedError:
                busy.append(name)
            except FileNotFoundError:
                continue
            except (KvmmapError, OSError) as error:
                if not was_committed(path) and self._remove_empty(path):
                    empty.append(name)
                    continue
                self._add_broken(name, path, str(error))
                broken.append(name)
        for name in sorted(found, key=lambda name: found[name].start):
            description = found[name]
            if description.contents.stop == description.start:
                if self._remove_empty(files[name]):
                    empty.append(name)
                continue
            if self._add_described(name, files[name], description):
                added.append(name)
            else:
                broken.append(name)
        return added, broken, busy, empty

    def _add_described(self, name: str, path: str, description: Description) -> bool:
        number = self._index.add_namespace(
            description.namespace,
            os.path.basename(os.path.dirname(path)),
            description.document,
            description.model,
            description.position_bytes,
        )
        parent = 0
        missing = None
        if description.parent is not None:
            row = self._index.segment(description.parent)
            if row is None or row.broken or row.stop < description.start:
                missing = f"its parent {description.parent} is missing, damaged or too short"
            else:
                parent = row.id
        used = os.stat(path).st_mtime
        self._index.add(
            name, number, parent=parent, start=description.start, size=0, ttl=None, writing=False, used=used
        )
        self._index.set_contents(name, description.contents)
        if os.path.exists(pin_path(path)):
            self._index.set_pinned([name], True)
        if missing:
            self._index.mark_broken(name, missing)
        return missing is None

    def _add_broken(self, name: str, path: str, what: str) -> None:
        folder = os.path.basename(os.path.dirname(path))
        number = self._index.add_namespace(f"unknown:{folder}", folder, {}, "", 0)
        with contextlib.suppress(FileNotFoundError):
            used = os.stat(path).st_mtime
            self._index.add(name, number, parent=0, start=0, size=disk_bytes(path), ttl=None, writing=False, used=used)
            self._index.mark_broken(name, what)

    def _remove_empty(self, path: str) -> bool:
        if not is_made_name(os.path.basename(path).removesuffix(".kvm")) or is_written(path):
            return False
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return True

    # Rows

    def _is_young(self, segment: Segment) -> bool:
        return (
            segment.writer_pid > 0 and is_running(segment.writer_pid) and time.time() - segment.created <= YOUNG_SECONDS
        )

    def lost(self, segment: Segment) -> None:
        """Remove a segment whose file is gone from the index; if others continue it, they are of no use."""
        if segment.children:
            self._index.mark_broken(segment.name, "its file is gone")
        self._index.remove(segment.name)

    def _look_again(self, segment: Segment) -> bool:
        """Commit what a dead process has published, and tell the index; False if a writer has the segment open."""
        try:
            description = describe(segment.path)
        except CacheLockedError:
            return False
        except (FormatError, CorruptCacheError, OSError) as error:
            if segment.stop == segment.start and not segment.children and not was_committed(segment.path):
                self._room.remove(segment)
                return True
            self._index.mark_broken(segment.name, str(error))
            self._index.end_writing(segment.name, disk_bytes(segment.path))
            return True
        if description.contents.stop == segment.start and not segment.children:
            self._room.remove(segment)
            return True
        self._index.set_contents(segment.name, description.contents)
        self._index.end_writing(segment.name, disk_bytes(segment.path))
        return True
