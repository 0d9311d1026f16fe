"""Creating a `.kvm` file, giving it its name, removing it, and taking the writer's lock of one.

A file appears at its path complete and durable, or not at all. It replaces another one only while the other one's lock
is held.
"""

from __future__ import annotations

import contextlib
import os
import time
from typing import NoReturn

from ...errors import CacheExistsError, CacheLockedError, CacheNotFoundError, NotACacheError
from ...format import PAGE, Parent, Section, Slot, Superblock, checksum, num_slots
from ...geometry import CacheGeometry
from ...metadata import Document
from ..posix import PosixFile, closing_on_error
from ..temporary import ENDINGS, left_over_names
from .live_record import map_live
from .mapped_file import open_file, read_superblock

YOUNG = 600.0
"""Seconds for which a half made file stays, whether or not its maker seems to live."""

METADATA_ROOM = 64 * 1024
"""Bytes reserved for model and metadata, unless asked for otherwise."""


def place_of(path: str, *, overwrite: bool) -> str:
    """Return the path of a new file: of a link, the path of its target.

    Raises:
        CacheExistsError: the path exists, and `overwrite` is False.
    """
    if not os.path.lexists(path):
        return os.path.abspath(path)
    if not overwrite:
        raise already_exists(os.path.abspath(path))
    return os.path.realpath(path)


def already_exists(path: str) -> CacheExistsError:
    return CacheExistsError(
        f'{path}: exists already; kvmmap.open(path, mode="a") appends to it, create(..., overwrite=True) replaces it',
        path=path,
    )


def lock_file(path: str, timeout: float) -> tuple[PosixFile, Superblock]:
    """Open a cache file and take the writer's lock on it."""
    deadline = time.monotonic() + timeout
    while True:
        file = open_file(path, writable=True)
        with closing_on_error(file):
            superblock = read_superblock(file)  # first, because a file that is no cache is not locked
            if not file.lock(max(0.0, deadline - time.monotonic())):
                refuse_locked(file, superblock)
            if file.is_at(file.path):
                return file, superblock
        # The file was replaced (resized) or removed during the wait: the lock is that of a file without a name.
        file.close()


def refuse_locked(file: PosixFile, superblock: Superblock) -> NoReturn:
    """Raise for a file whose lock another writer holds."""
    pid = map_live(file, superblock, writable=False).get("writer_pid")
    who = f"process {pid}" if pid > 0 else "another process"
    if pid == os.getpid():
        who = "this process"
    raise CacheLockedError(
        f"{file.path}: {who} has it open for writing; close it there, or wait for it with timeout=SECONDS "
        '(reading needs no lock: mode="r")',
        path=file.path,
        actual=pid if pid > 0 else None,
    )


def remove_left_overs(path: str) -> None:
    """Remove the temporary files that dead creators of the cache at `path` left."""
    with contextlib.suppress(OSError), os.scandir(os.path.dirname(path) or ".") as entries:
        some = [entry for entry in entries if entry.name.endswith(ENDINGS)]
        if not some:  # mostly: compiling a pattern takes as long as planning a file
            return
        pattern = left_over_names(path)
        for entry in some:
            if pattern.fullmatch(entry.name):
                with contextlib.suppress(OSError):  # another process was faster, or may remove it and this one not
                    remove_dead(entry.path)


def remove_dead(path: str, age: float = YOUNG) -> bool:
    """Remove a temporary file whose creator is dead: its lock is free, and it was not written to lately.

    Args:
        path: the file.
        age: seconds since it was last written. A young one may be between its creation and its lock, or between its
            closing and its renaming.

    Returns:
        False if it stays.

    Raises:
        OSError: it can't be opened or removed.
    """
    file = PosixFile.open(path, writable=False)
    with contextlib.closing(file):
        old = time.time() - file.stat().st_mtime > age
        dead = old and file.try_lock() and file.is_at(path)
        if dead:
            os.unlink(path)
    return dead


