"""Copying bytes between two open files within the kernel: shared pages where the file system can, else copies."""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import sys

_FICLONERANGE = 0x4020940D  # linux/fs.h: _IOW(0x94, 13, struct file_clone_range)
_CLONE_RANGE = struct.Struct("=qQQQ")  # source descriptor, source offset, length, offset in the target


def share_pages(source: int, target: int, start: int, at: int, size: int) -> bool:
    """Let both files have the same pages on the disk; False if that can't be done here.

    Args:
        source, target: descriptors.
        start: where the range begins in the source, on a page.
        at: where it begins in the target, on a page.
        size: bytes, whole pages.
    """
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(target, _FICLONERANGE, _CLONE_RANGE.pack(source, start, size, at))
    except OSError:  # not this file system, not across two, or its blocks are larger
        return False
    return True


def copy_some(source: int, target: int, start: int, at: int, size: int) -> int:
    """Copy up to `size` bytes, and return how many; 0 if the kernel can't between these two, or the source ends."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            return os.copy_file_range(source, target, size, start, at)
    return 0
