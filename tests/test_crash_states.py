"""Power loss and killed writers of caches with states: a checkpoint is restored whole or not at all.

`KVMMAP_STATE_HISTORIES` sets how many histories; 460 are some 10,000 images.
"""

from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
from crash.machine import Mutation
from crash.states import StateHistory

import kvmmap
from kvmmap.format import CheckpointEntry
from kvmmap.storage.file.checkpoints import WriterCheckpoints

HISTORIES = int(os.environ.get("KVMMAP_STATE_HISTORIES", "120"))
BATCH = 40


@pytest.fixture(autouse=True, scope="module")
def small_heap() -> Iterator[None]:
    """Freeze the heap: every simulated death collects garbage, which takes long with torch imported."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        yield os.path.join(name, "machine")


def run(folder: str, seed: int, mutation: Mutation | None = None) -> StateHistory:
    path = f"{folder}{seed}"
    os.makedirs(path, exist_ok=True)
    history = StateHistory(path, seed, mutation)
    history.run(12, 20)
    return history


@pytest.mark.parametrize("batch", range(HISTORIES // BATCH))
def test_every_image_opens_to_a_checkpoint_of_its_rows(folder: str, batch: int) -> None:
    images = sum(run(folder, seed).images for seed in range(batch * BATCH, (batch + 1) * BATCH))
    print(f"{images} images")
    assert images >= BATCH * 18


def any_free_slot(self: WriterCheckpoints) -> int:
    """Overwrite what a commit names."""
    return next(slot for slot, entry in enumerate(self._named) if not entry.word)


def name_first(self: WriterCheckpoints, slot: int, position: int, arrays: Any) -> None:
    """Publish a checkpoint before it is written."""
    self._mapped.live.publish_checkpoint(slot, CheckpointEntry.of(position, False, 0).word)
    WRITE(self, slot, position, arrays)


def keep_all(self: WriterCheckpoints, length: int) -> None:
    """Keep checkpoints of truncated positions."""


WRITE = WriterCheckpoints._write
MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "slots that a commit names are overwritten": lambda: mock.patch.object(
        WriterCheckpoints, "_free_slot", any_free_slot
    ),
    "published before they are written": lambda: mock.patch.object(WriterCheckpoints, "_write", name_first),
    "truncation leaves them": lambda: mock.patch.object(WriterCheckpoints, "cut", keep_all),
    "an interrupted step is not looked at again": lambda: mock.patch.object(
        WriterCheckpoints, "reload", return_value=None
    ),
    "commits name none": lambda: mock.patch.object(
        WriterCheckpoints, "to_commit", lambda self, length: self._mapped.slots.newest()[1].checkpoints
    ),
}


def caught(folder: str, mutation: Mutation | None = None) -> bool:
    """True if one of the histories goes wrong."""
    for seed in range(200):
        try:
            run(folder, seed, mutation)
        except (AssertionError, kvmmap.KvmmapError, OSError):
            return True
    return False


@pytest.mark.parametrize("name", MUTATIONS)
def test_each_safeguard_is_necessary(folder: str, name: str) -> None:
    with MUTATIONS[name]():
        assert caught(folder)


@pytest.mark.parametrize("step", ["_commit", "_write_slot"])
def test_each_sync_is_necessary(folder: str, step: str) -> None:
    assert caught(folder, lambda kind, caller: (kind, caller) == ("sync", step))


def test_there_are_no_other_syncs(folder: str) -> None:
    asked: set[tuple[str, str]] = set()
    for seed in range(10):
        asked |= run(folder, seed).machine.asked
    steps = {"_commit", "_write_slot", "_make_durable", "build_file", "create", "resize_file", "replace_file"}
    assert {caller for kind, caller in asked if kind.startswith("sync")} <= {*steps, "_sync_name"}
