"""The memory map of a file, drawn to scale: the whole, its front, and one layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ..output import size
from . import charts
from .markup import Markup, element, figure, folded, table

if TYPE_CHECKING:
    from kvmmap.report import FileMap, FileSection

MOST_ROWS = 600
"""Sections that are listed; a file of more layers is like that all the way."""

CLASSES = {"key-codes": "keys", "value-codes": "values", "key-scales": "scales", "value-scales": "scales"}
LEGEND = (("records", "records"), ("keys", "key codes"), ("values", "value codes"), ("scales", "scales"))


def legend(entries: Sequence[tuple[str, str]]) -> Markup:
    """Return what colours mean: (class, words)."""
    items = []
    for name, words in entries:
        swatch = element(
            "svg", element("rect", class_=name, width="1", height="1"), viewBox="0 0 1 1", aria_hidden="true"
        )
        items.append(element("li", swatch, words))
    return element("ul", *items, class_="legend")


def filemap(found: FileMap) -> Iterator[Markup]:
    """Yield the drawings, each with a line below that shows what of it is on the disk, and the list of sections."""
    yield element(
        "p",
        "Bytes from left to right, to scale. The line below each drawing shows what of it lies on the disk; "
        "the rest is a hole that costs nothing.",
    )
    yield legend((*LEGEND, ("data", "on disk"), ("hole", "hole")))
    first = next((section for section in found.sections if section.layer == 0), None)
    front = found.file_bytes if first is None else first.offset
    yield _drawing("The whole file", found, 0, found.file_bytes)
    yield _drawing("Its front, magnified: records, token ids, checksums", found, 0, front)
    if first is not None:
        last = [section for section in found.sections if section.layer == 0][-1]
        yield _drawing("Layer 0, magnified", found, first.offset, last.offset + last.bytes)
    rows = [
        (
            section.name,
            "" if section.layer is None else f"{section.layer}",
            f"{section.offset:,}",
            f"{section.bytes:,}",
            f"{section.disk_bytes:,}",
            section.about,
        )
        for section in found.sections[:MOST_ROWS]
    ]
    head = ("section", "layer", "offset", "bytes", "on disk", "contents")
    cut = f", the first {MOST_ROWS} of {len(found.sections):,}" if len(found.sections) > MOST_ROWS else ""
    yield folded(f"Every section in numbers{cut}", table("Sections of the file", head, rows))


def _drawing(title: str, found: FileMap, start: int, stop: int) -> Markup:
    total = max(stop - start, 1)
    pieces = [
        (CLASSES.get(s.name, "records"), s.offset - start, s.bytes, _what(s))
        for s in found.sections
        if s.offset < stop and s.offset + s.bytes > start
    ]
    data = [
        ("data", max(offset, start) - start, min(offset + held, stop) - max(offset, start), f"{size(held)} on disk")
        for offset, held in found.data
        if offset < stop and offset + held > start
    ]
    caption = f"{title}: {size(total)}"
    about = f"{title}: {len(pieces)} sections in {size(total)}"
    there = f"{size(sum(int(piece[2]) for piece in data))} of it on disk"
    return figure(caption, charts.strip(about, pieces, total), charts.strip(there, data, total))


def _what(section: FileSection) -> str:
    of = "" if section.layer is None else f" of layer {section.layer}"
    return f"{section.name}{of}: {size(section.bytes)}, {size(section.disk_bytes)} on disk"
