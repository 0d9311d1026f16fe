"""The system calls on one cache file, and nothing else: open, write, sync, lock, map, rename.

Everything that reaches the disk goes through a `PosixFile`, so that a test can replace it by one that records, fails,
or loses writes. What the bytes mean is not known here.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from .. import _core
from . import advice, copy_range, inode
from .temporary import temporary_path

FILE_MODE = 0o600  # a KV cache gives its prompt away

_PAGE = 4096
_COPY_BYTES = 1 << 20
_NO_ACCESS_TIME = getattr(os, "O_NOATIME", 0)
_BY_NUMBER = "/proc/self/fd/"


Method = TypeVar("Method", bound=Callable[..., Any])
Wrote = TypeVar("Wrote")


def _names_file(method: Method) -> Method:
    """Give the errors of calls on a descriptor the file's path: the system does not know it."""

    @functools.wraps(method)
    def call(file: PosixFile, *args: Any, **more: Any) -> Any:
        try:
            return method(file, *args, **more)
        except OSError as error:
            file._name(error)
            raise

    return cast(Method, call)


class PosixFile:
    """An open file. Writes are positioned and whole; every failure is an OSError that names the file."""

    def __init__(self, fd: int, path: str, *, read_only: bool = False) -> None:
        self.path = path
        self._fd = fd
        self._read_only = read_only

    @classmethod
    def open(cls, path: str, *, writable: bool, used: bool = False) -> PosixFile:
        """Open an existing file.

        Args:
            path: which one.
            writable: for writing, too.
            used: let the system note when it is read. Otherwise its access time stays, where the system has a way to
                ask for that (Linux) and the file is this user's.
        """
        flags = (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not hang us
        return cls(_open(path, flags if used else flags | _NO_ACCESS_TIME), path, read_only=not writable)

    @classmethod
    def create_beside(cls, path: str) -> PosixFile:
        """Create an empty file of mode 0600 in the directory of `path`, under a temporary name.

        It is locked, so that other processes know that its creator runs.
        """
        temporary = temporary_path(path)
        try:
            fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
            file = cls(fd, temporary)
            file.try_lock()
            return file
        except (KeyboardInterrupt, SystemExit):
            # A signal may come between creating the file and storing its descriptor. The random name is ours alone.
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise

    @property
    def closed(self) -> bool:
        return self._fd < 0

    def _name(self, error: OSError) -> None:
        if error.errno is not None and (error.filename is None or str(error.filename).startswith(_BY_NUMBER)):
            error.filename = self.path

    @_names_file
    def stat(self) -> os.stat_result:
        return os.fstat(self._fd)

    @_names_file
    def set_access_time(self, nanoseconds: int) -> None:
        """Store when the file was last read, in nanoseconds since 1970."""
        os.utime(self._fd, ns=(nanoseconds, self.stat().st_mtime_ns))

    def copy_access(self, other: PosixFile) -> None:
        """Give this file the owner, group, mode and access list of another one: see `inode.copy_access`."""
        inode.copy_access(other._fd, self._fd)

    def on_overlay(self) -> bool:
        """True if the file is on overlayfs, which gives a file another inode below when it is first changed."""
        return inode.on_overlay(self._fd)

    def inode_id(self) -> int:
        """Return a number of this inode: see `inode.inode_id`."""
        return inode.inode_id(self._fd)

    def is_at(self, path: str) -> bool:
        """True if `path` still names this very file."""
        try:
            return os.path.samestat(self.stat(), os.stat(path))
        except FileNotFoundError:
            return False

    @_names_file
    def read(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer only at the end of the file."""
        parts = []
        while size > 0:
            part = os.pread(self._fd, size, offset)
            if not part:
                break
            parts.append(part)
            offset += len(part)
            size -= len(part)
        return b"".join(parts)

    def read_alone(self, offset: int, size: int) -> bytes:
        """As `read`, without the system's read-ahead: see `advice.at_random`."""
        with advice.at_random(self._fd):
            return self.read(offset, size)

    @_names_file
    def read_into(self, offset: int, target: memoryview) -> None:
        """Fill a buffer from `offset`.

        Raises:
            EOFError: the file ends before.
        """
        done, size = 0, target.nbytes
        target = target.cast("B")
        while done < size:
            count = os.preadv(self._fd, [target[done:]], offset + done)
            if not count:
                raise EOFError(f"{self.path}: ends at {offset + done}, {size - done} bytes early")
            done += count

    def read_ahead(self, offset: int, size: int) -> None:
        """Start reading `size` bytes from `offset` on into memory."""
        advice.read_ahead(self._fd, offset, size)

    def write(self, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        """Write each buffer at its offset, in order, all of it."""
        try:
            _core.write_all(self._fd, offsets, buffers)
        except OSError as error:
            self._name(error)
            raise

    def write_by(self, write: Callable[..., Wrote], *arguments: Any) -> Wrote:
        """Call a compiled function that encodes rows and writes them: (file descriptor, arguments)."""
        try:
            return write(self._fd, *arguments)
        except OSError as error:
            self._name(error)
            raise

    def start_sync(self, offset: int, size: int) -> None:
        """Start writing a range to the disk, so that the next `sync` waits less."""
        _core.start_sync(self._fd, offset, size)

    @_names_file
    def copy_from(self, source: PosixFile, start: int, at: int, size: int) -> None:
        """Copy `size` bytes of another file, from `start` on, to `at`, both on a page.

        Whole pages are shared with it on the disk where the file system can; elsewhere the kernel copies them.
        """
        whole = size - size % _PAGE
        if whole and copy_range.share_pages(source._fd, self._fd, start, at, whole):
            start, at, size = start + whole, at + whole, size - whole
        while size:
            count = self._copy_some(source, start, at, size)
            start, at, size = start + count, at + count, size - count

    def _copy_some(self, source: PosixFile, start: int, at: int, size: int) -> int:
        count = copy_range.copy_some(source._fd, self._fd, start, at, size)
        if count:
            return count
        data = source.read(start, min(size, _COPY_BYTES))
        if not data:
            raise OSError(errno.EIO, "the file ends before its rows do", source.path)
        self.write((at,), (data,))
        return len(data)

    @_names_file
    def sync(self) -> None:
        """Wait until everything written is on the disk."""
        os.fdatasync(self._fd)

    def release(self, offset: int, size: int) -> None:
        """Return the disk space of a range to the file system, where it can do that. The range reads as zeros then."""
        _core.punch_hole(self._fd, offset, size)

    @_names_file
    def resize(self, size: int) -> None:
        """Give the file its size; what is new is a hole."""
        os.ftruncate(self._fd, size)

    @_names_file
    def allocate(self, offset: int, size: int) -> None:
        """Reserve disk space, so that a store through a map can't fail for lack of it."""
        try:
            os.posix_fallocate(self._fd, offset, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
            self.write((offset,), (bytes(size),))

    def data_extents(self) -> Iterator[tuple[int, int]]:
        """Yield (start, stop) of each allocated range; the whole file where the file system does not report them."""
        size, start = self.stat().st_size, 0
        while start < size:
            try:
                start = os.lseek(self._fd, start, os.SEEK_DATA)
                stop = os.lseek(self._fd, start, os.SEEK_HOLE)
            except OSError as error:
                if error.errno == errno.ENXIO:  # only a hole is left
                    return
                stop = size
            yield start, stop
            start = stop

    @_names_file
    def map(self, offset: int, size: int, *, writable: bool = False) -> tuple[mmap.mmap, int]:
        """Map `size` bytes from `offset`, shared; return the map and where in it they start."""
        start = offset - offset % mmap.ALLOCATIONGRANULARITY
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        # mmap keeps a duplicate of the descriptor it is given for as long as any view lives, and a lock goes only
        # with the last duplicate. So a writer's map gets one of another open file, which never held the lock. Files
        # opened for reading are locked only where nothing maps them (`repair`, `remove_dead`).
        if self._read_only and not writable:
            return mmap.mmap(self._fd, size + offset - start, access=access, offset=start), offset - start
        fd = self._reopen(os.O_RDWR if writable else os.O_RDONLY)
        try:
            memory = mmap.mmap(fd, size + offset - start, access=access, offset=start)
        finally:
            os.close(fd)
        return memory, offset - start

    def _reopen(self, flags: int) -> int:
        """Open the same file again, whatever its name is now."""
        by_number = f"{_BY_NUMBER}{self._fd}"
        flags |= os.O_CLOEXEC | (fcntl.fcntl(self._fd, fcntl.F_GETFL) & _NO_ACCESS_TIME)
        fd = os.open(by_number if os.path.exists(by_number) else self.path, flags)
        if os.path.samestat(os.fstat(fd), self.stat()):
            return fd
        os.close(fd)
        raise OSError(errno.ESTALE, "the file was replaced while it was being opened", self.path)

    def try_lock(self) -> bool:
        """Take the writer's lock if it is free. It ends with the descriptor, and so with the process."""
        # flock and not lockf: POSIX locks are dropped when any descriptor of the file is closed.
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        return True

    @_names_file
    def unlock(self) -> None:
        """Release the lock."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    @_names_file
    def lock(self, timeout: float) -> bool:
        """Take the writer's lock, waiting up to `timeout` seconds for it."""
        deadline = time.monotonic() + timeout
        pause = 0.001
        while not self.try_lock():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(pause * 2, 0.05)
        return True

    def link_to(self, path: str, *, durable: bool = True) -> None:
        """Rename this file to `path`, which must not exist; durable on return unless `durable` is False.

        If the directory can't be synced, the name is removed: the file exists durably, or not at all.
        """
        try:
            self._link(self.path, path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            # No hard links here (FAT): the check and the rename are not atomic.
            if os.path.lexists(path):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path) from None
            self._rename(self.path, path)
        else:
            self._unlink(self.path)
        self.path = path
        if not durable:
            return
        try:
            self._sync_folder(path)
        except OSError:
            with contextlib.suppress(OSError):
                self._unlink(path)
            raise

    def replace(self, path: str) -> None:
        """Rename this file to `path`, replacing what is there; durable on return."""
        self._rename(self.path, path)
        self.path = path
        self._sync_folder(path)

    def sync_name(self) -> None:
        """Make the file's name durable, as far as it still has the one it was opened under."""
        with contextlib.suppress(FileNotFoundError):
            self._sync_folder(self.path)

    def remove(self) -> None:
        """Remove the file's name; durable on return."""
        self._unlink(self.path)
        self._sync_folder(self.path)

    def discard(self) -> None:
        """Remove the file's name and close it."""
        try:
            with contextlib.suppress(FileNotFoundError):
                self._unlink(self.path)
        finally:
            self.close()

    # One system call each, for a test's file to record or to fail

    def _link(self, source: str, target: str) -> None:
        os.link(source, target)

    def _rename(self, source: str, target: str) -> None:
        os.replace(source, target)

    def _unlink(self, path: str) -> None:
        os.unlink(path)

    def _sync_folder(self, path: str) -> None:
        sync_folder(path)

    def close(self) -> None:
        """Close the descriptor; maps stay as long as they are used."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            warnings.warn(f"cache not closed: {self.path}", ResourceWarning, stacklevel=2, source=self)
            self.close()


def _open(path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except PermissionError:
        if not flags & _NO_ACCESS_TIME:
            raise
        return os.open(path, flags & ~_NO_ACCESS_TIME)  # another user's file


def sync_folder(path: str) -> None:
    """Make the directory entry of `path` durable."""
    fd = os.open(os.path.dirname(path) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def closing_on_error(file: PosixFile) -> Iterator[PosixFile]:
    """Close the file if the block fails; leave it open if it does not."""
    try:
        yield file
    except BaseException:
        file.close()
        raise
