"""The connections to a library's index: opened, shared between threads, reopened, and replaced when it is damaged.

What the tables mean is not known here. No transaction lasts longer than a `with` block, and none does I/O on segments.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Any

from ..errors import CacheLockedError, CacheNotFoundError, LibraryFullError
from ..storage.posix import FILE_MODE
from .schema import PRAGMAS, TABLES, VERSION

NAME = "index.sqlite3"
BUSY_SECONDS = 30.0
"""Time to wait for another process's transaction. They take milliseconds; a stopped process may hold one for longer."""


class IndexLostError(Exception):
    """The index was damaged or deleted, and an empty one has taken its place: fill it from the segments."""


class Database:
    """The index of a library, for all threads of a process; a forked process opens its own connections.

    Args:
        folder: the library's.
    """

    def __init__(self, folder: str) -> None:
        self.path = os.path.join(folder, NAME)
        self._lock_path = os.path.join(folder, "lock")
        self._mutex = threading.Lock()
        self._idle: list[sqlite3.Connection] = []
        self._inherited: list[sqlite3.Connection] = []
        self._pid = os.getpid()
        self._inode = (0, 0)
        self.closed = False
        """True after `release`: connections are closed after each use."""

    # Transactions

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Give a connection to read with. Reads never wait for writers.

        Raises:
            IndexLostError: the index is a new one.
            LibraryFullError: the disk is full; nothing was changed.
            CacheLockedError: another process has held the index for too long.
            OSError: the index can't be read or written.
        """
        try:
            connection = self._take()
        except sqlite3.OperationalError as error:
            raise self._typed(error) from error
        try:
            yield connection
        except sqlite3.DatabaseError as error:
            self._drop(connection)
            self._judge(error)
            raise self._typed(error) from error
        except BaseException:
            self._give(connection)
            raise
        self._give(connection)

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Give a connection in a transaction, which is committed when the block ends well and rolled back if not.

        Raises:
            IndexLostError: the index is a new one.
        """
        with self.reading() as connection:
            self._begin(connection)
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    connection.execute("ROLLBACK")
                raise

    @staticmethod
    def _begin(connection: sqlite3.Connection) -> None:
        # SQLite's own waiting doubles its pauses up to 100 ms; transactions here take a few, so pauses are short.
        deadline = time.monotonic() + BUSY_SECONDS
        pause = 0.0005
        while True:
            try:
                connection.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError as error:
                if not _is_busy(error) or time.monotonic() > deadline:
                    raise
            time.sleep(pause)
            pause = min(pause * 1.5, 0.01)

    # Connections

    def _take(self) -> sqlite3.Connection:
        with self._mutex:
            if os.getpid() != self._pid:
                # Connections must not be used, or closed, by a process that was forked from theirs.
                self._inherited += self._idle
                self._idle, self._pid = [], os.getpid()
            try:
                status = os.stat(self.path)
                inode = (status.st_dev, status.st_ino)
            except FileNotFoundError:
                inode = (0, 0)
            if inode != self._inode or inode == (0, 0):
                for connection in self._idle:
                    connection.close()
                self._idle = []
                self._prepare()
            if self._idle:
                return self._idle.pop()
        return self._connect()

    def _give(self, connection: sqlite3.Connection) -> None:
        with self._mutex:
            if not self.closed and os.getpid() == self._pid:
                self._idle.append(connection)
                return
        connection.close()

    def _drop(self, connection: sqlite3.Connection) -> None:
        with contextlib.suppress(sqlite3.Error):
            connection.close()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, cached_statements=64
        )
        try:
            for pragma in PRAGMAS:
                connection.execute(pragma)
        except sqlite3.DatabaseError as error:
            connection.close()
            self._judge(error)
            raise
        connection.execute("PRAGMA busy_timeout = 0")  # `_begin` waits, and reads never do
        return connection

    # Making and replacing

    def _prepare(self) -> None:
        """Open the index that is there now; make an empty one where there is none, or none that is of use."""
        lost = False
        with self._making():
            if os.path.exists(self.path) and not self._usable():
                self._set_aside()
            if not os.path.exists(self.path):
                lost = True
                self._make()
            status = os.stat(self.path)
            self._inode = (status.st_dev, status.st_ino)
        if lost:
            raise IndexLostError

    @contextlib.contextmanager
    def _making(self) -> Iterator[None]:
        """Hold the lock under which an index is made or replaced."""
        try:
            fd = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, FILE_MODE)
        except FileNotFoundError:
            folder = os.path.dirname(self.path)
            raise CacheNotFoundError(
                f"{folder}: the library was moved or deleted while it was open: open it again", path=folder
            ) from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _usable(self) -> bool:
        try:
            with contextlib.closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as probe:
                if probe.execute("PRAGMA user_version").fetchone()[0] != VERSION:
                    return False
                probe.execute("SELECT count(*) FROM usage").fetchone()
                return bool(probe.execute("PRAGMA schema_version").fetchone())
        except sqlite3.OperationalError as error:
            return _is_busy(error)
        except sqlite3.DatabaseError:
            return False

    def _set_aside(self) -> None:
        """Move a damaged index away, to be looked at later; the one that was moved before is removed."""
        os.replace(self.path, f"{self.path}.damaged")

    def _make(self) -> None:
        for ending in ("-wal", "-shm"):
            # Those of an index that was deleted: SQLite would take them for the new one's.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.path + ending)
        temporary = f"{self.path}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.close(os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE))
        with contextlib.closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
            connection.executescript(f"BEGIN; {TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        os.replace(temporary, self.path)

    def _judge(self, error: sqlite3.DatabaseError) -> None:
        """Replace the index if an error says that it is damaged."""
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        damaged = code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) or "no such" in str(error)
        if not damaged and (code != sqlite3.SQLITE_IOERR or self._usable()):
            return
        with self._mutex:
            with self._making():
                status = None
                with contextlib.suppress(FileNotFoundError):
                    status = os.stat(self.path)
                if status is not None and (status.st_dev, status.st_ino) == self._inode:
                    self._set_aside()
            for connection in self._idle:
                self._drop(connection)
            self._idle = []
            self._inode = (0, 0)
            self._prepare()

    def _typed(self, error: sqlite3.DatabaseError) -> Exception:
        """Return the error for a caller in place of SQLite's; that one itself, where the place is not at fault."""
        code, folder = getattr(error, "sqlite_errorcode", 0) & 0xFF, os.path.dirname(self.path)
        if code == sqlite3.SQLITE_FULL:
            return LibraryFullError(
                f"{folder}: the disk is full, so the library's index can't be written; nothing was changed: free some "
                "space",
                path=folder,
            )
        if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            return CacheLockedError(
                f"{self.path}: another process has held the index for {BUSY_SECONDS:.0f} s: is it stopped?",
                path=self.path,
            )
        if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM):
            return PermissionError(errno.EACCES, f"the library's index can't be written ({error})", self.path)
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN):
            return OSError(errno.EIO, f"the library's index can't be used ({error})", self.path)
        return error

    def release(self) -> None:
        """Close all connections, those in use when they are given back. Later uses open their own."""
        with self._mutex:
            self.closed = True
            for connection in self._idle:
                if os.getpid() == self._pid:
                    connection.close()
            self._idle = []

    def facts(self) -> dict[str, Any]:
        """Return the sizes of the index's files."""
        sizes = {}
        for ending in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                sizes[NAME + ending] = os.stat(self.path + ending).st_blocks * 512
        return sizes


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
