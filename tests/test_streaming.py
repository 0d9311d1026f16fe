"""Streaming shards from a group into a file without buffering them: verified, or not in the copy."""

from __future__ import annotations

import errno
import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.objects import new_place
from helpers.support import rows
from hypothesis import given
from hypothesis import strategies as st

import kvmmap
from kvmmap.format import checksum
from kvmmap.storage.libraries import crc32c
from kvmmap.storage.objects.memory import MemoryObjects
from kvmmap.storage.posix import PosixFile
from kvmmap.storage.zarr.placement import create_group
from kvmmap.storage.zarr.reader import ZarrReader
from kvmmap.storage.zarr.streaming import PIECE_BYTES, _Digests

LENGTH = 17_000  # two shards, and a third whose last block is incomplete
BLOCK = 256
ARRAYS = {"key_codes": 4, "key_scales": 4, "value_codes": 4, "value_scales": 4}  # bytes of a row


@pytest.fixture
def place() -> MemoryObjects:
    """A group far away."""
    place = new_place(far=True)
    with kvmmap.QuantizedKvCache(num_layers=2, capacity=40_000, num_kv_heads=1, head_dim=4) as memory:
        memory.extend(rows(2, LENGTH, 1, 4), rows(2, LENGTH, 1, 4, seed=1), np.arange(LENGTH))
        storage = memory.storage
        writer = create_group(place, storage.geometry, storage.document)
        for target, source in zip(writer.layers, storage.layers, strict=True):
            target.write(0, source.slabs().part(0, LENGTH))
            target.publish(LENGTH)
        writer.write_tokens(0, storage.read_tokens(LENGTH))
        writer.publish_tokens(LENGTH)
        writer.close()
    return place


def copy(objects: Any, target: Path, **more: Any) -> tuple[kvmmap.CopyReport, int]:
    """Copy a place's group; return the report, and how many of its shards had to be kept in memory."""
    with kvmmap.QuantizedKvCache.of_storage(ZarrReader.open(objects)) as source:
        report = kvmmap.copy(source, target, **more)
        return report, len(source.storage.shards._kept)  # type: ignore[attr-defined]


def check_same(place: MemoryObjects, target: Path) -> None:
    with kvmmap.QuantizedKvCache.of_storage(ZarrReader.open(place)) as one, kvmmap.open(target) as two:  # type: ignore[arg-type]
        assert one.seq_len == two.seq_len == LENGTH
        assert two.verify().sound
        for a, b in zip(one.layers, two.layers, strict=True):
            for name in ARRAYS:
                np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("verify", [True, False])
def test_rows_are_streamed_without_buffering(place: MemoryObjects, tmp_path: Path, verify: bool) -> None:
    assert copy(place, tmp_path / "a.kvm", verify=verify)[1] == 0
    check_same(place, tmp_path / "a.kvm")


def test_memory_is_bounded(tmp_path: Path) -> None:
    with kvmmap.create(tmp_path / "a.zarr", num_layers=4, capacity=20_000, num_kv_heads=4, head_dim=64) as cache:
        some = rows(4, 5000, 4, 64)
        for _ in range(4):
            cache.extend(some, some)
        size = cache.seq_len * sum(layer.position_bytes for layer in cache.geometry.layers)
    kvmmap.copy(tmp_path / "a.zarr", tmp_path / "first.kvm")  # what is loaded, and made once, does not count
    tracemalloc.start()
    try:
        kvmmap.copy(tmp_path / "a.zarr", tmp_path / "b.kvm", verify=False)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size > 40 * 2**20
    assert peak < 8 * 2**20


# Damage


def flip(place: MemoryObjects, key: str, offset: int) -> None:
    data = bytearray(place.get(key))
    data[offset] ^= 1
    place.put(key, [data])


@pytest.mark.parametrize("shard", [0, 1, 2])
@pytest.mark.parametrize("name", ARRAYS)
def test_a_flipped_bit_is_named_and_not_in_the_copy(
    place: MemoryObjects, tmp_path: Path, name: str, shard: int
) -> None:
    (key,) = [key for key in place.list() if key.startswith(f"layers/1/{name}/c/{shard}/")]
    flip(place, key, 2 * BLOCK * ARRAYS[name])
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 1") as caught:
        copy(place, tmp_path / "a.kvm")
    assert caught.value.position == shard * 8192 + 2 * BLOCK
    assert not (tmp_path / "a.kvm").exists()
    flip(place, key, 2 * BLOCK * ARRAYS[name])  # repaired: another attempt continues
    assert copy(place, tmp_path / "a.kvm")[0].resumed == shard * 8192
    check_same(place, tmp_path / "a.kvm")


@pytest.mark.parametrize(
    "harm",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: data[100:],
        lambda data: data[-516:],  # its index alone
        lambda data: data[:-3] + b"abc",
        lambda data: bytes(len(data)),
        None,
    ],
    ids=["empty", "short", "beginning", "end", "index", "another index", "zeros", "missing"],
)
def test_objects_that_are_no_shards(
    place: MemoryObjects, tmp_path: Path, harm: Callable[[bytes], bytes] | None
) -> None:
    key = "layers/0/value_codes/c/1/0/0"
    data = bytes(place.get(key))
    if harm is None:
        place.delete(key)
    else:
        place.put(key, [harm(data)])
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 0"):
        copy(place, tmp_path / "a.kvm")
    assert not (tmp_path / "a.kvm").exists()
    place.put(key, [data])
    assert copy(place, tmp_path / "a.kvm")[0].resumed == 8192
    check_same(place, tmp_path / "a.kvm")


