"""Rows in 16 bits after power loss, and after processes have died: the right one of each position, or none."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import numpy as np
import pytest
from crash.recent import RecentHistory
from crash.runs import caught, run_history

from kvmmap import _core

pytestmark = pytest.mark.usefixtures("small_heap")
HISTORIES = int(os.environ.get("KVMMAP_HISTORIES", "450")) // 15
STEPS, IMAGES = 24, 10


def run(folder: str, seed: int) -> RecentHistory:
    return run_history(RecentHistory, folder, seed, steps=STEPS, images=IMAGES)


def test_every_row_in_16_bits_is_that_of_its_position(machine_folder: str) -> None:
    held = [run(machine_folder, seed).held for seed in range(HISTORIES)]
    print(f"{sum(held)} rows in {HISTORIES} histories")
    assert sum(held) > 100 * HISTORIES


def without_digests(records: Any, ring: Any, arrays: Any, first: int, start: int, stop: int) -> list[int]:
    """Believe a record whose tag is that of the position."""
    tags, keys, values = ring
    data = np.frombuffer(records, np.uint8).reshape(len(tags), -1)
    for position in range(start, stop):
        slot = position % len(tags)
        tag = int(data[slot, :8].view(np.uint64)[0])
        if tag and (tag & (1 << 40) - 1) == position + 1 and not tags[slot]:
            edge = 24 + keys[slot].nbytes
            keys[slot] = data[slot, 24:edge].view(np.uint16).reshape(keys[slot].shape)
            values[slot] = data[slot, edge : edge + values[slot].nbytes].view(np.uint16).reshape(values[slot].shape)
            tags[slot] = tag
    return [1] * max(0, stop - start)


def checksums_alone(records: Any, ring: Any, arrays: Any, first: int, start: int, stop: int) -> list[int]:
    """Believe a record whose own checksum matches, whatever the coded row."""
    found = []
    for position in range(start, stop):
        states = TAKE(records, ring, arrays, first, position, position + 1)
        if states == [3]:
            without_digests(records, ring, arrays, first, position, position + 1)
        found += states
    return found


TAKE = _core.take_recent_records


@pytest.mark.parametrize(("mutation", "first"), [(without_digests, 34), (checksums_alone, 98)])
def test_each_part_of_a_record_is_necessary(machine_folder: str, mutation: Any, first: int) -> None:
    """The search begins with a seed that is known to detect it; after a change of the code it may be another."""
    with mock.patch("kvmmap.recent._core.take_recent_records", mutation):
        found = caught(lambda seed: run(machine_folder, seed), (*range(first, 300), *range(first)), (AssertionError,))
        assert found, f"{mutation.__name__} is not detected"
