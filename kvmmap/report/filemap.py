"""The map of a `.kvm` file: which bytes are what, and how much of it is there."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..cache import QuantizedKvCache
from ..format import SECTION_ABOUT, Section
from ..storage.file.section_map import SectionExtent, read_extents


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSection:
    """A section of the file, or its superblock."""

    name: str
    """As in docs/format.md, in small letters with hyphens: "superblock", "key-codes"."""

    layer: int | None
    """The layer it belongs to; None for what belongs to the whole cache."""

    offset: int
    """Bytes from the start of the file."""

    bytes: int
    """Its size, for the whole capacity."""

    disk_bytes: int
    """How many of them are allocated on the disk; the rest is a hole."""

    about: str
    """What is in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileMap:
    """A whole file."""

    path: str
    """Absolute path."""

    file_bytes: int
    """Size of the file, holes included."""

    sections: tuple[FileSection, ...]
    """In the order of their offsets."""

    data: tuple[tuple[int, int], ...]
    """(offset, bytes) of the ranges that are allocated on the disk; between them are holes."""

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain JSON types."""
        plain = asdict(self)
        plain["sections"] = list(plain["sections"])
        plain["data"] = [list(extent) for extent in self.data]
        return plain


def file_map(cache: QuantizedKvCache) -> FileMap | None:
    """Return the map of an open cache's file; None if it is not a `.kvm` file.

    Raises:
        ClosedError: the cache is closed.
        FormatError, OSError: the file at its path can't be read (any more).
    """
    facts = cache.facts()
    if facts["kind"] != "kvm" or cache.path is None:
        return None
    extents, head, data = read_extents(cache.path)
    superblock = FileSection(
        name="superblock",
        layer=None,
        offset=0,
        bytes=head,
        disk_bytes=head,
        about="geometry, and where everything else lies",
    )
    return FileMap(
        path=cache.path,
        file_bytes=facts["file_bytes"],
        sections=(superblock, *map(_section, extents)),
        data=tuple((extent.offset, extent.size) for extent in data),
    )


def _section(extent: SectionExtent) -> FileSection:
    known = Section(extent.kind) if extent.kind in SECTION_ABOUT else None
    if known is Section.CHECKPOINT:
        return FileSection(
            name=f"checkpoint-{extent.layer}",
            layer=None,
            offset=extent.offset,
            bytes=extent.size,
            disk_bytes=extent.data,
            about="checkpoint slot: all states at one position",
        )
    return FileSection(
        name=f"section-{extent.kind}" if known is None else known.name.lower().replace("_", "-"),
        layer=extent.layer,
        offset=extent.offset,
        bytes=extent.size,
        disk_bytes=extent.data,
        about="made by a newer kvmmap" if known is None else SECTION_ABOUT[known],
    )
