"""Rows in 16 bits of a layer in a group: one small array of records, which a commit replaces whole.

The records are those of a `.kvm` file, the first positions' before the last ones'. Each counts where it fits the coded
row, so it does not matter which commit they come from.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ...recent import DAMAGED, RecentRows, take_records
from ..objects.protocol import MissingObjectError
from ..protocols import Rows
from .handle import GroupHandle

Coded = Callable[[int, int], Rows]
"""Returns a layer's coded rows of positions [start, stop)."""


def load_recent(handle: GroupHandle, layer: int, rows: RecentRows, coded: Coded, length: int) -> list[int]:
    """Fetch what is not in memory yet of the first `length` positions, and return those whose record is damaged."""
    if rows.is_full(length):
        return []
    try:
        data = memoryview(handle.objects.get(handle.layout.recent_key(layer))).cast("B")
    except MissingObjectError:
        return []  # nothing was appended yet, or by a program that keeps none
    size = handle.geometry.layers[layer].recent_bytes
    if len(data) != (rows.sinks + rows.window) * size:
        return [0] if length else []
    damaged = []
    edge = rows.sinks * size
    for ring, records, start, stop in (
        (rows.first, data[:edge], 0, min(length, rows.sinks)),
        (rows.ring, data[edge:], max(0, length - rows.window), length),
    ):
        if start < stop and ring.slots:
            states = take_records(ring, records, coded(start, stop), start, start, stop)
            damaged += [position for position, state in states if state == DAMAGED]
    return damaged


def recent_records(rows: RecentRows, size: int, coded: Coded, length: int) -> NDArray[np.uint8]:
    """Return the records of the first `length` positions, as the array has them.

    Args:
        rows: those of the layer.
        size: bytes of a record.
        coded: the layer's coded rows.
        length: positions that count.
    """
    whole = np.zeros((rows.sinks + rows.window, size), np.uint8)
    first, start = min(length, rows.sinks), max(0, length - rows.window)
    if first:
        whole[:first] = rows.records(rows.first, coded(0, first), 0, 0, first)
    if rows.window and start < length:
        slots = rows.sinks + np.arange(start, length) % rows.window
        whole[slots] = rows.records(rows.ring, coded(start, length), start, start, length)
    return whole
