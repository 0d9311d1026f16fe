"""Threads that share one handle: reads beside push, truncate, refresh and close return the right rows or raise.

Every position of an epoch holds the epoch's number, so a read that mixes epochs shows. Which thread runs when is left
to chance, with switches as often as they come; each test makes some thousand meetings.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.support import MakeCache, fill, rows

import kvmmap

LAYERS, HEADS, DIM = 2, 2, 16
LONG, SHORT = 500, 60
EPOCHS = {".kvm": 120, ".zarr": 40, "": 200}
"""By what is written to."""


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


class Beside:
    """Threads that call a function again and again until the block is left; what any of them raises is raised then."""

    def __init__(self, *functions: Callable[[], None]) -> None:
        self.stopped = False
        self.calls = 0
        self.errors: list[BaseException] = []
        self.threads = [threading.Thread(target=self._run, args=(function,)) for function in functions]

    def _run(self, function: Callable[[], None]) -> None:
        try:
            while not self.stopped and not self.errors:
                function()
                self.calls += 1
        except BaseException as error:
            self.errors.append(error)

    def __enter__(self) -> Beside:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped = True
        for thread in self.threads:
            thread.join()
        if self.errors:
            raise self.errors[0]


def put_epoch(cache: kvmmap.QuantizedKvCache, epoch: int) -> None:
    """Take everything back, and store an epoch: long and short ones in turn."""
    cache.truncate(0)
    for count in (SHORT,) if epoch % 2 else (LONG - 1, 1):
        keys = np.full((LAYERS, count, HEADS, DIM), epoch + 1, np.float32)
        cache.extend(keys, keys, np.full(count, epoch))


def read_epochs(cache: kvmmap.QuantizedKvCache) -> None:
    """Read in every way; what is read must be of one epoch, and the lengths one that there was."""
    layer = cache.layers[1]
    query = np.zeros((1, HEADS, DIM), np.float32)
    with contextlib.suppress(kvmmap.CacheChangedError):
        assert_one(layer.read_keys(), "read_keys")
    with contextlib.suppress(kvmmap.CacheChangedError, kvmmap.EmptyCacheError):
        # Weights are equal, so a mixture is no whole number; what f32 rounds, and int8 before, is far less.
        out = layer.attend(query, threads=2)
        assert_one(np.round(out, 2), "attend")
        assert abs(out.flat[0] - round(out.flat[0])) < 1e-3, "attend: between two epochs"
    with contextlib.suppress(kvmmap.CacheChangedError, kvmmap.PositionOutOfRangeError):
        assert_one(layer.get_keys_at(SHORT - 1), "get_keys_at")
    with contextlib.suppress(kvmmap.CacheChangedError):
        # Ids go ahead of rows: whose step is under way has some already.
        ids = cache.token_ids
        assert_one(ids[ids >= 0], "token_ids")


def assert_one(found: np.ndarray, what: str) -> None:
    different = np.unique(found)
    assert len(different) <= 1, f"{what} gave rows of several epochs: {different}"


def test_reads_beside_a_writer_through_the_same_handle(make_cache: MakeCache) -> None:
    cache = make_cache(LAYERS, LONG, HEADS, DIM)
    put_epoch(cache, 0)
    with Beside(*[lambda: read_epochs(cache)] * 3) as beside:
        for epoch in range(1, EPOCHS[Path(cache.path or "").suffix]):
            put_epoch(cache, epoch)
    assert beside.calls


def test_reads_beside_refreshes_of_the_same_handle(any_path: Path) -> None:
    with kvmmap.create(any_path, num_layers=LAYERS, capacity=LONG, num_kv_heads=HEADS, head_dim=DIM) as writer:
        put_epoch(writer, 0)
        writer.flush()
        with kvmmap.open(any_path) as cache:

            def refresh() -> None:
                with contextlib.suppress(kvmmap.CacheChangedError):
                    cache.refresh()

            with Beside(refresh, refresh, *[lambda: read_epochs(cache)] * 2) as beside:
                for epoch in range(1, EPOCHS[any_path.suffix]):
                    put_epoch(writer, epoch)
                    if any_path.suffix == ".zarr":
                        writer.flush()
            assert beside.calls


def test_a_read_in_progress_detects_a_truncation(make_cache: MakeCache) -> None:
    """Deterministic: the read begins, the truncation happens, the read ends."""
    cache = make_cache(LAYERS, LONG, HEADS, DIM)
    put_epoch(cache, 0)
    layer = cache.storage.layers[1]
    mark, length = layer.version(), layer.length
    assert_one(layer.rows(0, length).key_scales, "rows")
    put_epoch(cache, 2)
    with pytest.raises(kvmmap.CacheChangedError, match="read again"):
        layer.validate(mark)
    read_epochs(cache)


def test_a_read_in_progress_detects_a_truncation_that_another_thread_has_seen(any_path: Path) -> None:
    with kvmmap.create(any_path, num_layers=LAYERS, capacity=LONG, num_kv_heads=HEADS, head_dim=DIM) as writer:
        put_epoch(writer, 0)
        writer.flush()
        with kvmmap.open(any_path) as reader:
            layer = reader.storage.layers[1]
            mark, length = layer.version(), layer.length
            assert_one(layer.rows(0, length).key_scales, "rows")
            put_epoch(writer, 2)
            writer.flush()
            reader.refresh()
            with pytest.raises(kvmmap.CacheChangedError, match="read again"):
                layer.validate(mark)
            read_epochs(reader)


def test_appends_beside_reads(make_cache: MakeCache) -> None:
    cache = make_cache(LAYERS, LONG, HEADS, DIM)
    model = kvmmap.QuantizedKvCache(LAYERS, LONG, HEADS, DIM)
    fill(model, LONG)

    def read() -> None:
        found = cache.layers[0].read_quantized()
        for array, expected in zip(found, model.layers[0].read_quantized(0, len(found.key_codes)), strict=True):
            np.testing.assert_array_equal(array, expected)
        ids = cache.token_ids
        np.testing.assert_array_equal(ids, np.arange(len(ids)))

    with Beside(read, read):
        for length in range(1, LONG, 7):
            fill(cache, length)


def test_closing_beside_reads(make_cache: MakeCache) -> None:
    """Reads in progress raise, and views keep their rows."""
    expected: np.ndarray | None = None
    for _ in range(15):
        cache = make_cache(LAYERS, LONG, HEADS, DIM)
        fill(cache, 300)
        cache.flush()
        view = cache.layers[1].key_codes
        expected = view.copy() if expected is None else expected
        ends_closed(cache, *ways_to_read(cache))
        np.testing.assert_array_equal(view, expected)


def test_closing_a_reader_beside_reads(any_path: Path) -> None:
    with kvmmap.create(any_path, num_layers=LAYERS, capacity=LONG, num_kv_heads=HEADS, head_dim=DIM) as writer:
        fill(writer, 300)
        expected = writer.layers[1].read_quantized().key_codes.copy()
    for _ in range(60):
        cache = kvmmap.open(any_path)
        view = cache.layers[1].key_codes
        ends_closed(cache, *ways_to_read(cache), cache.refresh)
        np.testing.assert_array_equal(view, expected)


def ways_to_read(cache: kvmmap.QuantizedKvCache) -> list[Callable[[], object]]:
    layer, query = cache.layers[1], rows(1, HEADS, DIM)
    return [
        lambda: layer.read_values(),
        lambda: layer.attend(query),
        lambda: layer.attend(query, resident="stream"),
        lambda: layer.get_key(3, 1),
        lambda: layer.key_codes.sum(),
        lambda: cache.token_ids,
        lambda: cache.metadata,
        lambda: cache.verify(),
        lambda: cache.facts(),
    ]


def ends_closed(cache: kvmmap.QuantizedKvCache, *reads: Callable[[], object]) -> None:
    """Close while each of `reads` runs in its own thread; each must end in ClosedError."""
    ends: list[BaseException] = []
    ready = threading.Barrier(len(reads) + 1)

    def run(read: Callable[[], object]) -> None:
        ready.wait()
        try:
            while True:
                read()
        except BaseException as error:
            ends.append(error)

    threads = [threading.Thread(target=run, args=(read,)) for read in reads]
    for thread in threads:
        thread.start()
    ready.wait()
    cache.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive(), "it reads on from a closed cache"
    for error in ends:
        if not isinstance(error, kvmmap.ClosedError):
            raise error


def test_appends_beside_closing(make_cache: MakeCache) -> None:
    """An append is complete or refused, and the file holds the complete ones."""
    for _ in range(15):
        cache = make_cache(LAYERS, LONG, HEADS, DIM)
        done = [0]

        def append(cache: kvmmap.QuantizedKvCache = cache, done: list[int] = done) -> None:
            fill(cache, done[0] + 3)
            done[0] += 3

        ends_closed(cache, append)
        if cache.path is not None:
            with kvmmap.open(cache.path) as found:
                assert found.seq_len == done[0]
                assert found.verify().sound


def test_the_tail_that_a_reader_fetches_again_leaves_views_alone(tmp_path: Path) -> None:
    """A grown block of a group is fetched again; by then it may hold other rows."""
    path = tmp_path / "cache.zarr"
    with kvmmap.create(path, num_layers=LAYERS, capacity=LONG, num_kv_heads=HEADS, head_dim=DIM) as writer:
        fill(writer, 300)
        writer.flush()
        with kvmmap.open(path) as reader:
            view = reader.layers[0].key_codes
            before = view.copy()
            fill(writer, 320)
            writer.flush()
            reader.refresh()
            writer.truncate(0)
            keys = np.ones((LAYERS, 350, HEADS, DIM), np.float32)
            writer.extend(keys, keys)
            writer.flush()
            with pytest.raises(kvmmap.CacheChangedError):
                reader.layers[0].read_keys()  # 320 positions, of which the group has others by now
            np.testing.assert_array_equal(view, before)
            with pytest.raises(kvmmap.CacheChangedError):
                reader.layers[0].read_keys(256, 300)
