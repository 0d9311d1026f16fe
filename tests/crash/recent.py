"""Histories of caches that keep some rows in 16 bits: each that is there is that of its position's row, or none is.

What such a row holds is derived from the position's tag, as the coded row is. Whether it is there is not promised after
a power loss or a death; that it is the right one is, and that a closed cache has all that its writer had.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np

from crash.history import History, PromiseError, State
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.storage.file import recent_records
from kvmmap.storage.file.reader import MappedReader

GEOMETRIES = (
    CacheGeometry(400, (LayerGeometry(1, 3, 3),) * 2, block_tokens=64, recent_window=32, sinks=3),
    CacheGeometry(700, (LayerGeometry(2, 5, 4), LayerGeometry(1, 8, 8)), block_tokens=256, recent_window=7),
    CacheGeometry(300, (LayerGeometry(1, 40, 24),), block_tokens=16, recent_window=20, sinks=30),
    CacheGeometry(200, (LayerGeometry(0, 0, 0), LayerGeometry(3, 8, 8)), block_tokens=16, sinks=12),
)


def halves_of(tags: Any, layer: int, heads: int, dim: int, part: int) -> np.ndarray:
    """f16 [n, heads, dim] of positions 0.. with these tags."""
    seeds = np.asarray(tags, np.int64) * 613 + np.arange(len(tags)) * 29 + layer * 7 + part * 1009
    grid = np.arange(heads * dim).reshape(heads, dim) * 3
    return ((seeds[:, None, None] * 5 + grid) % 2003 - 1001).astype(np.float16)


class RecentHistory(History):
    """One history of a cache that keeps rows in 16 bits."""

    geometries = GEOMETRIES
    held = 0
    """Rows in 16 bits that were looked at."""
    before_closing: list[list[list[int]]] | None = None
    time = 0.0

    def keep(self, start: int, after: State) -> None:
        assert self.writer
        if self.random.random() < 0.15:
            return  # rows that come without
        self.time += 0.0 if self.next_tag % 3 else 1.0  # in a rush, or not
        for number in self.writer.geometry.row_layers:
            shape = self.geometry.layers[number]
            parts = [
                halves_of(after.tags, number, shape.num_kv_heads, dim, part)[start:]
                for part, dim in enumerate((shape.head_dim, shape.value_head_dim))
            ]
            layer = self.writer.layers[number]
            if len(after.tags) == start + 1:  # as a push does
                staged = layer.stage(start, 1)
                staged.fill(layer.slabs().part(start, start + 1))
                layer.write(start, staged)
                parts = [part[0] for part in parts]
            with mock.patch.object(recent_records, "clock", return_value=self.time):
                layer.keep(start, parts[0], 1, parts[1], 1)

    def close(self) -> None:
        assert self.writer
        held = self._held(self.writer)
        super().close()
        self.before_closing = held

    def open(self) -> None:
        super().open()
        assert self.writer
        if self.before_closing is not None and self._held(self.writer) != self.before_closing:
            raise PromiseError("rows in 16 bits were lost by closing")

    def _random_step(self) -> None:
        super()._random_step()
        if self.writer is not None:
            self.before_closing = None

    def resize(self) -> None:
        self.before_closing = None
        super().resize()

    def overwrite(self) -> None:
        self.before_closing = None
        super().overwrite()

    def lose_power(self) -> None:
        self.before_closing = None
        super().lose_power()

    def _held(self, reader: MappedReader) -> list[list[list[int]]]:
        found = []
        for number in reader.geometry.row_layers:
            layer = reader.layers[number]
            kept = layer.recent_rows()
            assert kept is not None
            found.append([kept.first.held(0, min(layer.length, kept.sinks)), kept.ring.held(0, layer.length)])
        return found

    def _same(self, reader: MappedReader, state: State) -> bool:
        return super()._same(reader, state) and self._recent_same(reader, state)

    def _recent_same(self, reader: MappedReader, state: State) -> bool:
        for number in reader.geometry.row_layers:
            layer = reader.layers[number]
            shape, kept = layer.geometry, layer.recent_rows()
            assert kept is not None
            for part, (name, dim) in enumerate((("keys", shape.head_dim), ("values", shape.value_head_dim))):
                expected = halves_of(state.tags, number, shape.num_kv_heads, dim, part).astype(np.float32)
                for position, row in kept.rows(name, 0, state.length, state.length):
                    self.held += 1
                    if not np.array_equal(row, expected[position]):
                        return False
        return True
