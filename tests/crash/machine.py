"""A machine on a simulated disk: the package runs on files that record, its processes die, and it restarts.

`storage.file.PosixFile` is replaced by one that tells the disk what it does, and so are the stores of the live
record's words, which go through a map. What drops a sync or a write on purpose, to see whether the suite notices, is
a *mutation*: a predicate over (kind, function that asked).
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

from crash.disk import Disk
from kvmmap import _core
from kvmmap.format import Superblock
from kvmmap.storage.posix import PosixFile

Mutation = Callable[[str, str], bool]


class Killed(BaseException):
    """The process is dead; further operations raise the same."""


class Machine:
    """The folder that its caches lie in, its disk, and what is to happen to it."""

    def __init__(self, folder: str, mutation: Mutation | None = None) -> None:
        self.folder = folder
        self.disk = Disk()
        self.boot = 1
        self.mutation = mutation
        self.asked: set[tuple[str, str]] = set()
        self.dead = False
        self.countdown: int | None = None
        self.interruption: type[BaseException] = Killed
        self._maps: dict[int, tuple[Any, int, int]] = {}

    def event(self, kind: str) -> bool:
        """Count an operation down to the interruption; False if a mutation drops it."""
        if self.dead:
            raise Killed
        if self.countdown is not None:
            self.countdown -= 1
            if self.countdown < 0:
                self.countdown = None
                self.dead = self.interruption is Killed
                raise self.interruption
        return not self._dropped(kind)

    def _dropped(self, kind: str) -> bool:
        frame, caller = sys._getframe(2), ""
        while frame is not None:
            name = frame.f_code.co_name
            if "crash" not in frame.f_code.co_filename and name not in HELPERS:
                caller = name
                break
            frame = frame.f_back  # type: ignore[assignment]
        self.asked.add((kind, caller))
        return self.mutation is not None and self.mutation(kind, caller)

    def new_process(self) -> None:
        """The next writer lives, and is not interrupted."""
        self.dead = False
        self.countdown = None

    def restart(self, image: dict[str, bytearray]) -> None:
        """Come up again after a power loss."""
        self.new_process()
        self.boot += 1
        self._maps.clear()
        self.disk.restart(self.folder, image)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Put the recording files in place."""
        file = recording_file(self)
        core = SimpleNamespace(
            load_word=_core.load_word,
            load_checked=_core.load_checked,
            store_word=self._store_word,
            publish=self._publish,
        )

        def boot_id() -> int:
            return self.boot

        with contextlib.ExitStack() as stack:
            for module in ("file.mapped_file", "file.placement"):
                stack.enter_context(mock.patch(f"kvmmap.storage.{module}.PosixFile", file))
            stack.enter_context(mock.patch("kvmmap.storage.file.live_record._core", core))
            stack.enter_context(mock.patch("kvmmap.storage.file.live_record.boot_id", boot_id))
            stack.enter_context(mock.patch("time.sleep"))  # for a writer to finish with a record: it is dead
            stack.enter_context(mock.patch("kvmmap.storage.file.mapped_file.Superblock.decode", decode_superblock))
            yield

    def mapped(self, memory: Any, inode: int, start: int) -> None:
        self._maps[id(memory)] = memory, inode, start

    def _store_word(self, memory: Any, offset: int, word: int) -> None:
        if self.event("store"):
            _core.store_word(memory, offset, word)
            self._stored(memory, offset)

    def _publish(self, memory: Any, offset: int, *checked: int) -> None:
        if self.event("store"):
            _core.publish(memory, offset, *checked)
            self._stored(memory, offset)

    def _stored(self, memory: Any, offset: int) -> None:
        _, inode, start = self._maps[id(memory)]
        self.disk.inode(inode).writes.append((start + offset, bytes(memory[offset : offset + 8])))


decode_superblock = functools.lru_cache(maxsize=8)(Superblock.decode)
"""A superblock never changes, and thousands of images have the same one."""

HELPERS = {
    "_sync",
    "sync",
    "write",
    "copy_from",
    "link_to",
    "replace",
    "sync_name",
    "put",
    "publish",
    "trust",
    "distrust",
    "remove",
    "discard",
}


def recording_file(machine: Machine) -> type[PosixFile]:
    """Make the file class of a machine."""
    disk = machine.disk

    class RecordingFile(PosixFile):
        @property
        def _inode(self) -> int:
            return self.stat().st_ino

        @classmethod
        def create_beside(cls, path: str) -> PosixFile:
            machine.event("create")
            file = super().create_beside(path)
            disk.inodes.pop(file._inode, None)  # type: ignore[attr-defined]  # a number used again
            disk.pending_names.append(("set", os.path.basename(file.path), file.stat().st_ino))
            return file

        def write(self, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
            for offset, buffer in zip(offsets, buffers, strict=True):
                if machine.event("write"):
                    super().write((offset,), (buffer,))
                    disk.inode(self._inode).writes.append((offset, bytes(buffer)))

        def copy_from(self, source: PosixFile, start: int, at: int, size: int) -> None:
            if machine.event("write"):
                super().copy_from(source, start, at, size)
                disk.inode(self._inode).writes.append((at, self.read(at, size)))

        def sync(self) -> None:
            if machine.event("sync"):
                disk.inode(self._inode).settle()

        def release(self, offset: int, size: int) -> None:
            if machine.event("release"):
                super().release(offset, size)
                disk.inode(self._inode).writes.append((offset, bytes(size)))

        def resize(self, size: int) -> None:
            machine.event("resize")
            super().resize(size)
            disk.inode(self._inode).sizes.append(size)

        def map(self, offset: int, size: int, *, writable: bool = False) -> Any:
            memory, start = super().map(offset, size, writable=writable)
            if writable:
                machine.mapped(memory, self._inode, offset - start)
            return memory, start

        def _link(self, source: str, target: str) -> None:
            if machine.event("link"):
                super()._link(source, target)
                disk.pending_names.append(("set", os.path.basename(target), self._inode))

        def _rename(self, source: str, target: str) -> None:
            if machine.event("rename"):
                super()._rename(source, target)
                disk.pending_names.append(("set", os.path.basename(target), self._inode))
                disk.pending_names.append(("drop", os.path.basename(source), self._inode))

        def _unlink(self, path: str) -> None:
            if machine.event("unlink"):
                super()._unlink(path)
                disk.pending_names.append(("drop", os.path.basename(path), self._inode))

        def _sync_folder(self, path: str) -> None:
            if machine.event("sync_folder"):
                disk.sync_names()

    return RecordingFile
