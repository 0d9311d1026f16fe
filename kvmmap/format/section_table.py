"""The section table of a superblock: kinds, layers, offsets and sizes, checked as arrays.

A cache of 80 layers has some 400 sections, of which a program that opens it uses a few. So the table is checked a
column at a time, and an entry becomes an object when it is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptCacheError, VersionMismatchError
from .records import OPTIONAL, PAGE, Extent, Section

KNOWN_SECTIONS = frozenset(int(kind) for kind in Section)

_ENTRY = np.dtype([("kind", "<u2"), ("flags", "<u2"), ("layer", "<u4"), ("offset", "<u8"), ("size", "<u8")])
_LARGEST = 2**63


class SectionTable(Mapping[tuple[int, int], Extent]):
    """(kind, layer or WHOLE_CACHE) -> extent, of a file that exists.

    Args:
        data: the table's bytes.
        path: for messages.

    Raises:
        VersionMismatchError: a section of a kind that this package does not know and must not ignore.
        CorruptCacheError: an entry twice, or bounds that no file has.
    """

    def __init__(self, data: bytes | memoryview, path: str) -> None:
        table = np.frombuffer(data, _ENTRY)
        kinds, flags, layers, offsets, sizes = (table[name] for name in _ENTRY.names or ())
        unknown = set(kinds.tolist()) - KNOWN_SECTIONS
        for kind in sorted(unknown):
            if not (flags[kinds == kind] & OPTIONAL).all():
                raise VersionMismatchError(
                    f"{path}: has a section of kind {kind}, unknown here: use a newer kvmmap",
                    path=path,
                    expected=tuple(sorted(KNOWN_SECTIONS)),
                    actual=kind,
                )
        self.kinds, self._layers = kinds, layers
        keys = (kinds.astype(np.int64) << 32 | layers).tolist()
        self._rows = dict(zip(keys, range(len(keys)), strict=True))
        if len(self._rows) < len(keys):
            kind, layer = divmod(next(key for key in keys if keys.count(key) > 1), 2**32)
            raise CorruptCacheError(f"{path}: superblock damaged: section {kind} of layer {layer} twice", path=path)
        if len(keys) and (offsets | sizes).max() >= _LARGEST:
            raise CorruptCacheError(f"{path}: superblock damaged: a section ends at 2**63 or later", path=path)
        self._offsets, self._sizes = offsets.astype(np.int64), sizes.astype(np.int64)
        self._made: dict[tuple[int, int], Extent] = {}

    def __getitem__(self, key: tuple[int, int]) -> Extent:
        extent = self._made.get(key)
        if extent is None:
            row = self._rows[key[0] << 32 | key[1]]
            extent = self._made[key] = Extent(int(self._offsets[row]), int(self._sizes[row]))
        return extent

    def __contains__(self, key: object) -> bool:
        return isinstance(key, tuple) and key[0] << 32 | key[1] in self._rows

    def __eq__(self, other: object) -> bool:
        if isinstance(other, SectionTable) and all(
            map(np.array_equal, self._columns(), other._columns())  # in the same order, as two readings of a file are
        ):
            return True
        return super().__eq__(other)

    __hash__ = None  # type: ignore[assignment]  # as of every mapping that compares its items

    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self.kinds, self._layers, self._offsets, self._sizes

    def __iter__(self) -> Iterator[tuple[int, int]]:
        yield from zip(self.kinds.tolist(), self._layers.tolist(), strict=True)

    def __len__(self) -> int:
        return len(self._rows)

    def sizes_by_layer(self, num_layers: int, num_kinds: int) -> NDArray[np.int64]:
        """Return the sizes of layers' sections, int64 [num_layers, num_kinds]; -1 where there is none."""
        found = np.full((num_layers, num_kinds), -1, np.int64)
        mine = (self._layers < num_layers) & (self.kinds < num_kinds)
        found[self._layers[mine], self.kinds[mine]] = self._sizes[mine]
        return found

    def misplaced(self, start: int, stop: int) -> int | None:
        """Return the offset of a section that is off its page, overlaps another, or is not within [start, stop) of
        the file; None if there is none."""
        order = self._offsets.argsort(kind="stable")
        offsets = self._offsets[order]
        ends = offsets + self._sizes[order]  # may overflow: negative then
        before = np.empty_like(ends)
        before[:1], before[1:] = start, ends[:-1]
        wrong = (offsets % PAGE != 0) | (offsets < before) | (ends > stop) | (ends < offsets)
        return int(offsets[wrong.argmax()]) if wrong.any() else None
