"""Dropping old checkpoints: the space comes back, and no power loss or death takes the last one along."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from pathlib import Path
from random import Random

import numpy as np
import pytest
from crash.machine import Killed, Machine
from helpers.support import rows

import kvmmap
from kvmmap.storage.file.thinning import drop_old_checkpoints

STATES = (kvmmap.StateSpec(0, "recurrent", "float32", (64, 64)),)
PINNED, LAST = 20, 50


def make(path: Path) -> None:
    """Make a cache with checkpoints at 10, 20 (pinned), 30, 40 and 50 positions."""
    step = rows(1, 10, 1, 4)
    with kvmmap.create(path, num_layers=1, capacity=100, num_kv_heads=1, head_dim=4, states=STATES) as cache:
        for position in range(10, LAST + 1, 10):
            cache.extend(step, step, np.arange(10))
            cache.write_states([np.full((64, 64), position, np.float32)])
            cache.checkpoint(pin=position == PINNED)


def check(path: Path, *, dropped: bool | None) -> None:
    with kvmmap.open(path) as cache:
        assert cache.seq_len == LAST
        assert cache.verify().sound
        positions = [found.position for found in cache.checkpoints]
        assert (positions == [PINNED, LAST]) == dropped or dropped is None
        for position in positions:
            np.testing.assert_array_equal(cache.read_states(position)[0, "recurrent"], np.full((64, 64), position))


def test_space_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    make(path)
    check(path, dropped=False)
    before = path.stat().st_blocks * 512
    assert drop_old_checkpoints(str(path)) == (PINNED, LAST)
    check(path, dropped=True)
    assert path.stat().st_blocks * 512 <= before - 2 * 64 * 64 * 4
    with kvmmap.open(path, "a") as cache:
        assert cache.truncate(30) == PINNED
        cache.extend(rows(1, 30, 1, 4), rows(1, 30, 1, 4), np.arange(30))
        cache.write_states([np.full((64, 64), LAST, np.float32)])
    check(path, dropped=True)


def test_a_reader_is_told(tmp_path: Path) -> None:
    make(tmp_path / "a.kvm")
    with kvmmap.open(tmp_path / "a.kvm") as reader:
        drop_old_checkpoints(str(tmp_path / "a.kvm"))
        with pytest.raises(kvmmap.CacheChangedError):
            reader.read_states(40)
        reader.refresh()
        assert [found.position for found in reader.checkpoints] == [PINNED, LAST]
    with kvmmap.open(tmp_path / "a.kvm", "a"), pytest.raises(kvmmap.CacheLockedError):
        drop_old_checkpoints(str(tmp_path / "a.kvm"))


def test_the_last_checkpoint_survives_a_crash_at_any_step(tmp_path: Path) -> None:
    died = 0
    for step in range(60):
        folder = tmp_path / str(step)
        folder.mkdir()
        random, machine = Random(step), Machine(str(folder))
        with machine.running(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the dead do not close
            make(folder / "a.kvm")
            machine.countdown = step
            finished = False
            with contextlib.suppress(Killed):
                drop_old_checkpoints(str(folder / "a.kvm"))
                finished = True
            machine.new_process()
            gc.collect()
            died += not finished
            image = tmp_path / f"{step}.kvm"
            for _ in range(4):
                image.write_bytes(machine.disk.power_loss(random)["a.kvm"])
                boot, machine.boot = machine.boot, -1
                check(image, dropped=True if finished else None)
                machine.boot = boot
            check(folder / "a.kvm", dropped=True if finished else None)
            os.unlink(image)
        if finished:
            break
    assert died > 10
