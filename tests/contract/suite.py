"""The storage contract as tests. A storage is tested by a subclass of `StorageContract` with a fixture `place`.

Rows are compared bit by bit with those of a cache in memory that was given the same, so any codec will do.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest

import kvmmap

_numbers = itertools.count()


class StorageContract:
    """Override `place`; override `shape` for other codecs or geometries."""

    shape: ClassVar[dict[str, Any]] = {"num_layers": 3, "capacity": 700, "num_kv_heads": 2, "head_dim": 8}
    persistent: ClassVar[bool] = True
    """True if another handle can open the cache by its path while, and after, this one has it."""

    @pytest.fixture
    def place(self) -> Callable[[], Any]:
        """Return new paths or URLs for caches; None for caches that have none."""
        raise NotImplementedError

    def create(self, place: Callable[[], Any], **more: Any) -> kvmmap.QuantizedKvCache:
        path = place()
        if path is None:
            return kvmmap.QuantizedKvCache(**self.shape, **more)
        return kvmmap.create(path, **self.shape, **more)

    def reference(self) -> kvmmap.QuantizedKvCache:
        return kvmmap.QuantizedKvCache(**self.shape)

    def rows(self, count: int, seed: int = 0) -> Any:
        """Keys or values of `count` positions in all layers."""
        random = np.random.default_rng(seed)
        heads, dim = self.shape["num_kv_heads"], self.shape["head_dim"]
        return random.standard_normal((self.shape["num_layers"], count, heads, dim), np.float32)

    def append(self, count: int, seed: int, *caches: kvmmap.QuantizedKvCache) -> None:
        for cache in caches:
            ids = np.arange(count) + 1000 * seed
            cache.extend(self.rows(count, seed), self.rows(count, seed + 1), ids)

    def same(self, cache: kvmmap.QuantizedKvCache, expected: kvmmap.QuantizedKvCache) -> None:
        assert cache.seq_len == expected.seq_len
        assert cache.token_len == expected.token_len
        np.testing.assert_array_equal(cache.token_ids, expected.token_ids)
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            for mine, wanted in zip(layer.read_quantized(), other.read_quantized(), strict=True):
                np.testing.assert_array_equal(mine, wanted)
            np.testing.assert_array_equal(layer.read_keys(), other.read_keys())
            np.testing.assert_array_equal(layer.read_values(), other.read_values())

    # Appending and reading

    def test_what_is_appended_is_read(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache, self.reference() as expected:
            for each in (cache, expected):
                each.push_step(self.rows(1, 9)[:, 0], self.rows(1, 8)[:, 0], 7)
            self.append(300, 1, cache, expected)
            self.append(255, 2, cache, expected)
            self.append(0, 3, cache, expected)
            self.same(cache, expected)
            query = self.rows(1, 5)[0]
            for layer, other in zip(cache.layers, expected.layers, strict=True):
                np.testing.assert_allclose(layer.attend(query), other.attend(query), rtol=2e-5, atol=2e-6)
                np.testing.assert_array_equal(layer.read_keys(250, 301), other.read_keys(250, 301))
                np.testing.assert_array_equal(layer.get_value(555, 1), other.get_value(555, 1))
                np.testing.assert_array_equal(layer.select_blocks(query[0], 2), other.select_blocks(query[0], 2))

    def test_all_ways_to_read_agree(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache:
            self.append(600, 1, cache)
            store = cache.storage.layers[1]
            for start, stop in ((0, 600), (0, 0), (255, 257), (599, 600)):
                store.prefetch(start, stop)
                wanted = store.rows(start, stop)
                assert not any(array.flags.writeable for array in wanted)
                for parts in (list(store.iter_rows(start, stop)), list(store.scan(start, stop))):
                    for number, array in enumerate(wanted):
                        pieces = [part[number] for part in parts] or [array[:0]]
                        np.testing.assert_array_equal(np.concatenate(pieces), array)
                store.ensure_verified(np.array([[start, stop]], np.int64))
                for mine, array in zip(store.slabs(), wanted, strict=True):
                    np.testing.assert_array_equal(mine[start:stop], array)
                store.release(start, stop)
                for mine, array in zip(store.rows(start, stop), wanted, strict=True):
                    np.testing.assert_array_equal(mine, array)

    def test_an_append_that_fails_leaves_nothing(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache, self.reference() as expected:
            self.append(300, 1, cache, expected)
            bad = self.rows(100, 2)
            bad[-1, 50, 1, 3] = np.nan
            with pytest.raises(kvmmap.NonFiniteError):
                cache.extend(bad, self.rows(100, 2), np.arange(100))
            with pytest.raises(kvmmap.CapacityExceededError):
                self.append(self.shape["capacity"] - 299, 3, cache)
            with pytest.raises(kvmmap.ShapeMismatchError):
                cache.extend(self.rows(2)[..., :-1], self.rows(2))
            self.same(cache, expected)
            self.append(100, 4, cache, expected)
            self.same(cache, expected)

    def test_a_full_cache(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache, self.reference() as expected:
            self.append(self.shape["capacity"], 1, cache, expected)
            with pytest.raises(kvmmap.CapacityExceededError):
                self.append(1, 2, cache)
            self.same(cache, expected)

    def test_layers_are_appended_to_one_by_one(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache, self.reference() as expected:
            self.append(10, 1, expected)
            for number, layer in enumerate(cache.layers):
                assert cache.seq_len == 0
                layer.extend(self.rows(10, 1)[number], self.rows(10, 2)[number])
            cache.push_token_ids(np.arange(10) + 1000)
            self.same(cache, expected)
            cache.layers[0].push(self.rows(1)[0, 0], self.rows(1)[0, 0])
            assert cache.seq_len == 10
            with pytest.raises(kvmmap.ShapeMismatchError, match="level"):
                self.append(1, 3, cache)
            cache.truncate(10)
            self.append(1, 3, cache, expected)
            self.same(cache, expected)

    # Token ids and metadata

    def test_token_ids(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache:
            cache.push_token_ids([5, 6])
            assert cache.token_len == 0
            cache.extend(self.rows(6), self.rows(6))
            assert cache.token_ids.tolist() == [5, 6, -1, -1, -1, -1]
            cache.push_token_ids([9], start=4)
            assert cache.token_ids.tolist() == [5, 6, -1, -1, 9, -1]
            with pytest.raises(kvmmap.PositionOutOfRangeError):
                cache.push_token_ids([1], start=3)
            cache.truncate(1)
            assert (cache.token_len, cache.token_ids.tolist()) == (1, [5])

    def test_metadata(self, place: Callable[[], Any]) -> None:
        with self.create(place, metadata={"a": [1, None]}, model=kvmmap.ModelInfo(name="m")) as cache:
            assert cache.metadata == {"a": [1, None]}
            assert cache.model == kvmmap.ModelInfo(name="m")
            cache.metadata = {"b": "é"}
            with pytest.raises(kvmmap.MetadataError):
                cache.metadata = {"c": object()}
            assert cache.metadata == {"b": "é"}
            path = cache.path
        if self.persistent:
            with kvmmap.open(path) as again:
                assert (again.metadata, again.model) == ({"b": "é"}, kvmmap.ModelInfo(name="m"))

    # Truncating

    @pytest.mark.parametrize("flush", [False, True])
    @pytest.mark.parametrize("length", [0, 1, 255, 256, 300, 511, 600])
    def test_truncate_and_append_again(self, place: Callable[[], Any], length: int, flush: bool) -> None:
        with self.create(place) as cache, self.reference() as expected:
            self.append(600, 1, cache, expected)
            if flush:
                cache.flush()
            for each in (cache, expected):
                each.truncate(length)
            self.same(cache, expected)
            self.append(90, 3, cache, expected)
            self.same(cache, expected)
            assert cache.verify().sound
            path = cache.path
            if self.persistent:
                cache.close()
                with kvmmap.open(path) as again:
                    self.same(again, expected)
                    assert again.verify().sound

    def test_a_read_across_a_truncation_fails(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache:
            self.append(300, 1, cache)
            store = cache.storage.layers[0]
            version = store.version()
            store.validate(version)
            self.append(10, 2, cache)
            store.validate(version)  # appending changes nothing that is there
            cache.truncate(100)
            with pytest.raises(kvmmap.CacheChangedError):
                store.validate(version)
            with pytest.raises(kvmmap.CacheChangedError):
                cache.storage.validate(version)
            store.validate(store.version())

    # Committing

    def test_another_handle_sees_what_was_flushed(self, place: Callable[[], Any]) -> None:
        if not self.persistent:
            pytest.skip("no other handle can open it")
        with self.create(place) as cache, self.reference() as expected:
            self.append(300, 1, cache, expected)
            cache.flush()
            with kvmmap.open(cache.path) as reader:
                self.same(reader, expected)
                with pytest.raises(kvmmap.ReadOnlyError):
                    self.append(1, 2, reader)
                with pytest.raises(kvmmap.ReadOnlyError):
                    reader.flush()
                with pytest.raises(kvmmap.ReadOnlyError):
                    reader.truncate(1)
                assert not reader.refresh()
                self.append(200, 3, cache, expected)
                cache.flush()
                assert reader.refresh()
                self.same(reader, expected)
                for each in (cache, expected):
                    each.truncate(100)
                reader.refresh()
                self.same(reader, expected)
                assert reader.verify().sound

    def test_the_writer_continues_where_another_ended(self, place: Callable[[], Any]) -> None:
        if not self.persistent:
            pytest.skip("no other handle can open it")
        with self.reference() as expected:
            with self.create(place) as cache:
                self.append(300, 1, cache, expected)
                path = cache.path
            for number in range(3):
                with kvmmap.open(path, "a") as cache:
                    self.append(17, number, cache, expected)
                    if number == 1:
                        for each in (cache, expected):
                            each.truncate(310)
            with kvmmap.open(path) as cache:
                self.same(cache, expected)
                assert cache.verify().sound

    def test_checksums_of_commits(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache:
            self.append(600, 1, cache)
            cache.flush()
            storage = cache.storage
            assert storage.committed_len in (0, 600)
            blocks = -(-storage.committed_len // cache.geometry.block_tokens)
            sums = storage.committed_checksums(0, blocks)
            assert sums.shape == (blocks, cache.num_layers)
            assert len(set(sums.ravel().tolist())) == sums.size
            storage.verify_rows(0, 600)
            identity = storage.identity()
            self.append(10, 2, cache)
            cache.flush()
            np.testing.assert_array_equal(storage.committed_checksums(0, blocks)[:2], sums[:2])
            assert storage.identity() == identity
            if identity is not None:
                cache.truncate(100)
                assert storage.identity() != identity
            report = cache.verify()
            assert report.sound
            assert report.seq_len == cache.seq_len

    def test_facts(self, place: Callable[[], Any]) -> None:
        with self.create(place) as cache:
            assert isinstance(cache.facts()["kind"], str)

    # Places

    def test_create_and_remove(self, place: Callable[[], Any]) -> None:
        if not self.persistent:
            pytest.skip("it has no path")
        with self.create(place) as cache:
            self.append(5, 1, cache)
            path = cache.path
        with pytest.raises(kvmmap.CacheExistsError):
            kvmmap.create(path, **self.shape)
        with kvmmap.open(path) as cache:
            assert cache.seq_len == 5
        kvmmap.create(path, **self.shape, overwrite=True).close()
        with kvmmap.open(path) as cache:
            assert cache.seq_len == 0
        kvmmap.remove(path)
        with pytest.raises(kvmmap.CacheNotFoundError):
            kvmmap.open(path)
        with pytest.raises(kvmmap.CacheNotFoundError):
            kvmmap.remove(path)

    def test_copies(self, place: Callable[[], Any]) -> None:
        with self.create(place, metadata={"a": 1}) as cache, self.reference() as expected:
            self.append(600, 1, cache, expected)
            cache.flush()
            there = f"memory://contract-{next(_numbers)}.zarr"
            assert kvmmap.copy(cache, there).seq_len == 600
            with kvmmap.open(there) as copy:
                self.same(copy, expected)
                assert copy.metadata == {"a": 1}
                if self.persistent:
                    back = place()
                    assert kvmmap.copy(copy, back).verified
                    with kvmmap.open(back) as again:
                        self.same(again, expected)
                        assert again.metadata == {"a": 1}
                    with pytest.raises(kvmmap.PositionOutOfRangeError):
                        kvmmap.copy(copy, place(), stop=601)
            kvmmap.remove(there)

    # Closing and threads

    def test_closing(self, place: Callable[[], Any]) -> None:
        cache = self.create(place)
        self.append(300, 1, cache)
        view = cache.layers[0].read_quantized(0, 10)
        before = [array.copy() for array in view]
        cache.close()
        cache.close()
        assert cache.closed
        for mine, wanted in zip(view, before, strict=True):
            np.testing.assert_array_equal(mine, wanted)
        for act in (
            lambda: self.append(1, 1, cache),
            cache.flush,
            cache.verify,
            cache.refresh,
            lambda: cache.truncate(1),
            lambda: cache.token_ids,
            lambda: cache.layers[0].read_keys(),
            lambda: cache.layers[0].key_codes,
            lambda: setattr(cache, "metadata", {}),
        ):
            with pytest.raises(kvmmap.ClosedError):
                act()

    def test_threads_read_what_is_there_or_are_told(self, place: Callable[[], Any]) -> None:
        """While one thread appends and truncates, every read is of rows that were there together."""
        with self.create(place) as cache:
            constant = np.ones_like(self.rows(40))
            cache.extend(constant, constant)
            wrong: list[str] = []
            done = threading.Event()

            def read() -> None:
                while not done.is_set():
                    try:
                        keys, values = cache.layers[1].read_keys(), cache.layers[1].read_values(0, 1)
                    except kvmmap.CacheChangedError:
                        continue
                    except Exception as error:
                        wrong.append(repr(error))
                        return
                    levels = np.unique(np.round(keys, 1))
                    if not set(levels.tolist()) <= {1.0, 2.0, 3.0, 4.0} or np.any(np.diff(np.round(keys[:, 0, 0])) < 0):
                        wrong.append(f"read {levels}")
                    if values.shape[0] != 1:
                        wrong.append("a position is missing")

            threads = [threading.Thread(target=read) for _ in range(2)]
            for thread in threads:
                thread.start()
            try:
                for number in range(12):
                    level = np.float32(2 + number % 3)
                    cache.extend(constant * level, constant * level)
                    cache.truncate(40)
            finally:
                done.set()
                for thread in threads:
                    thread.join()
            assert not wrong
