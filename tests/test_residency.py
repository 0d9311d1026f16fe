"""Prefetching and releasing pages: memory use changes, and reads don't."""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.support import MakeCache, make_file, rows, run_python

import kvmmap
from kvmmap.storage.file import page_cache

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def resident(path: Path) -> int:
    """Bytes of a file's maps that are in this process's memory."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


def filled(path: Path, length: int, *, heads: int = 8, dim: int = 64) -> Path:
    with kvmmap.create(path, num_layers=2, capacity=length + 10, num_kv_heads=heads, head_dim=dim) as cache:
        keys = rows(2, length, heads, dim)
        cache.extend(keys, -keys)
    return path


@linux
def test_released_rows_leave_memory_and_are_read_again(path: Path) -> None:
    filled(path, 3000)
    with kvmmap.open(path) as cache:
        layer = cache.layers[1]
        before = [array.copy() for array in layer.read_quantized()]
        view = layer.key_codes
        full = resident(path)
        assert full > 3000 * layer.geometry.position_bytes * 0.9
        layer.release(1000, 2000)
        assert full - resident(path) > 900 * layer.geometry.position_bytes
        layer.release()
        assert resident(path) < 200_000
        np.testing.assert_array_equal(view, before[0])
        for array, expected in zip(layer.read_quantized(), before, strict=True):
            np.testing.assert_array_equal(array, expected)


@linux
def test_releasing_spares_the_pages_of_neighbours(path: Path) -> None:
    filled(path, 3000)
    with kvmmap.open(path) as cache:
        layer = cache.layers[0]
        layer.read_quantized().key_codes.max()
        full = resident(path)
        layer.release(1000, 1003)  # 1.5 KB of key codes: no page lies whole within
        assert resident(path) == full


def test_prefetch_and_release_over_any_storage(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=2, capacity=600)
    keys = rows(2, 500, 2, 16)
    cache.extend(keys, -keys)
    layer = cache.layers[1]
    before = layer.read_keys()
    layer.prefetch()
    layer.prefetch(10, 20)
    layer.prefetch(500)
    layer.release(0, 256)
    layer.release()
    np.testing.assert_array_equal(layer.read_keys(), before)
    for call in (layer.prefetch, layer.release):
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            call(0, 501)
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            call(-1, 5)
    cache.close()
    for call in (layer.prefetch, layer.release):
        with pytest.raises(kvmmap.ClosedError):
            call(0, 5)


@linux
def test_prefetched_rows_are_in_the_page_cache(path: Path) -> None:
    filled(path, 20_000)
    with kvmmap.open(path) as cache:
        layer = cache.layers[1]
        layer.release()
        if not make_cold(path):
            pytest.skip("this file system keeps files in memory")
        layer.prefetch()
        deadline = time.monotonic() + 30
        wanted = len(layer) * layer.geometry.position_bytes
        while cached(path) < wanted and time.monotonic() < deadline:
            time.sleep(0.01)
        assert cached(path) >= wanted


def make_cold(path: Path) -> bool:
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    return cached(path) < path.stat().st_size / 100


def cached(path: Path) -> int:
    """Bytes of a file that are in the page cache, by mincore."""
    import ctypes

    size = path.stat().st_size
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as memory:
        view = np.frombuffer(memory, np.uint8)
        address, count = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size)
        assert ctypes.CDLL(None).mincore(address, count, pages.ctypes.data_as(ctypes.c_void_p)) == 0
        del view
    return int((pages & 1).sum()) * mmap.PAGESIZE


@pytest.mark.parametrize("part", [1, 5000, 40_000, 1 << 30])
@pytest.mark.parametrize("positions", [None, (0, 0), (3, 700), np.array([2, 0, 5])])
def test_streamed_attention_is_attention(path: Path, part: int, positions: object, monkeypatch) -> None:
    monkeypatch.setattr(page_cache, "SCAN_BYTES", part)
    if part == 1:
        monkeypatch.setattr(page_cache, "SCAN_BYTES", 3 * 4 * 2 * (16 + 16 + 8))
    filled(path, 1500, heads=2, dim=16)
    queries = rows(3, 4, 16, seed=5)
    with kvmmap.open(path) as cache:
        layer = cache.layers[1]
        for more in ({}, {"window": 400, "sinks": 4}, {"causal": False}, {"query_start": 100}):
            out, lse = layer.attend(queries, positions=positions, return_lse=True, **more)
            streamed, streamed_lse = layer.attend(
                queries, positions=positions, return_lse=True, resident="stream", **more
            )
            np.testing.assert_allclose(streamed, out, rtol=0, atol=2e-6 * max(np.abs(out).max(), 1e-30))
            np.testing.assert_allclose(streamed_lse, lse, rtol=1e-6, atol=1e-6)


def test_streaming_over_any_storage(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=2, capacity=600)
    keys = rows(2, 500, 2, 16)
    cache.extend(keys, -keys)
    queries = rows(1, 4, 16, seed=5)
    layer = cache.layers[0]
    np.testing.assert_allclose(layer.attend(queries, resident="stream"), layer.attend(queries), rtol=0, atol=1e-5)
    with pytest.raises(kvmmap.KvmmapError, match="resident"):
        layer.attend(queries, resident="later")
    bad = queries.copy()
    bad[0, 1, 3] = np.nan
    before = threading.active_count()
    with pytest.raises(kvmmap.NonFiniteError):
        layer.attend(bad, resident="stream")
    assert threading.active_count() == before


@linux
@pytest.mark.parametrize("preset", ["int8", "fidelity"])
def test_appending_does_not_fill_holes_in_memory(path: Path, preset: str) -> None:
    """Where rows will go later, the page cache has no zeros, in pages of a size that rows are written to slowly."""
    with kvmmap.create(path, num_layers=4, capacity=40_000, num_kv_heads=4, head_dim=64, preset=preset) as cache:
        cache.extend(rows(4, 300, 4, 64), rows(4, 300, 4, 64, seed=1))
        for number in range(40):
            step = rows(4, 4, 64, seed=number)
            cache.push_step(step, step)
        for layer in cache.layers:
            layer.attend(rows(1, 4, 64))
        assert cached(path) <= path.stat().st_blocks * 512 + (1 << 20)


@linux
def test_memory_stays_bounded(path: Path) -> None:
    """A layer of 64 MB and more is attended over with half of that to grow by; in a process of its own, as the
    highest resident memory is the process's."""
    filled(path, 64_000)
    code = """
import sys, numpy as np, kvmmap
from pathlib import Path
def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
queries = np.random.default_rng(1).standard_normal((1, 8, 64), np.float32)
small = kvmmap.QuantizedKvLayer(100, 8, 64)
small.extend(np.ones((50, 8, 64), np.float32), np.ones((50, 8, 64), np.float32))
small.attend(queries)
with kvmmap.open(sys.argv[1]) as cache:
    layer = cache.layers[1]
    size = len(layer) * layer.geometry.position_bytes
    assert size > 64 << 20, size
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    streamed = layer.attend(queries, resident="stream")
    grown = status("VmHWM") - before
    kept = layer.attend(queries)
    assert status("VmHWM") - before > size * 0.9
    assert np.abs(streamed - kept).max() <= 2e-6 * np.abs(kept).max()
    print(grown)
"""
    grown = int(run_python(code, path).stdout)
    assert grown < 40 << 20, grown


def test_a_reader_sees_a_truncation_while_it_streams(path: Path) -> None:
    writer = make_file(path, 500)
    with kvmmap.open(path) as reader:
        layer = reader.layers[0]
        pieces = layer._store.scan(0, 500)
        next(pieces)
        writer.truncate(100)
        with pytest.raises(kvmmap.CacheChangedError):
            layer.attend(rows(1, 2, 8), resident="stream")
        pieces.close()
    writer.close()
