"""Large caches: offsets beyond 4 GiB everywhere, and a million positions. The files are sparse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.support import rows, run_python

import kvmmap

CAPACITY = 25_000_000  # x 2 layers x 8 heads x 128: over 100 GB, and 25 GB a slab of codes

AT_THE_END = """
import os, sys
import numpy as np
import kvmmap
from helpers.support import rows
cache = kvmmap.open(sys.argv[1], "a")
start = cache.capacity - 5
for store in cache.storage.layers:
    store.publish(start)  # of a hole: what lies before the end is zeros that take no disk
x = rows(2, 5, 8, 128)
cache.extend(x[:, :4], -x[:, :4])
cache.push_step(x[:, 4], -x[:, 4])
os._exit(0)  # closing would put checksums to 50 GB of zeros
"""


@pytest.fixture
def large(path: Path) -> Path:
    """A file of 103 GB."""
    try:
        kvmmap.create(path, num_layers=2, capacity=CAPACITY, num_kv_heads=8, head_dim=128).close()
    except OSError as error:
        pytest.skip(f"no such sparse files here: {error}")
    assert path.stat().st_size > 100e9
    return path


def test_rows_at_the_far_end(large: Path) -> None:
    run_python(AT_THE_END, large)
    x = rows(2, 5, 8, 128)
    codes, scales = kvmmap.quantize_rows(x)
    keys = kvmmap.dequantize_rows(codes, scales)
    start = CAPACITY - 5
    with kvmmap.open(large) as cache:
        assert cache.seq_len == CAPACITY
        assert cache.facts()["disk_bytes"] < 1e6
        query = rows(3, 16, 128, seed=1)
        for number, layer in enumerate(cache.layers):
            np.testing.assert_array_equal(layer.key_codes[start:], codes[number])
            np.testing.assert_array_equal(layer.read_keys(start), keys[number])
            np.testing.assert_array_equal(layer.read_values(start), -keys[number])
            np.testing.assert_array_equal(layer.get_key(CAPACITY - 1, 7), keys[number, 4, 7])
            assert not layer.read_keys(start - 3, start).any()
            options = {"causal": False, "threads": 2}
            there = layer.attend(query, positions=(start, CAPACITY), **options)
            streamed = layer.attend(query, positions=(start, CAPACITY), resident="stream", **options)
            with kvmmap.QuantizedKvCache(1, 5, 8, 128) as small:
                small.layers[0].extend(x[number], -x[number])
                here = small.layers[0].attend(query, **options)
            np.testing.assert_allclose(there, here, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(streamed, here, rtol=1e-5, atol=1e-6)
            layer.prefetch(start)
            layer.release(start)
        assert kvmmap.report.inspect(cache).commit.uncommitted == CAPACITY
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.get_key(0, CAPACITY, 0)


def test_a_truncated_file_is_detected_at_its_far_end(large: Path) -> None:
    with large.open("r+b") as file:
        file.truncate(large.stat().st_size - 4096)
    for mode in ("r", "a"):
        with pytest.raises(kvmmap.CorruptCacheError, match="cut off"):
            kvmmap.open(large, mode)  # type: ignore[arg-type]


def test_a_million_positions(path: Path) -> None:
    count, dim = 1_000_000, 8
    x = rows(count, 1, dim)
    with kvmmap.create(path, num_layers=1, capacity=count, num_kv_heads=1, head_dim=dim) as cache:
        for start in range(0, count, 99_991):
            part = x[None, start : start + 99_991]
            cache.extend(part, -part, np.arange(start, start + part.shape[1]))
        cache.flush()
        with pytest.raises(kvmmap.CapacityExceededError):
            cache.push_step(x[:1], x[:1])
    with kvmmap.open(path, "a") as cache:
        assert cache.seq_len == count
        assert cache.verify().sound
        np.testing.assert_array_equal(cache.token_ids, np.arange(count))
        layer = cache.layers[0]
        keys = layer.read_keys()
        assert np.abs(keys - x).max() <= layer.key_scales.max() * 0.5001
        query = rows(2, 1, dim, seed=1)
        out = layer.attend(query, causal=False)
        scores = query[:, 0].astype(np.float64) @ keys[:, 0].T.astype(np.float64) / np.sqrt(dim)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        expected = weights @ -keys[:, 0] / weights.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(out[:, 0], expected, atol=2e-6)
        cache.truncate(999_937)
        cache.push_step(x[:1], x[:1])
    with kvmmap.open(path) as cache:
        assert cache.seq_len == 999_938
        assert cache.verify().sound
