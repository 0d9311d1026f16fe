"""A layer without rows: it keeps states, or shares another layer's rows, and is as long as those that have rows."""

from __future__ import annotations

from ..rows import Rows
from .protocols import LayerStore


class RowlessLayer(LayerStore):
    """A layer of any storage that keeps no rows. Everything is done when it is asked for."""

    in_memory = True

    @property
    def length(self) -> int:
        """Positions complete in every layer that has rows."""
        return self._storage.seq_len

    @length.setter
    def length(self, length: int) -> None:
        """The other layers' lengths count."""

    def begin(self, count: int) -> int:
        self._storage.check_writable()
        return self.length

    def rows(self, start: int, stop: int) -> Rows:
        return Rows.of(self.geometry, ())

    def write(self, start: int, rows: Rows) -> None:
        """There is nothing to write."""

    def stage(self, start: int, count: int) -> Rows:
        return Rows.of(self.geometry, ())

    def publish(self, length: int) -> None:
        """The other layers' lengths count."""
