"""The section table of a superblock: kinds, layers, offsets and sizes, checked as arrays.

A cache of 80 layers has some 400 sections, of which a program that opens it uses a few. So the table is checked as
arrays, and an entry becomes an object when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptCacheError, VersionMismatchError
from .records import OPTIONAL, PAGE, Extent, Section

KNOWN_SECTIONS = frozenset(int(kind) for kind in Section)

_ENTRY = np.dtype([("kind", "<u2"), ("flags", "<u2"), ("layer", "<u4"), ("offset", "<i8"), ("size", "<i8")])
NUM_KINDS = max(Section) + 1


class SectionTable(Mapping[tuple[int, int], Extent]):
    """(kind, layer or WHOLE_CACHE) -> extent, of a file that exists.

    Args:
        data: the table's bytes.
        num_layers: layers of the cache.
        path: for messages.

    Raises:
        VersionMismatchError: a section of a kind that this package does not know and must not ignore.
        CorruptCacheError: an entry twice, or bounds that no file has.
    """

    def __init__(self, data: bytes | memoryview, num_layers: int, path: str) -> None:
        self._table = table = np.frombuffer(data, _ENTRY)
        kinds, layers = table["kind"], table["layer"]
        self.kinds = frozenset(kinds.tolist())
        """Kinds of section that there are."""
        if not self.kinds <= KNOWN_SECTIONS:
            self._refuse_unknown(path)
        # Extents of layers' sections are made when they are asked for, from rows that are found by layer and kind.
        mine = (layers < num_layers) & (kinds < NUM_KINDS)
        rows = mine.nonzero()[0]
        self._rows = np.full((num_layers, NUM_KINDS), -1, np.int32)
        self._rows[layers[rows], kinds[rows]] = rows
        others = table[~mine].tolist()
        self._made = {(kind, layer): Extent(offset, size) for kind, _, layer, offset, size in others}
        if np.count_nonzero(self._rows >= 0) + len(self._made) < len(table):
            keys = list(self)
            kind, layer = next(key for key in keys if keys.count(key) > 1)
            raise CorruptCacheError(f"{path}: superblock damaged: section {kind} of layer {layer} twice", path=path)
        if len(table) and (table["offset"] | table["size"]).min() < 0:
            raise CorruptCacheError(f"{path}: superblock damaged: a section ends at 2**63 or later", path=path)

    def _refuse_unknown(self, path: str) -> None:
        """Raise for a kind that is unknown and may not be ignored."""
        kinds, flags = self._table["kind"], self._table["flags"]
        for kind in sorted(self.kinds - KNOWN_SECTIONS):
            if not (flags[kinds == kind] & OPTIONAL).all():
                raise VersionMismatchError(
                    f"{path}: has a section of kind {kind}, unknown here: use a newer kvmmap",
                    path=path,
                    expected=tuple(sorted(KNOWN_SECTIONS)),
                    actual=kind,
                )

    def __getitem__(self, key: tuple[int, int]) -> Extent:
        extent = self._made.get(key)
        if extent is None:
            kind, layer = key
            row = self._rows[layer, kind] if 0 <= layer < len(self._rows) and 0 <= kind < NUM_KINDS else -1
            if row < 0:
                raise KeyError(key)
            *_, offset, size = self._table[row].item()
            extent = self._made[key] = Extent(offset, size)
        return extent

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SectionTable) and self._table.tobytes() == other._table.tobytes():
            return True
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as of every mapping that compares its items

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from zip(self._table["kind"].tolist(), self._table["layer"].tolist(), strict=True)

    def __len__(self) -> int:
        return len(self._table)

    def count(self, kind: Section) -> int:
        """Return how many sections of a kind there are."""
        return int(np.count_nonzero(self._table["kind"] == kind)) if kind in self.kinds else 0

    def sizes_by_layer(self) -> NDArray[np.int64]:
        """Return the sizes of layers' sections, int64 [num_layers, kinds]; -1 where there is none."""
        sizes = self._table["size"][self._rows]
        sizes[self._rows < 0] = -1
        return sizes

    def misplaced(self, start: int, stop: int) -> int | None:
        """Return the offset of a section that is off its page, overlaps another, or is not within [start, stop) of
        the file; None if there is none."""
        order = self._table["offset"].argsort(kind="stable")
        offsets, sizes = self._table["offset"][order], self._table["size"][order]
        ends = offsets + sizes  # may overflow: negative then
        before = np.empty_like(ends)
        before[:1], before[1:] = start, ends[:-1]
        wrong = (offsets & (PAGE - 1) != 0) | (offsets < before) | (ends > stop) | (ends < offsets)
        return int(offsets[wrong.argmax()]) if wrong.any() else None