def build_file(
    path: str,
    geometry: CacheGeometry,
    document: Document,
    *,
    metadata_room: int = METADATA_ROOM,
    parent: Parent | None = None,
    durable: bool = True,
) -> tuple[PosixFile, Superblock]:
    """Create a complete, empty cache file beside `path`, under a temporary name.

    Args:
        path: where it is to stand.
        geometry: of its own positions.
        document: model and metadata.
        metadata_room: bytes to reserve for these.
        parent: the file that it continues.
        durable: sync it; and remove what dead creators of `path` left.
    """
    data = document.encode()
    if durable:
        remove_left_overs(path)
    superblock = Superblock.plan(
        geometry,
        file_id=os.urandom(16),
        created_ns=time.time_ns(),
        metadata_bytes=max(metadata_room, len(data)),
        has_parent=parent is not None,
    )
    try:
        file = PosixFile.create_beside(path)
    except FileNotFoundError:
        raise CacheNotFoundError(f"{os.path.dirname(path)}: there is no such directory", path=path) from None
    try:
        file.resize(superblock.file_bytes)
        live, metadata = superblock.section(Section.LIVE), superblock.section(Section.METADATA)
        # Everything up to the live record is later written in place or through a map: allocate its disk space now.
        file.allocate(0, -(-(live.offset + live.size) // PAGE) * PAGE)
        file.write((0, metadata.offset), (superblock.encode(), data))
        if parent is not None:
            file.write((superblock.section(Section.PARENT).offset,), (parent.encode(),))
        slot = Slot(
            sequence=1,
            seq_len=0,
            token_len=0,
            generation=1,
            commit_ns=superblock.created_ns,
            closed=True,
            metadata_half=0,
            metadata_bytes=len(data),
            metadata_checksum=checksum(data),
            tail_checksums=(0,) * (geometry.num_layers + 1),
            checkpoints=Slot.none_named(superblock),
        )
        for section, commit in ((Section.SLOT_A, slot), (Section.SLOT_B, slot.successor())):
            file.write((superblock.section(section).offset,), (commit.encode(superblock.file_id),))
        record = map_live(file, superblock, writable=True)
        for name in ("superseded", "writer_pid", "token_len"):
            record.put(name, 0)
        record.put("generation", 1)
        record.put("acknowledged", 1)
        for layer in range(geometry.num_layers):
            record.publish(layer, 0)
        for number in range(num_slots(geometry)):
            record.publish_checkpoint(number, 0)
        if durable:
            file.sync()
    except BaseException:
        file.discard()
        raise
    return file, superblock


def place_file(partial: str, path: str, *, overwrite: bool = False, timeout: float = 0) -> None:
    """Rename a closed, complete file to `path`.

    Raises:
        CacheExistsError: `path` exists, and is no cache or must not be replaced.
        CacheLockedError: a writer holds the file that would be replaced.
    """
    with contextlib.closing(open_file(partial, writable=True)) as file:
        if overwrite and os.path.lexists(path):
            replace_file(file, path, timeout)
            return
        try:
            file.link_to(path)
        except FileExistsError:
            raise already_exists(path) from None


def replace_file(new: PosixFile, path: str, timeout: float) -> None:
    """Replace a cache that has no writer by `new`, and mark the old file as superseded for those who have it open.

    Raises:
        CacheExistsError: the file at `path` is no cache.
        CacheLockedError: a writer holds it.
    """
    try:
        old, superblock = lock_file(path, timeout)
    except NotACacheError as error:
        raise CacheExistsError(f"{error}, so it is not replaced: remove it yourself", path=path) from None
    with contextlib.closing(old):
        live = map_live(old, superblock, writable=True)
        new.copy_access(old)
        new.replace(path)
        live.put("superseded", 1)


def remove_file(path: str, timeout: float) -> None:
    """Delete the cache at `path` while holding its lock, so never from under a writer; durable on return."""
    file, _ = lock_file(path, timeout)
    with contextlib.closing(file):
        file.path = os.path.abspath(path)  # of a link, remove the link
        file.remove()
