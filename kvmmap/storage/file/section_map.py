"""The section map of a `.kvm` file: the offsets and sizes of its sections, and how much of each is allocated."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

from ...format import WHOLE_CACHE, Extent
from .mapped_file import open_file, read_superblock


class SectionExtent(NamedTuple):
    """One section of a file."""

    kind: int
    """Its kind; `Section` has the known ones, and an optional one may be unknown here."""
    layer: int | None
    offset: int
    size: int
    data: int
    """Bytes of it that are allocated; the rest is a hole."""


def read_extents(path: str) -> tuple[list[SectionExtent], int, list[Extent]]:
    """Return the sections in the order of their offsets, the superblock's size, and the ranges that hold data.

    Raises:
        FormatError, OSError: as in opening the file.
    """
    with contextlib.closing(open_file(path, writable=False)) as file:
        superblock = read_superblock(file)
        data = [Extent(start, stop - start) for start, stop in file.data_extents()]
    sections = [
        SectionExtent(kind, None if layer == WHOLE_CACHE else layer, extent.offset, extent.size, 0)
        for (kind, layer), extent in superblock.sections.items()
    ]
    sections.sort(key=lambda section: section.offset)
    return _with_data(sections, data), superblock.size, data


def _with_data(sections: list[SectionExtent], data: list[Extent]) -> list[SectionExtent]:
    """Count the bytes of data in each section; both lists rise."""
    found, first = [], 0
    for section in sections:
        stop, held = section.offset + section.size, 0
        while first < len(data) and data[first].offset + data[first].size <= section.offset:
            first += 1
        for extent in data[first:]:
            if extent.offset >= stop:
                break
            held += min(stop, extent.offset + extent.size) - max(section.offset, extent.offset)
        found.append(section._replace(data=held))
    return found
