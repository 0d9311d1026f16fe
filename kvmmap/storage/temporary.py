"""Names of temporary files: composed and recognised here, and nowhere else.

    .NAME.RANDOM.tmp        a file that is being made, and gets the name NAME when it is whole
    NAME.STAMP.partial      a cache that is being filled; STAMP is random (an import), or says what is copied to it
    .kvmmap-RANDOM.tmp      a page or picture that the command line writes: the name that it gets may be any

NAME is cut where it is so long that the whole would exceed 255 bytes, the limit of most file systems.
"""

from __future__ import annotations

import os
import re
import zlib

LONGEST_IN_TEMPORARY = 230
"""Bytes of NAME in a `.tmp` name: the name of a `.partial` file always fits."""

LONGEST_IN_PARTIAL = 180
"""Bytes of NAME in a `.partial` name."""

ENDINGS = (".tmp", ".partial")
"""How all such names end."""

_RANDOM = "[0-9a-f]{12}"
_STAMP = "[0-9a-f]{24}"
_ENDINGS = r"\.(?:kvm|safetensors)"


def temporary_path(path: str) -> str:
    """Return a new path beside `path`, for a file that is to become `path`."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{_cut(name, LONGEST_IN_TEMPORARY)}.{os.urandom(6).hex()}.tmp")


def partial_path(path: str, stamp: str | None = None) -> str:
    """Return the path of a cache that is filled before it becomes `path`.

    Args:
        path: the cache to be.
        stamp: 24 hexadecimal digits, so that an interrupted copy is found again; random by default.
    """
    folder, name = os.path.split(path)
    return os.path.join(folder, f"{_cut(name, LONGEST_IN_PARTIAL)}.{stamp or os.urandom(6).hex()}.partial")


def left_over_names(path: str) -> re.Pattern[str]:
    """Return what matches names of temporary files for `path` that are not continued after a crash."""
    name = re.sub(rf"\.{_RANDOM}\.partial$", "", os.path.basename(path))
    whole = re.escape(_cut(name, LONGEST_IN_TEMPORARY))
    part = rf"{re.escape(_cut(name, LONGEST_IN_PARTIAL))}\.{_RANDOM}\.partial"
    return re.compile(rf"\.{whole}\.{_RANDOM}\.tmp|\.{part}\.{_RANDOM}\.tmp|{part}", re.DOTALL)


def is_temporary(name: str) -> bool:
    """True for the name of a temporary file of a cache, an export, a page or a picture, or of an interrupted copy."""
    return _TEMPORARY.fullmatch(name) is not None


_TEMPORARY = re.compile(
    rf"\..+{_ENDINGS}\.{_RANDOM}\.tmp|\..+\.(?:{_RANDOM}|{_STAMP})\.partial\.{_RANDOM}\.tmp"
    rf"|.+\.{_STAMP}\.partial|.+{_ENDINGS}\.{_RANDOM}\.partial|\.kvmmap-{_RANDOM}\.tmp",
    re.DOTALL,
)


def _cut(name: str, most: int) -> str:
    """Return a name of at most `most` bytes: a longer one keeps its beginning and its ending around a checksum."""
    data = os.fsencode(name)
    if len(data) <= most:
        return name
    stem, ending = os.path.splitext(name)
    if len(os.fsencode(ending)) > 12:
        stem, ending = name, ""
    middle = f"~{zlib.crc32(data):08x}{ending}"
    kept = os.fsencode(stem)[: most - len(os.fsencode(middle))]
    for _ in range(3):
        if kept and data[len(kept)] & 0xC0 == 0x80:  # within a character of UTF-8
            kept = kept[:-1]
    return os.fsdecode(kept) + middle
