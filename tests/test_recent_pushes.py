"""Rows in 16 bits of positions that come one by one: what the file has of them before a commit, by how fast they come.

Time is what a test says: `recent_records.clock` tells it.
"""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import recent_oracle
from helpers.support import rows, run_python

import kvmmap
from kvmmap.storage.file import recent_records

WINDOW, SINKS = 40, 3
SHAPE: dict[str, Any] = {"num_kv_heads": 2, "head_dim": 8, "recent_window": WINDOW, "sinks": SINKS}
NAN = np.full((2, 8), np.nan, np.float32)


def holding(layer: Any) -> int:
    return int(layer.recent_rows().num_held(len(layer)))


def in_file(path: Path) -> list[np.ndarray]:
    """What a reader that opens the file now finds in 16 bits: for each layer which positions."""
    found = []
    with kvmmap.open(path) as reader:
        for layer in reader.layers:
            kept = layer.recent_rows()
            assert kept is not None
            positions = {*kept.first.held(0, min(len(layer), SINKS)), *kept.ring.held(0, len(layer))}
            found.append(np.array(sorted(positions)))
    return found


def kept_of(cache: kvmmap.QuantizedKvCache) -> np.ndarray:
    return recent_oracle.kept(cache.seq_len, WINDOW, SINKS)


