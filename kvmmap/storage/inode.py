"""An open file's identity, its access rights, and the file system that it is on."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import os
import struct
import sys

from ..format import checksum

_ACCESS_LIST = "system.posix_acl_access"
_OVERLAY_MAGIC = 0x794C7630  # linux/magic.h
_GET_GENERATION = 0x80007601 | (struct.calcsize("l") << 16)  # linux/fs.h: FS_IOC_GETVERSION, _IOR('v', 1, long)


def inode_id(fd: int) -> int:
    """Return 40 bits that no other file on this machine has at the same time, nor a later one under its inode number.

    A copy of the file has others. A link, or another name on the same file system, has the same.
    """
    status = os.fstat(fd)
    generation = bytearray(8)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # tmpfs has none, and needs none: it does not reuse numbers
            fcntl.ioctl(fd, _GET_GENERATION, generation)
    number = struct.pack("<QQI", status.st_dev, status.st_ino, int.from_bytes(generation[:4], sys.byteorder))
    return max(1, checksum(number) >> 24)


def copy_access(source: int, target: int) -> None:
    """Give a file the owner, group, mode and access list of another one, as far as this user may.

    Where the group can't be given, its permissions are not either: they would be another group's.
    """
    theirs, mine = os.fstat(source), os.fstat(target)
    mode = theirs.st_mode & 0o777
    if (theirs.st_uid, theirs.st_gid) != (mine.st_uid, mine.st_gid):
        with contextlib.suppress(PermissionError):
            os.fchown(target, theirs.st_uid, -1)
        try:
            os.fchown(target, -1, theirs.st_gid)
        except PermissionError:
            mode &= ~0o070
    os.fchmod(target, mode)
    if hasattr(os, "getxattr"):
        with contextlib.suppress(OSError):  # there is none, or the file system knows none
            os.setxattr(target, _ACCESS_LIST, os.getxattr(source, _ACCESS_LIST))


@functools.cache
def _c_library() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def on_overlay(fd: int) -> bool:
    """True if a file is on overlayfs."""
    if sys.platform != "linux":
        return False
    status = ctypes.create_string_buffer(256)  # struct statfs: f_type comes first
    if _c_library().fstatfs(fd, status):
        return False
    kind = int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return kind & 0xFFFFFFFF == _OVERLAY_MAGIC
