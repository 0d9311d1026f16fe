"""Rows in 16 bits after power loss, and after processes have died: the right one of each position, or none."""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any
from unittest import mock

import numpy as np
import pytest
from crash.history import PromiseError
from crash.recent import RecentHistory

from kvmmap import _core

HISTORIES = int(os.environ.get("KVMMAP_HISTORIES", "450")) // 15
STEPS, IMAGES = 24, 10


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """Freeze the heap: every simulated death collects garbage, which takes long with torch imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def folder() -> Iterator[str]:
    """The folder for the machines' many files: in memory where possible."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield os.path.join(name, "machine")


def run(folder: str, seed: int) -> RecentHistory:
    path = f"{folder}{seed}"
    os.makedirs(path, exist_ok=True)
    history = RecentHistory(path, seed)
    history.run(STEPS, IMAGES)
    return history


def test_every_row_in_16_bits_is_that_of_its_position(folder: str) -> None:
    held = [run(folder, seed).held for seed in range(HISTORIES)]
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


@pytest.mark.parametrize("mutation", [without_digests, checksums_alone])
def test_each_part_of_a_record_is_necessary(folder: str, mutation: Any) -> None:
    with mock.patch("kvmmap.recent._core.take_recent_records", mutation):
        for seed in range(300):
            try:
                run(folder, seed)
            except (PromiseError, AssertionError):
                return
    raise AssertionError(f"nobody noticed {mutation.__name__}")
