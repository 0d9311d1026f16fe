"""A library's settings, kept as `library.json` in its folder. The file marks the folder as a library."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from ..errors import CacheNotFoundError, CorruptCacheError, NotACacheError, VersionMismatchError

NAME = "library.json"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Settings of a library."""

    version: int = VERSION
    number: str = ""
    """Eight hexadecimal digits, different for every library."""
    max_bytes: int | None = None
    """Bytes on the disk to keep at most; None for no limit."""
    ttl: float | None = None
    """Seconds after its last use for which a segment is kept; None for ever."""
    remote: str | None = None
    """URL of the object store that the library shares segments through."""


def load(folder: str, *, create: bool, **changes: Any) -> Settings:
    """Return a library's settings, with changes stored; make them where the folder is new or empty.

    Args:
        folder: the library's.
        create: make a library where there is none.
        changes: new values by name; None leaves a setting as it is.

    Raises:
        NotACacheError: the folder has other things in it, or is none.
        CacheNotFoundError: there is no library, and none is to be made.
        VersionMismatchError: a newer kvmmap made it.
        CorruptCacheError: the settings can't be read.
        OSError: the folder can't be made or written to.
    """
    path = os.path.join(folder, NAME)
    if os.path.lexists(folder) and not os.path.isdir(folder):
        raise NotACacheError(f"{folder}: is not a folder, which a library must be: give another path", path=folder)
    if not create and not is_library(folder):
        raise CacheNotFoundError(
            f"{folder}: is not a kvmmap library: it contains no {NAME}; kvmmap.Library(path) creates one", path=folder
        )
    os.makedirs(folder, mode=0o700, exist_ok=True)
    try:
        with open(path, "rb") as file:
            stored = _decode(file.read(), path)
    except FileNotFoundError:
        others = [name for name in os.listdir(folder) if not _is_ours(name)]
        if others:
            raise NotACacheError(
                f"{folder}: is not a kvmmap library, and contains other files ({others[0]!r}): give the path of a "
                "new or an empty folder",
                path=folder,
            ) from None
        stored = None
    wanted = {name: value for name, value in changes.items() if value is not None}
    settings = replace(stored or Settings(number=os.urandom(4).hex()), **wanted)
    if settings != stored:
        _store(path, settings)
    return settings


class CurrentSettings:
    """Settings of an open library, as they are now: another process may store other ones.

    Args:
        folder: the library's.
        settings: as `load` returned them.
    """

    def __init__(self, folder: str, settings: Settings) -> None:
        self._path = os.path.join(folder, NAME)
        self._settings = settings
        self._stamp = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self._path)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns

    def get(self) -> Settings:
        """Return them; the last ones that could be read, where they are gone or damaged."""
        stamp = self._look()
        if stamp != self._stamp:
            with contextlib.suppress(OSError, CorruptCacheError, VersionMismatchError):
                with open(self._path, "rb") as file:
                    found = _decode(file.read(), self._path)
                # A library that was made anew at the same path has another number, and its own settings.
                if found.number == self._settings.number:
                    self._settings = found
            self._stamp = stamp
        return self._settings


def is_library(folder: str) -> bool:
    """True if a folder is a library."""
    return os.path.isfile(os.path.join(folder, NAME))


def _is_ours(name: str) -> bool:
    return name in ("caches", "lost+found") or name.startswith(("index.sqlite3", ".library.json.", "lock"))


def _decode(data: bytes, path: str) -> Settings:
    try:
        raw = json.loads(data)
        version = raw["version"]
        if not isinstance(version, int):
            raise TypeError("its version is not a number")
        if version <= VERSION:
            _check(raw)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CorruptCacheError(
            f"{path}: the library's settings are damaged ({error}): remove this file, and give max_bytes again",
            path=path,
        ) from error
    if version > VERSION:
        raise VersionMismatchError(
            f"{path}: is a library of version {version}, and this kvmmap knows {VERSION}: use a newer kvmmap",
            path=path,
            expected=VERSION,
            actual=version,
        )
    return Settings(**{each.name: raw[each.name] for each in fields(Settings) if each.name in raw})


def _check(raw: dict[str, Any]) -> None:
    """Raise if a setting is not what `load` stores."""
    number, max_bytes, ttl, remote = [raw.get(name) for name in ("number", "max_bytes", "ttl", "remote")]
    if not isinstance(number, str) or not re.fullmatch("[0-9a-f]{8}", number):
        raise ValueError(f"its number is {number!r:.40}")
    if not (max_bytes is None or (type(max_bytes) is int and max_bytes > 0)):
        raise ValueError(f"max_bytes is {max_bytes!r:.40}")
    if not (ttl is None or (type(ttl) in (int, float) and 0 <= ttl < float("inf"))):
        raise ValueError(f"ttl is {ttl!r:.40}")
    if not isinstance(remote, str | None):
        raise TypeError(f"remote is {remote!r:.40}")


def _store(path: str, settings: Settings) -> None:
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.urandom(6).hex()}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            os.chmod(temporary, 0o600)
            json.dump(asdict(settings), file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