@pytest.fixture(params=["slow", "rush"])
def pace(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each push a second after the other, or all at once."""
    clock: Callable[[], float] = itertools.count().__next__ if request.param == "slow" else lambda: 0.0
    monkeypatch.setattr(recent_records, "clock", clock)
    return str(request.param)


# What a dead process leaves

DEATHS = """
import itertools, os, sys
import numpy as np, kvmmap
from kvmmap.storage.file import recent_records
recent_records.clock = {"slow": itertools.count().__next__, "rush": lambda: 0.0}[sys.argv[2]]
cache = kvmmap.create(sys.argv[1], num_layers=2, capacity=400, num_kv_heads=2, head_dim=8, recent_window=40, sinks=3)
for position in range(101):
    row = np.random.default_rng(position).standard_normal((2, 2, 8), np.float32)
    if sys.argv[3] == "step":
        cache.push_step(row, -row)
    else:
        for layer, mine in zip(cache.layers, row):
            layer.push(mine, -mine)
os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("way", ["step", "layers"])
@pytest.mark.parametrize("speed", ["slow", "rush"])
def test_a_killed_process_leaves_its_last_rows_coded(path: Path, speed: str, way: str) -> None:
    assert run_python(DEATHS, path, speed, way, check=False).returncode == -9
    keys = np.stack(
        [np.random.default_rng(position).standard_normal((2, 2, 8), np.float32) for position in range(101)], 1
    )
    saved = 96 if speed == "slow" else 16  # what came at once is not saved any more
    with kvmmap.open(path, "a") as cache:
        assert cache.seq_len == 101
        for layer, mine in zip(cache.layers, keys, strict=True):
            expected = kvmmap.dequantize_rows(*kvmmap.quantize_rows(mine))
            exact = recent_oracle.kept(101, WINDOW, SINKS)
            exact[saved:] = False
            expected[exact] = recent_oracle.halves(mine[exact])
            np.testing.assert_array_equal(layer.read_keys(), expected)
            layer.push(mine[0], mine[0])  # and it continues
    with kvmmap.open(path) as cache:
        assert cache.verify().sound
        assert not cache.verify().inexact
        assert [holding(layer) for layer in cache.layers] == [int(exact.sum()) - exact[61] + 1] * 2


# What the file has meanwhile


def test_of_slow_pushes_all_but_the_last_15(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_records, "clock", itertools.count().__next__)
    with kvmmap.create(path, num_layers=1, capacity=200, **SHAPE) as cache:
        for position, row in enumerate(rows(100, 2, 8)):
            cache.layers[0].push(row, row)
            (found,) = in_file(path)
            saved = (position + 1) // 16 * 16
            expected = np.flatnonzero(kept_of(cache))
            np.testing.assert_array_equal(found, expected[expected < saved])


@pytest.mark.parametrize("count", [16, 21])
def test_of_chunks_of_16_and_more_all(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recent_records, "clock", lambda: 0.0)
    with kvmmap.create(path, num_layers=1, capacity=200, **SHAPE) as cache:
        for _ in range(6):
            cache.extend(*[rows(1, count, 2, 8)] * 2)
            np.testing.assert_array_equal(in_file(path)[0], np.flatnonzero(kept_of(cache)))


@pytest.mark.parametrize("count", [1, 5])
def test_of_a_rush_what_there_is_time_for(path: Path, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Records of 16 positions, or of more, are written if so much time has passed since the last ones."""
    now = [100.0]
    monkeypatch.setattr(recent_records, "clock", lambda: now[0])
    new = rows(1000, 2, 8)
    with kvmmap.create(path, num_layers=2, capacity=1000, **SHAPE) as cache:

        def append(stop: int) -> np.ndarray:
            for start in range(cache.seq_len, stop, count):
                part = new[start : start + count]
                for layer in cache.layers:
                    layer.extend(part, part) if count > 1 else layer.push(part[0], part[0])
            first, second = in_file(path)
            np.testing.assert_array_equal(first, second)
            return first

        size = 2 * cache.geometry.layers[0].recent_bytes
        np.testing.assert_array_equal(append(200), np.arange(SINKS))
        now[0] += 0.99 * (WINDOW + SINKS) * size / recent_records.WHOLE_RATE
        np.testing.assert_array_equal(append(400), np.arange(SINKS))
        now[0] += 0.02 * (WINDOW + SINKS) * size / recent_records.WHOLE_RATE
        found = append(420)
        saved = 416 if count == 1 else 420
        np.testing.assert_array_equal(found, np.r_[0:SINKS, 420 - WINDOW : saved])
        now[0] += 16 * size / recent_records.EACH_RATE
        found = append(435)  # 16 positions are left, or fewer
        saved = 432 if count == 1 else 435
        np.testing.assert_array_equal(found, np.r_[0:SINKS, 435 - WINDOW : saved])
        cache.flush()
        np.testing.assert_array_equal(in_file(path)[0], np.flatnonzero(kept_of(cache)))


# Whatever is called in between


@pytest.mark.parametrize("seed", range(6))
def test_appends_of_all_kinds_lose_no_row(tmp_path: Path, pace: str, seed: int) -> None:
    """A file, a child of one, and memory agree at each commit, and so do readers and the reopened files."""
    random = np.random.default_rng(seed)
    memory = kvmmap.QuantizedKvCache(2, 1200, **SHAPE)
    kvmmap.create(tmp_path / "parent.kvm", num_layers=2, capacity=1200, **SHAPE).close()
    with kvmmap.open(tmp_path / "parent.kvm", "a") as parent:
        start = rows(2, 50, 2, 8)
        for cache in (parent, memory):
            cache.extend(start, -start)
    alone, child = tmp_path / "alone.kvm", tmp_path / "child.kvm"
    kvmmap.fork(tmp_path / "parent.kvm", alone).close()
    kvmmap.create(child, parent=tmp_path / "parent.kvm").close()
    caches = [kvmmap.open(alone, "a"), kvmmap.open(child, "a"), memory]
    coded = [[array.copy() for array in layer.read_quantized(10, 30)] for layer in memory.layers]
    for step in range(24):
        count = int(random.choice([1, 2, 7, 15, 16, 33]))
        new = random.standard_normal((2, count, 2, 8)).astype(np.float32)
        kind = str(random.choice(["push", "push", "step", "extend", "coded", "refused", "truncate", "flush", "reopen"]))
        for cache in caches:
            if kind == "extend":
                cache.extend(new, -new)
            elif kind == "coded":
                for layer, arrays in zip(cache.layers, coded, strict=True):
                    layer.extend_quantized(*(array[:count] for array in arrays))
            elif kind == "truncate":
                cache.truncate(max(50, cache.seq_len - count))
            for position in range(count):
                if kind == "step":
                    cache.push_step(new[:, position], -new[:, position])
                for layer, mine in zip(cache.layers, new[:, position], strict=True):
                    if kind in ("push", "refused"):
                        layer.push(mine, -mine)
                    if kind == "refused":
                        with pytest.raises(kvmmap.NonFiniteError):
                            layer.push(mine, NAN)
        if kind in ("flush", "reopen") or step == 23:
            for number, name in enumerate((alone, child)):
                caches[number].flush()
                with kvmmap.open(name) as reader:
                    check_same(reader, caches[number])
                if kind == "reopen":
                    caches[number].close()
                    caches[number] = kvmmap.open(name, "a")
        check_same(caches[0], memory)
        check_same(caches[1], memory)
    for cache in caches:
        cache.close()


def check_same(found: kvmmap.QuantizedKvCache, expected: kvmmap.QuantizedKvCache) -> None:
    for mine, other in zip(found.layers, expected.layers, strict=True):
        np.testing.assert_array_equal(mine.read_keys(), other.read_keys())
        np.testing.assert_array_equal(mine.read_values(), other.read_values())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("way", ["step", "layers"])
def test_records_that_can_not_be_written(path: Path, way: str, layer: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """An append that fails in one layer's records appends nothing, and leaves nothing in 16 bits for other rows."""
    monkeypatch.setattr(recent_records, "clock", itertools.count().__next__)
    save, full = recent_records.LayerRecords.save, [False]

    def fail(self: recent_records.LayerRecords, *arguments: Any) -> None:
        if full[0] and self is cache.layers[layer]._store._records:  # type: ignore[attr-defined]
            raise OSError(errno.ENOSPC, "full")
        save(self, *arguments)

    monkeypatch.setattr(recent_records.LayerRecords, "save", fail)
    new = rows(2, 64, 2, 8)
    with kvmmap.create(path, num_layers=2, capacity=100, **SHAPE) as cache:

        def append(position: int) -> None:
            if way == "step":
                return cache.push_step(new[:, position], -new[:, position])
            for each, mine in zip(cache.layers, new[:, position], strict=True):
                if len(each) == position:
                    each.push(mine, -mine)
            return None

        for position in range(47):
            append(position)
        full[0] = True
        with pytest.raises(OSError, match="full"):
            append(47)
        full[0] = False
        lengths = [47, 47] if way == "step" or not layer else [48, 47]
        assert [len(each) for each in cache.layers] == lengths
        coded = [array.copy() for array in cache.layers[layer].read_quantized(20, 21)]
        cache.layers[layer].extend_quantized(*coded)  # in place of the row that failed
        np.testing.assert_array_equal(cache.layers[layer].get_keys_at(47), kvmmap.dequantize_rows(*coded[:2])[0])
        cache.layers[1 - layer].push(new[0, 5], new[0, 5]) if len(cache.layers[1 - layer]) == 47 else None
        before = [each.read_keys() for each in cache.layers]
    with kvmmap.open(path) as cache:
        for each, keys in zip(cache.layers, before, strict=True):
            np.testing.assert_array_equal(each.read_keys(), keys)
        assert cache.verify().sound


def test_a_row_that_failed_is_not_the_digest_of_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A push is refused after a multiple of 16: its codes have replaced those of a row that is still to be saved."""
    monkeypatch.setattr(recent_records, "clock", lambda: 0.0)
    new = rows(33, 2, 8)
    with kvmmap.create(path, num_layers=1, capacity=100, **SHAPE) as cache:
        for row in new[:32]:
            cache.layers[0].push(row, row)
        with pytest.raises(kvmmap.NonFiniteError):
            cache.layers[0].push(new[32], NAN)
        cache.flush()
        np.testing.assert_array_equal(in_file(path)[0], np.arange(32))
