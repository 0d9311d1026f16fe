"""Objects as files in a local folder: atomic and durable puts, and a lock that dies with its process."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ...errors import CacheNotFoundError, NotACacheError
from ..after_fork import close_in_children
from ..posix import FILE_MODE, PosixFile, closing_on_error, sync_folder
from .lock import LOCK_KEY, decode_owner, is_dead, locked_by, new_owner, read_owner
from .protocol import Buffer, MissingObjectError, ObjectChangedError, Pieces

FOLDER_MODE = 0o700


class FolderObjects:
    """A folder's files, by their paths in it.

    Args:
        path: the folder; it is made with the first put, in a directory that must exist.
        durable: sync each file, and with `settle` each folder. Without, a put is atomic for other processes, and what
            survives power loss is the system's affair.
    """

    remote = False

    def __init__(self, path: str, *, durable: bool = True) -> None:
        self.path = os.path.abspath(path)
        self.url = self.path
        self._durable = durable
        self._made: set[str] = set()
        self._unsettled: set[str] = set()
        self._lock = threading.Lock()

    def get(self, key: str) -> Buffer:
        with self._open(key) as file:
            return file.read(0, file.stat().st_size)

    def get_tagged(self, key: str) -> tuple[Buffer, str]:
        with self._open(key) as file:
            status = file.stat()
            return file.read(0, status.st_size), _tag(status)

    def get_suffix(self, key: str, size: int) -> Buffer:
        with self._open(key) as file:
            end = file.stat().st_size
            return file.read(max(0, end - size), min(size, end))

    def read_into(self, key: str, pieces: Pieces) -> None:
        with self._open(key) as file:
            for offset, target in pieces:
                file.read_into(offset, target)

    def pieces(self, key: str, size: int) -> Iterator[Buffer]:
        with self._open(key) as file:
            end = file.stat().st_size
            room = memoryview(bytearray(min(size, end)))
            for start in range(0, end, size):
                piece = room[: min(size, end - start)]
                file.read_into(start, piece)
                yield piece

    @contextlib.contextmanager
    def _open(self, key: str) -> Iterator[PosixFile]:
        path = os.path.join(self.path, key)
        try:
            file = PosixFile.open(path, writable=False)
        except (FileNotFoundError, NotADirectoryError):
            raise MissingObjectError(f"{path}: there is no such file", path=path) from None
        try:
            yield file
        except IsADirectoryError:
            raise MissingObjectError(f"{path}: is a directory", path=path) from None
        finally:
            file.close()

    def put(self, key: str, parts: Sequence[Buffer]) -> None:
        self._write(key, parts).close()

    def _write(self, key: str, parts: Sequence[Buffer]) -> PosixFile:
        """Put a new file in place of whatever is there, and return it, open."""
        path = os.path.join(self.path, key)
        self._make_folders(os.path.dirname(path))
        file = PosixFile.create_beside(path)
        try:
            offsets, end = [], 0
            for part in parts:
                offsets.append(end)
                end += memoryview(part).nbytes
            file.write(tuple(offsets), tuple(parts))
            if self._durable:
                file.sync()
            os.replace(file.path, path)
        except BaseException:
            file.discard()
            raise
        with self._lock:
            self._unsettled.add(path)
        return file

    def _make_folders(self, folder: str) -> None:
        if folder in self._made:
            return
        if not os.path.isdir(folder):
            if folder != self.path:
                self._make_folders(os.path.dirname(folder))
            try:
                try:
                    os.mkdir(folder, FOLDER_MODE)
                except FileExistsError:
                    if os.path.islink(folder) and not os.path.exists(folder):
                        raise NotACacheError(
                            f"{folder}: is a link to something that is not there: remove it, or make its target",
                            path=folder,
                        ) from None
            except FileNotFoundError:
                raise CacheNotFoundError(
                    f"{os.path.dirname(folder)}: there is no such directory", path=folder
                ) from None
            with self._lock:
                self._unsettled.add(folder)
        self._made.add(folder)

    def put_if(self, key: str, data: bytes, tag: str | None) -> str:
        """As `Objects.put_if`. The check and the put are one step only for who holds the lock."""
        path = os.path.join(self.path, key)
        try:
            present: str | None = _tag(os.stat(path))
        except FileNotFoundError:
            present = None
        if present != tag:
            raise ObjectChangedError(f"{path}: was changed by another", path=path)
        file = self._write(key, [data])
        with contextlib.closing(file):
            return _tag(file.stat())

    def delete(self, key: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self.path, key))

    def list(self) -> Iterator[str]:
        for folder, _, names in os.walk(self.path):
            for name in names:
                yield os.path.relpath(os.path.join(folder, name), self.path)

    def unlink(self) -> bool:
        if not os.path.islink(self.path):
            return False
        os.unlink(self.path)
        sync_folder(self.path)
        return True

    def remove(self) -> None:
        """Remove the folders, and the lock's file, which is of no use without them."""
        self.delete(LOCK_KEY)
        for folder, _, names in os.walk(self.path, topdown=False):
            if not names:
                with contextlib.suppress(OSError):
                    os.rmdir(folder)
        self._made.clear()

    def settle(self) -> None:
        with self._lock:
            paths, self._unsettled = self._unsettled, set()
        if self._durable:
            for folder in {os.path.dirname(path) for path in paths}:
                sync_folder(os.path.join(folder, ""))

    def without_sync(self) -> FolderObjects:
        return FolderObjects(self.path, durable=False)

    def lock(self, timeout: float, *, break_lock: bool) -> FolderLock:
        """Take the lock. There is nothing to break: it died with its process."""
        path = os.path.join(self.path, LOCK_KEY)
        deadline = time.monotonic() + timeout
        self._make_folders(os.path.dirname(path))
        while True:
            if os.path.exists(self.path) and not os.path.isdir(self.path):
                raise NotACacheError(f"{self.path}: not a kvmmap cache (not a directory)", path=self.path)
            try:
                file = PosixFile(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE), path)
            except FileNotFoundError:
                raise CacheNotFoundError(
                    f"{self.path}: was removed while this process waited for its lock", path=self.path
                ) from None
            with closing_on_error(file):
                if not file.lock(max(0.0, deadline - time.monotonic())):
                    raise locked_by(self.url, decode_owner(file.read(0, 4096)), breakable=False)
                if file.is_at(path) and file.stat().st_nlink > 1:
                    # A copy by hard links (cp -l) has the same file, and would be locked with this one.
                    self._renew_lock(path)
                elif file.is_at(path):
                    file.resize(0)
                    file.write((0,), (json.dumps(new_owner()).encode(),))
                    self._sweep()
                    return FolderLock(file)
            file.close()

    def _renew_lock(self, path: str) -> None:
        """Put a lock file of its own in place of one that has several names; its lock is held."""
        file = PosixFile.create_beside(path)
        with closing_on_error(file):
            os.replace(file.path, path)
        file.close()

    def _sweep(self) -> None:
        """Remove what an interrupted writer left under temporary names."""
        for folder, _, names in os.walk(self.path):
            for name in names:
                if name.startswith(".") and name.endswith(".tmp"):
                    self.delete(os.path.join(folder, name))

    def owner(self) -> dict[str, Any] | None:
        # Not by trying the lock: a writer that came just then would be refused.
        owner = read_owner(self)
        return None if not owner or is_dead(owner) else owner


class FolderLock:
    """An exclusive `flock` on the lock file, which stays where it is."""

    def __init__(self, file: PosixFile) -> None:
        self._file = file
        close_in_children(file)

    def release(self) -> None:
        if not self._file.closed:
            self._file.resize(0)
            self._file.close()

    def abandon(self) -> None:
        self._file.close()


def _tag(status: os.stat_result) -> str:
    return f"{status.st_dev}:{status.st_ino}:{status.st_mtime_ns}"
