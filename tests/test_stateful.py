"""A cache against a plain model: any sequence of operations, with close and reopen, equals the same on lists."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import kvmmap
from kvmmap.metadata import Document
from kvmmap.storage.objects.local import FolderObjects
from kvmmap.storage.zarr.placement import create_group

LAYERS, HEADS, DIM, CAPACITY = 2, 2, 3, 600


def numbers(seed: int, *shape: int) -> np.ndarray:
    """Small whole numbers: exact in f32, and different for every seed."""
    return np.random.default_rng(seed).integers(-50, 50, shape).astype(np.float32)


class CacheMachine(RuleBasedStateMachine):
    """Keys, values and token ids as lists beside a real cache, and a reader that refreshes."""

    in_memory = False
    suffix = ".kvm"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.path = self.folder / f"cache{self.suffix}"
        self.keys: list[np.ndarray] = []  # [LAYERS, HEADS, DIM] a position
        self.ids: list[int] = []
        self.ahead = 0  # positions that only layer 0 has
        self.seed = 0

    @initialize()
    def create(self) -> None:
        if self.in_memory:
            self.cache = kvmmap.QuantizedKvCache(LAYERS, CAPACITY, HEADS, DIM)
        else:
            self.cache = self.make()
            self.reader = kvmmap.open(self.path)

    def make(self) -> kvmmap.QuantizedKvCache:
        return kvmmap.create(self.path, num_layers=LAYERS, capacity=CAPACITY, num_kv_heads=HEADS, head_dim=DIM)

    @precondition(lambda self: not self.ahead)
    @rule(count=st.sampled_from([1, 2, 3, 100, 255, 256, 257]), with_ids=st.booleans())
    def extend(self, count: int, with_ids: bool) -> None:
        self.seed += 1
        keys = numbers(self.seed, LAYERS, count, HEADS, DIM)
        ids = list(range(self.seed, self.seed + count)) if with_ids else None
        if len(self.keys) + count > CAPACITY:
            with pytest.raises(kvmmap.CapacityExceededError):
                self.cache.extend(keys, -keys, ids)
            return
        self.cache.extend(keys, -keys, ids)
        self.keys += list(keys.transpose(1, 0, 2, 3))
        self.ids += ids or [-1] * count

    @precondition(lambda self: not self.ahead and len(self.keys) < CAPACITY)
    @rule(token=st.none() | st.integers(0, 9))
    def push_step(self, token: int | None) -> None:
        self.seed += 1
        keys = numbers(self.seed, LAYERS, HEADS, DIM)
        self.cache.push_step(keys, -keys, token)
        self.keys.append(keys)
        self.ids.append(-1 if token is None else token)

    @precondition(lambda self: len(self.keys) + self.ahead < CAPACITY)
    @rule()
    def push_to_one_layer(self) -> None:
        self.cache.layers[0].push(numbers(1, HEADS, DIM), numbers(2, HEADS, DIM))
        self.ahead += 1

    @precondition(lambda self: not self.ahead and len(self.keys) < CAPACITY)
    @rule()
    def refused_step(self) -> None:
        keys = np.full((LAYERS, HEADS, DIM), np.nan, np.float32)
        with pytest.raises(kvmmap.NonFiniteError):
            self.cache.push_step(keys, keys, 1)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.keys)) | st.just(len(self.keys)))
        self.cache.truncate(length)
        del self.keys[length:], self.ids[length:]
        self.ahead = 0

    @rule()
    def flush(self) -> None:
        self.cache.flush()

    @precondition(lambda self: not self.in_memory)
    @rule()
    def reopen(self) -> None:
        self.cache.close()
        self.cache = kvmmap.open(self.path, "a")
        self.ahead = 0

    @precondition(lambda self: not self.in_memory)
    @rule()
    def reader_follows(self) -> None:
        if self.suffix == ".zarr":
            self.cache.flush()  # others see what is committed
        self.reader.refresh()
        self.compare(self.reader)
        report = self.reader.verify()
        assert report.sound, report.damages

    @precondition(lambda self: not self.in_memory and self.suffix == ".kvm")
    @rule()
    def compact_and_resize(self) -> None:
        self.cache.close()
        self.ahead = 0
        kvmmap.compact(self.path)
        kvmmap.resize(self.path, CAPACITY)
        with pytest.raises(kvmmap.CacheChangedError):
            self.reader.refresh()
        self.reader.close()
        self.reader = kvmmap.open(self.path)
        self.cache = kvmmap.open(self.path, "a")

    @invariant()
    def same(self) -> None:
        if hasattr(self, "cache"):
            self.compare(self.cache)

    def compare(self, cache: kvmmap.QuantizedKvCache) -> None:
        cache._check()
        assert cache.seq_len == len(self.keys)
        assert cache.token_ids.tolist() == self.ids
        if self.keys:
            expected = np.stack(self.keys, axis=1)
            for layer in range(LAYERS):
                codes, scales = kvmmap.quantize_rows(expected[layer])
                np.testing.assert_array_equal(cache.layers[layer].key_codes[: len(self.keys)], codes)
                np.testing.assert_array_equal(cache.layers[layer].key_scales[: len(self.keys)], scales)
                np.testing.assert_array_equal(cache.layers[layer].value_codes[: len(self.keys)], -codes)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.cache.close()
        if hasattr(self, "reader"):
            self.reader.close()
        shutil.rmtree(self.folder)


class MemoryMachine(CacheMachine):
    """The same over memory."""

    in_memory = True


class RecentMachine(CacheMachine):
    """The same over a file that keeps some rows in 16 bits, where whole numbers are exact."""

    def make(self) -> kvmmap.QuantizedKvCache:
        shape = {"num_layers": LAYERS, "capacity": CAPACITY, "num_kv_heads": HEADS, "head_dim": DIM}
        return kvmmap.create(self.path, **shape, recent_window=20, sinks=3)

    def compare(self, cache: kvmmap.QuantizedKvCache) -> None:
        super().compare(cache)
        for layer, keys in zip(cache.layers, np.stack(self.keys, axis=1) if self.keys else (), strict=False):
            found = layer.read_keys(0, len(keys))
            coded = kvmmap.dequantize_rows(*kvmmap.quantize_rows(keys))
            exact = (found == keys).all(axis=(1, 2))
            assert (exact | (found == coded).all(axis=(1, 2))).all()


class ZarrMachine(CacheMachine):
    """The same over a Zarr group, whose shards are as short as they can be."""

    suffix = ".zarr"

    def make(self) -> kvmmap.QuantizedKvCache:
        geometry = kvmmap.CacheGeometry.build(num_layers=LAYERS, capacity=CAPACITY, num_kv_heads=HEADS, head_dim=DIM)
        objects = FolderObjects(str(self.path), durable=False)
        return kvmmap.QuantizedKvCache.of_storage(create_group(objects, geometry, Document(None, {}), shard_blocks=1))


CacheMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
RecentMachine.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
MemoryMachine.TestCase.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
ZarrMachine.TestCase.settings = settings(max_examples=20, stateful_step_count=30, deadline=None)
TestFile = CacheMachine.TestCase
TestMemory = MemoryMachine.TestCase
TestRecent = RecentMachine.TestCase
TestZarr = ZarrMachine.TestCase
