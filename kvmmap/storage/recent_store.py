"""The rows in 16 bits of one layer, in any storage: kept in memory, unless the storage has another place for them."""

from __future__ import annotations

from typing import Any, ClassVar

from numpy.typing import NDArray

from .._core import RecentRings
from ..geometry import CacheGeometry
from ..recent import RecentRows


class RecentStore:
    """The part of `LayerStore` that concerns the last and first rows of a layer, which are kept in 16 bits besides.

    Args:
        geometry: the cache's.
        index: the layer's number.
    """

    in_place: ClassVar[bool] = False
    """True if rows are stored once they are encoded, and `write` can't fail after it: a pushed position is then kept in
    `rings` in the same call, and `keep` is not called."""

    index: int

    def __init__(self, geometry: CacheGeometry, index: int) -> None:
        self.index = index
        self._cache_geometry = geometry
        self._keeps_recent = geometry.keeps_recent and geometry.layers[index].has_rows
        self._recent: RecentRows | None = None  # made when it is first asked for

    @property
    def recent(self) -> RecentRows | None:
        """What this handle has of the last and first rows in 16 bits; None if the cache keeps none."""
        if self._recent is None and self._keeps_recent:
            self._recent = RecentRows.of(self._cache_geometry, self.index)
        return self._recent

    def keep(self, start: int, keys: NDArray[Any], key_dtype: int, values: NDArray[Any], value_dtype: int) -> None:
        """Keep rows that were written from position `start` on in 16 bits besides: see `RecentRows.keep`. Called before
        `publish`, and only where `recent` is not None."""
        recent = self._recent or self.recent
        assert recent is not None
        recent.keep(start, keys, key_dtype, values, value_dtype)

    def rings(self) -> RecentRings | None:
        """Return the rings of `recent`, for a storage whose rows are in place once they are encoded: `in_place`."""
        return None if self.recent is None else self.recent.rings

    def recent_rows(self) -> RecentRows | None:
        """Return `recent`, with all that is stored for the positions below `length`."""
        return self.recent

    def take_recent(self, source: RecentRows, start: int, stop: int, at: int = 0) -> None:
        """Take over what another layer's `recent_rows` holds of positions [start, stop), whose coded rows were written
        here from position `at` on."""
        if self.recent is not None:
            self.recent.copy_from(source, start, stop, at)

    @property
    def has_unsaved_recent(self) -> bool:
        """True if rows in 16 bits are to be written, or those of truncated positions to be removed."""
        return False

    def save_recent(self) -> None:
        """Write the rows in 16 bits that are in memory alone, where the storage has another place for them."""

    def settle_recent(self) -> None:
        """As `save_recent`, and repair what a crash has torn: before the storage counts as closed."""

    def forget_recent(self, length: int) -> None:
        """Forget the rows in 16 bits of positions from `length` on."""
        if self.recent is not None:
            self.recent.cut(length)