def test_chunks_in_another_order_are_found(place: MemoryObjects, tmp_path: Path) -> None:
    """As other programs may store them: read by their index, then, as any reader does."""
    key, size = "layers/1/key_codes/c/0/0/0", BLOCK * ARRAYS["key_codes"]
    data = bytes(place.get(key))
    chunks = [data[start : start + size] for start in range(0, 32 * size, size)]
    index = np.array([((31 - number) * size, size) for number in range(32)], "<u8").tobytes()
    place.put(key, [*reversed(chunks), index, crc32c(index).to_bytes(4, "little")])
    assert copy(place, tmp_path / "a.kvm")[1] == 1
    check_same(place, tmp_path / "a.kvm")


def test_checksums_that_are_gone(place: MemoryObjects, tmp_path: Path) -> None:
    place.delete("block_checksums/c/0/0")
    with pytest.raises(kvmmap.CorruptCacheError, match="checksums are missing"):
        copy(place, tmp_path / "a.kvm")
    assert not (tmp_path / "a.kvm").exists()


class Interrupted:
    """A store that loses the connection in the middle of one object."""

    def __init__(self, inner: Any, number: int) -> None:
        self.inner = inner
        self._number = number
        self._count = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def pieces(self, key: str, size: int) -> Iterator[Any]:
        failing = next(self._count) == self._number
        for number, piece in enumerate(self.inner.pieces(key, 1024)):
            if failing and number == 1:
                raise kvmmap.StoreError("the connection is lost")
            yield piece


@pytest.mark.parametrize("number", range(1, 25, 5))
def test_a_single_failure_is_retried(place: MemoryObjects, tmp_path: Path, number: int) -> None:
    assert copy(Interrupted(place, number), tmp_path / "a.kvm")[1] == 1
    check_same(place, tmp_path / "a.kvm")


@given(st.lists(st.integers(0, 3000), max_size=20), st.integers(1, 1000))
def test_digests_of_blocks_that_come_in_pieces(sizes: list[int], block: int) -> None:
    data = np.random.default_rng(len(sizes)).bytes(sum(sizes))
    digests, done = _Digests(block), 0
    for size in sizes:
        digests.feed(memoryview(data)[done : done + size])
        done += size
    assert digests.finish() == [checksum(data[start : start + block]) for start in range(0, len(data), block)]


# What goes wrong on this side


def test_a_full_disk(place: MemoryObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = PosixFile.write

    def fail(self: PosixFile, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        if len(bytes(buffers[0])) > 2048 and offsets[-1] > limit:
            raise OSError(errno.ENOSPC, "no space")
        write(self, offsets, buffers)

    copy(place, tmp_path / "whole.kvm")
    with kvmmap.open(tmp_path / "whole.kvm") as whole:
        limit = whole.storage.superblock.sections[16, 1].offset + 9000 * 4  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(PosixFile, "write", fail)
        with pytest.raises(OSError, match="no space"):
            copy(place, tmp_path / "a.kvm")
    assert not (tmp_path / "a.kvm").exists()
    copy(place, tmp_path / "a.kvm")
    check_same(place, tmp_path / "a.kvm")


def test_a_failed_write_is_detected_by_the_source_checksum(
    place: MemoryObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The received rows were undamaged; the file has the source's checksums, so reads detect the failed write."""
    write = PosixFile.write

    def spoil(self: PosixFile, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        if len(bytes(buffers[0])) == 4 * 8192:  # an array of a shard
            spoilt = bytearray(buffers[0])
            spoilt[-1] ^= 1
            buffers = (spoilt,)
        write(self, offsets, buffers)

    monkeypatch.setattr(PosixFile, "write", spoil)
    with pytest.raises(kvmmap.CorruptCacheError, match="read back"):
        copy(place, tmp_path / "a.kvm")
    assert not (tmp_path / "a.kvm").exists()
    copy(place, tmp_path / "b.kvm", verify=False)
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        assert not cache.verify().sound
        with pytest.raises(kvmmap.CorruptCacheError):
            cache.layers[0].read_quantized(8000, 8192)


class SlowObjects:
    """A store whose objects arrive in small pieces, slowly."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def pieces(self, key: str, size: int) -> Iterator[Any]:
        assert size == PIECE_BYTES
        first = "/c/0/" in key or key.endswith("/c/0")
        for piece in self.inner.pieces(key, 4096):
            if not first:
                time.sleep(0.02)
            yield piece


def test_nothing_is_written_once_a_copy_is_interrupted(
    place: MemoryObjects, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, closed, late = PosixFile.write, threading.Event(), []
    close = PosixFile.close

    def note(self: PosixFile, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        if closed.is_set():
            late.append(offsets)
        write(self, offsets, buffers)

    def note_closing(self: PosixFile) -> None:
        if self.path.endswith(".partial"):
            closed.set()
        close(self)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(PosixFile, "write", note)
        patch.setattr(PosixFile, "close", note_closing)
        with pytest.raises(KeyboardInterrupt):
            copy(SlowObjects(place), tmp_path / "a.kvm", progress=interrupt)
        time.sleep(0.1)
    assert closed.is_set()
    assert not late
    assert copy(place, tmp_path / "a.kvm")[0].resumed == 8192
    check_same(place, tmp_path / "a.kvm")
