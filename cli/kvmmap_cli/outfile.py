"""Files that a command writes besides caches: pages and pictures. Checked before any work is done, written at its end.

A regular file appears whole or not at all, and a link's target is what is written. What is no regular file (a pipe, a
device) is written to and stays what it is.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from .asking import confirm
from .output import plain

F = TypeVar("F", bound=Callable[..., Any])


def overwrite_option(command: F) -> F:
    """Add the option that `check` takes."""
    return click.option("--overwrite", is_flag=True, help="Replace a file that is there, without asking.")(command)


def check(path: str, option: str, endings: Sequence[str], source: str, *, overwrite: bool) -> str:
    """Refuse a place that can't be written or must not be, before any work is done; return its path.

    Args:
        path: as the user wrote it.
        option: the option that gives it, for messages.
        endings: those that such files have.
        source: the cache that is read, which must not be written.
        overwrite: replace a file that is there without asking.

    Raises:
        click.UsageError: says why.
    """
    if not path:
        raise click.UsageError(f"{option} is empty: give a file")
    if "\0" in path:  # what Python says of it differs from version to version
        raise click.UsageError(f"{plain(path)}: a path can't hold a null byte: give a file as {option}")
    path = os.path.expanduser(path) if path[0] == "~" and not os.path.lexists(path) else path
    try:
        status = os.stat(path)
    except FileNotFoundError:
        status = None
    except (OSError, ValueError) as error:
        raise click.UsageError(f"{plain(path)}: {getattr(error, 'strerror', None) or error}") from None
    if status is not None and stat.S_ISDIR(status.st_mode):
        raise click.UsageError(f"{plain(path)} is a directory: give a file as {option}")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder):
        raise click.UsageError(f"{plain(os.path.dirname(path) or folder)}: there is no such directory")
    if status is not None and os.path.exists(source) and os.path.samestat(status, os.stat(source)):
        raise click.UsageError(f"{plain(path)} is the cache itself: give another {option}")
    regular = status is None or stat.S_ISREG(status.st_mode)
    if regular and not path.lower().endswith(tuple(endings)):
        confirm(f"{plain(path)} does not end in {' or '.join(endings)}. Write it there?", overwrite, "--overwrite")
    if status is not None and (regular or stat.S_ISBLK(status.st_mode)):
        confirm(f"{plain(path)} exists already. Replace it?", overwrite, "--overwrite")
    return path


def write(path: str, data: bytes) -> None:
    """Write a file, or write to what is there if that is no regular file.

    Raises:
        OSError: names the file.
    """
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    target = os.path.realpath(path)
    if mode is None or os.path.exists(target):  # a pipe behind /dev/stdout has no path of its own
        path = target
    try:
        if mode is None or stat.S_ISREG(mode):
            _replace(path, data, mode)
        else:
            with open(path, "wb", buffering=0) as stream:
                left = memoryview(data)
                while left:
                    left = left[stream.write(left) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), path) from error


def _replace(path: str, data: bytes, mode: int | None) -> None:
    """Put a file in its place; it has the mode of the one that was there, or that of any new file."""
    # `kvmmap gc` finds what a killed command leaves by this form of name.
    beside = os.path.join(os.path.dirname(path), f".kvmmap-{os.urandom(6).hex()}.tmp")
    fd = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            os.fchmod(file.fileno(), 0o666 & ~_umask() if mode is None else stat.S_IMODE(mode))
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _umask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
