"""Copies between storages: lossless, never half visible, and resumed after an interruption."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers.objects import CountingObjects, new_place
from helpers.seaweed import BUCKET, Server
from helpers.support import check_filled, fill, make_file, rows, sweep
from zarr.core.buffer import cpu
from zarr.storage import MemoryStore

import kvmmap
from kvmmap.storage.objects.lock import LOCK_KEY
from kvmmap.storage.objects.memory import MemoryObjects
from kvmmap.storage.posix import PosixFile
from kvmmap.storage.zarr.place import GroupPlace
from kvmmap.storage.zarr.reader import ZarrReader

ARRAYS = ("key_codes", "key_scales", "value_codes", "value_scales")
_numbers = itertools.count()


def place(tmp_path: Path, kind: str) -> Any:
    """A new place for a cache of a kind."""
    name = f"cache{next(_numbers)}"
    return f"memory://{name}.zarr" if kind == "memory" else tmp_path / f"{name}.{kind}"


def same(one: kvmmap.QuantizedKvCache, other: kvmmap.QuantizedKvCache) -> None:
    """Assert that two caches hold the same, bit by bit."""
    assert one.seq_len == other.seq_len
    assert (one.metadata, one.model) == (other.metadata, other.model)
    assert one.token_len == other.token_len
    np.testing.assert_array_equal(one.token_ids, other.token_ids)
    for a, b in zip(one.layers, other.layers, strict=True):
        for name in ARRAYS:
            np.testing.assert_array_equal(getattr(a, name)[: len(one)], getattr(b, name)[: len(one)])


MODEL = kvmmap.ModelInfo(name="m", fingerprint="f", rope={"theta": 1e4})


@pytest.mark.parametrize("compressor", [None, "zstd"])
@pytest.mark.parametrize("target", ["kvm", "zarr", "memory"])
@pytest.mark.parametrize("source", ["kvm", "zarr", "memory"])
@pytest.mark.parametrize("length", [0, 256, 601])
def test_every_copy_is_lossless(tmp_path: Path, source: str, target: str, compressor: str | None, length: int) -> None:
    if target == "kvm" and compressor:
        pytest.skip("files are not compressed")
    first, second = place(tmp_path, source), place(tmp_path, target)
    with make_file(first, length, metadata={"prompt": "héllo"}, model=MODEL):
        pass
    report = kvmmap.copy(first, second, compressor=compressor)
    assert (report.seq_len, report.resumed, report.verified) == (length, 0, True)
    with kvmmap.open(first) as one, kvmmap.open(second) as two:
        same(one, two)
        assert two.capacity == one.capacity
        assert two.verify().sound
        assert two.facts()["state"] == "closed"
        check_filled(two, length)
    with kvmmap.open(second, "a") as two:
        fill(two, length + 10)
        check_filled(two, length + 10)


def test_long_caches_are_copied_in_steps(tmp_path: Path) -> None:
    geometry = {"num_layers": 3, "capacity": 30_000, "num_kv_heads": [1, 2, 1], "head_dim": [8, 4, 16]}
    with kvmmap.create(tmp_path / "a.kvm", value_head_dim=[4, 4, 8], **geometry) as cache:  # type: ignore[arg-type]
        keys = [rows(20_000, layer.num_kv_heads, layer.head_dim) for layer in cache.layers]
        values = [rows(20_000, layer.num_kv_heads, layer.value_head_dim, seed=1) for layer in cache.layers]
        cache.extend(keys, values, np.arange(20_000))
    seen: list[tuple[int, int]] = []
    kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.zarr", progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
    kvmmap.copy(tmp_path / "b.zarr", tmp_path / "c.kvm", start=5000, stop=15_001, layers=[2, 0], capacity=12_000)
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.zarr") as two:
        same(one, two)
        assert one.verify().sound
        with kvmmap.open(tmp_path / "c.kvm") as part:
            assert (part.seq_len, part.capacity, part.num_layers) == (10_001, 12_000, 2)
            np.testing.assert_array_equal(part.token_ids, np.arange(5000, 15_001))
            for layer, other in zip(part.layers, (one.layers[2], one.layers[0]), strict=True):
                for name in ARRAYS:
                    np.testing.assert_array_equal(getattr(layer, name), getattr(other, name)[5000:15_001])


@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_a_cache_in_memory_is_saved(tmp_path: Path, target: str) -> None:
    with kvmmap.QuantizedKvCache(2, 400, 2, 8, metadata={"a": 1}) as cache:
        fill(cache, 300)
        kvmmap.copy(cache, tmp_path / f"x.{target}")
        with kvmmap.open(tmp_path / f"x.{target}") as saved:
            same(cache, saved)


@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_requested_positions_must_exist(tmp_path: Path, target: str) -> None:
    make_file(tmp_path / "a.kvm", 300).close()
    second = tmp_path / f"b.{target}"
    for error, more in (
        (kvmmap.PositionOutOfRangeError, {"stop": 301}),
        (kvmmap.PositionOutOfRangeError, {"start": -1}),
        (kvmmap.LayerOutOfRangeError, {"layers": [2]}),
        (kvmmap.CapacityExceededError, {"capacity": 299}),
    ):
        with pytest.raises(error):
            kvmmap.copy(tmp_path / "a.kvm", second, **more)  # type: ignore[arg-type]
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.copy(tmp_path / "none.kvm", second)
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "none" / second.name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.kvm"]


@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_existing_targets_stay(tmp_path: Path, target: str) -> None:
    make_file(tmp_path / "a.kvm", 300).close()
    second = tmp_path / f"b.{target}"
    make_file(second, 5).close()
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.copy(tmp_path / "a.kvm", second)
    with kvmmap.open(second) as cache:
        check_filled(cache, 5)
    with kvmmap.open(second, "a"), pytest.raises(kvmmap.CacheLockedError):
        kvmmap.copy(tmp_path / "a.kvm", second, overwrite=True)
    kvmmap.copy(tmp_path / "a.kvm", second, overwrite=True)
    with kvmmap.open(second) as cache:
        check_filled(cache, 300)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kvm", second.name]


@pytest.mark.parametrize("kind", ["kvm", "zarr", "memory"])
def test_a_copy_onto_itself_loses_nothing(tmp_path: Path, kind: str) -> None:
    path = place(tmp_path, kind)
    make_file(path, 600).close()
    with contextlib.nullcontext() if kind == "kvm" else pytest.raises(kvmmap.CacheExistsError, match="source itself"):
        kvmmap.copy(path, path, overwrite=True)
    with kvmmap.open(path) as cache:
        check_filled(cache, 600)
        assert cache.verify().sound


# Damage


def flip(path: Path, layer: int, position: int) -> None:
    """Flip a bit of a key of a `.kvm` file."""
    with kvmmap.open(path) as cache:
        offset = cache.storage.superblock.sections[16, layer].offset  # type: ignore[attr-defined]
        offset += position * cache.layers[layer].num_kv_heads * cache.layers[layer].head_dim
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 4]))


@pytest.mark.parametrize(("start", "layers"), [(0, None), (3, None), (0, [1])])
@pytest.mark.parametrize("position", [0, 300, 599])
@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_damage_is_not_copied(tmp_path: Path, target: str, position: int, start: int, layers: list[int] | None) -> None:
    make_file(tmp_path / "a.kvm", 600).close()
    flip(tmp_path / "a.kvm", 1, position)
    second = tmp_path / f"b.{target}"
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 1") as caught:
        kvmmap.copy(tmp_path / "a.kvm", second, start=start, layers=layers)
    assert caught.value.position == position // 256 * 256
    if target == "kvm":
        assert not second.exists()
    else:
        with kvmmap.open(second) as cache:
            assert cache.seq_len == 0
            assert cache.verify().sound


def test_damage_in_a_group_is_not_copied(tmp_path: Path) -> None:
    make_file(tmp_path / "a.zarr", 600).close()
    (shard,) = (tmp_path / "a.zarr/layers/0/value_codes/c").rglob("*/0/0")
    data = bytearray(shard.read_bytes())
    data[5000] ^= 1
    shard.write_bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="layer 0") as caught:
        kvmmap.copy(tmp_path / "a.zarr", tmp_path / "b.kvm")
    assert caught.value.position == 256
    assert not (tmp_path / "b.kvm").exists()


# Interruptions


def make_long(path: Any, length: int = 30_000) -> None:
    with kvmmap.create(path, num_layers=2, capacity=40_000, num_kv_heads=1, head_dim=4) as cache:
        cache.extend(rows(2, length, 1, 4), rows(2, length, 1, 4, seed=1), np.arange(length))


@pytest.mark.parametrize("source", ["kvm", "zarr"])
@pytest.mark.parametrize("target", ["kvm", "zarr"])
@pytest.mark.parametrize("calls", [1, 2, 3, 5])
def test_an_interrupted_copy_is_resumed(
    tmp_path: Path, source: str, target: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvmmap.storage.zarr.receiver.COMMIT_BYTES", 1)
    first, second = tmp_path / f"a.{source}", tmp_path / f"b.{target}"
    make_long(first)
    count = iter(range(calls))

    def interrupt(done: int, total: int) -> None:
        if next(count, None) is None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvmmap.copy(first, second, progress=interrupt)
    if target == "kvm":
        assert not second.exists()
    else:
        with kvmmap.open(second) as part:
            assert part.seq_len in range(min(8192 * (calls - 1), 30_000), 30_001)
            assert part.verify().sound
        with pytest.raises(kvmmap.CacheExistsError):
            kvmmap.copy(first, second, start=1)  # another copy
    with kvmmap.open(first, "a") as growing:
        growing.push_step(rows(2, 1, 4), rows(2, 1, 4), 7)
    report = kvmmap.copy(first, second)
    assert report.resumed >= 8192
    assert report.seq_len == 30_001
    with kvmmap.open(first) as one, kvmmap.open(second) as two:
        same(one, two)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([first.name, second.name])


def test_a_copy_of_a_changed_source_is_not_resumed(tmp_path: Path) -> None:
    make_long(tmp_path / "a.kvm")

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", progress=interrupt)
    with kvmmap.open(tmp_path / "a.kvm", "a") as cache:
        cache.truncate(100)
        cache.extend(rows(2, 9000, 1, 4, seed=5), rows(2, 9000, 1, 4, seed=6))
    assert kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm").resumed == 0
    with kvmmap.open(tmp_path / "a.kvm") as one, kvmmap.open(tmp_path / "b.kvm") as two:
        same(one, two)


@pytest.mark.parametrize("target", ["kvm", "zarr"])
def test_a_killed_copy_is_resumed(tmp_path: Path, target: str) -> None:
    first, second = tmp_path / "a.kvm", tmp_path / f"b.{target}"
    make_long(first)
    code = (
        "import sys, time, kvmmap, kvmmap.storage.zarr.receiver\n"
        "kvmmap.storage.zarr.receiver.COMMIT_BYTES = 1\n"
        "calls = iter(range(1, 3))\n"
        "def wait(done, total): print(done, flush=True); time.sleep(600 if next(calls) == 2 else 0)\n"
        "kvmmap.copy(sys.argv[1], sys.argv[2], progress=wait)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(first), str(second)], stdout=subprocess.PIPE, text=True
    ) as copying:
        assert copying.stdout
        for _ in range(2):
            copying.stdout.readline()
        copying.send_signal(signal.SIGKILL)
    report = kvmmap.copy(first, second)
    assert report.resumed >= 8192
    with kvmmap.open(first) as one, kvmmap.open(second) as two:
        same(one, two)


# A store that dies


def counting_copy(monkeypatch: pytest.MonkeyPatch, source: Any, objects: CountingObjects, **more: Any) -> Any:
    """Copy to a group whose place is this one."""
    with monkeypatch.context() as patch:
        patch.setattr("kvmmap.storage.zarr.receiver.COMMIT_BYTES", 1)
        patch.setattr("kvmmap.transfer.copying.place_of", lambda *arguments: GroupPlace(objects))
        return kvmmap.copy(source, "memory://there.zarr", **more)


@pytest.mark.parametrize(("overwrite", "late"), [(True, True), *sweep((False, False))])
def test_a_store_that_dies_at_the_nth_operation_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool, late: bool
) -> None:
    """The target does not exist or is at its last commit; running the copy again completes it."""
    first = tmp_path / "a.kvm"
    make_long(first, 17_000)
    before = first.read_bytes()
    with kvmmap.open(first) as original:
        for number in itertools.count(1):
            place = new_place()
            if overwrite:
                counting_copy(monkeypatch, kvmmap.QuantizedKvCache(1, 8, 1, 4), CountingObjects(place))
            dying = CountingObjects(place, lambda count, number=number: count >= number, late)  # type: ignore[misc]
            try:
                counting_copy(monkeypatch, first, dying, overwrite=overwrite)
            except OSError:
                reached = part_of(original, place)
            else:
                assert number > 50  # the copy has more operations than this, and came to its end before the death
                break
            if reached is None:  # what was to be told was that it is whole
                continue
            place.delete(LOCK_KEY)  # the lock of a server that can't be asked to release it
            report = counting_copy(monkeypatch, first, CountingObjects(place), overwrite=overwrite)
            assert report.resumed == reached
            with kvmmap.QuantizedKvCache.of_storage(ZarrReader.open(place)) as copy:
                same(original, copy)
                assert zarr.open_group(MemoryStore(as_zarr(place)), mode="r")["layers/1/key_codes"].shape[0] == 40_000
    assert first.read_bytes() == before


def part_of(original: kvmmap.QuantizedKvCache, place: MemoryObjects) -> int | None:
    """Return the length of a failed copy, which is undamaged; None if the copy is complete."""
    try:
        reader = ZarrReader.open(place)  # type: ignore[arg-type]
    except kvmmap.CacheNotFoundError:
        return 0
    with kvmmap.QuantizedKvCache.of_storage(reader) as part:
        assert part.verify().sound
        if part.num_layers == 1:  # what was there before
            return 0
        assert part.seq_len in (0, 8192, 16_384, 17_000)
        for layer, other in zip(part.layers, original.layers, strict=True):
            np.testing.assert_array_equal(layer.key_codes, other.key_codes[: part.seq_len])
        return part.seq_len if reader.root.copying else None


def as_zarr(place: MemoryObjects) -> dict[str, Any]:
    """What zarr-python takes for a store."""
    return {key: cpu.Buffer.from_bytes(bytes(place.get(key))) for key in place.list()}


@pytest.mark.parametrize("far", [False, True])
def test_a_source_that_dies_at_the_nth_operation_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, far: bool
) -> None:
    """There is no file, and running the copy again creates it."""
    make_long(tmp_path / "a.kvm", 17_000)
    place = new_place(far=far)
    counting_copy(monkeypatch, tmp_path / "a.kvm", CountingObjects(place))
    second = tmp_path / "b.kvm"
    for number in itertools.count(2):  # the first opens it
        dying = CountingObjects(place, lambda count, number=number: count >= number)  # type: ignore[misc]
        with kvmmap.QuantizedKvCache.of_storage(ZarrReader.open(dying)) as source:  # type: ignore[arg-type]
            try:
                kvmmap.copy(source, second)
                break
            except OSError:
                assert not second.exists()
    assert number > 10
    with kvmmap.open(tmp_path / "a.kvm") as original, kvmmap.open(second) as copy:
        same(original, copy)
        assert copy.verify().sound
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.kvm", "b.kvm"]


@pytest.mark.parametrize("verify", [True, False])
def test_a_copy_that_meets_a_full_disk_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Rows are written by other threads, or copied in the kernel: errors are raised, and nothing is published."""
    make_long(tmp_path / "a.kvm", 17_000)
    with kvmmap.open(tmp_path / "a.kvm") as cache:
        full = cache.storage.superblock.sections[16, 1].offset  # type: ignore[attr-defined]
        full += 8192 * cache.layers[1].geometry.slab_bytes(1)[0]
    write, copy_from = PosixFile.write, PosixFile.copy_from
    count = itertools.count()

    def fail_to_copy(self: PosixFile, source: PosixFile, start: int, at: int, size: int) -> None:
        if at == full:
            raise OSError(errno.ENOSPC, "no space")
        copy_from(self, source, start, at, size)

    def fail(self: PosixFile, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        if len(offsets) == 4 and next(count) == 3:
            raise OSError(errno.ENOSPC, "no space")
        write(self, offsets, buffers)

    with monkeypatch.context() as patch:
        patch.setattr(PosixFile, *(("copy_from", fail_to_copy) if verify else ("write", fail)))
        with pytest.raises(OSError, match="no space"):
            kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", verify=verify)
    assert not (tmp_path / "b.kvm").exists()
    assert kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm", verify=verify).resumed == 8192
    with kvmmap.open(tmp_path / "a.kvm") as original, kvmmap.open(tmp_path / "b.kvm") as copy:
        same(original, copy)
        assert copy.verify().sound


def test_a_failed_write_does_not_get_a_new_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy has the source's checksums, not those of the bytes in the file."""
    make_long(tmp_path / "a.kvm", 9000)
    write, copy_from = PosixFile.write, PosixFile.copy_from

    def flip_copied(self: PosixFile, source: PosixFile, start: int, at: int, size: int) -> None:
        copy_from(self, source, start, at, size)
        write(self, (at,), (bytes([self.read(at, 1)[0] ^ 1]),))

    def flip(self: PosixFile, offsets: tuple[int, ...], buffers: tuple[Any, ...]) -> None:
        if len(offsets) == 4:
            codes = np.array(buffers[0])
            codes.flat[-1] ^= 1
            buffers = (codes, *buffers[1:])
        write(self, offsets, buffers)

    monkeypatch.setattr(PosixFile, "write", flip)
    monkeypatch.setattr(PosixFile, "copy_from", flip_copied)
    with pytest.raises(kvmmap.CorruptCacheError, match="read back"):
        kvmmap.copy(tmp_path / "a.kvm", tmp_path / "b.kvm")
    assert not (tmp_path / "b.kvm").exists()
    kvmmap.copy(tmp_path / "a.kvm", tmp_path / "c.kvm", verify=False)
    with kvmmap.open(tmp_path / "c.kvm") as copy:
        assert not copy.verify().sound


# A server


@pytest.fixture
def url(s3: Server) -> str:
    return f"s3://{BUCKET}/copies-{next(_numbers)}/cache.zarr"


def test_export_fetch_and_fetch_again(tmp_path: Path, url: str) -> None:
    make_file(tmp_path / "a.kvm", 600, metadata={"a": 1}, model=MODEL).close()
    kvmmap.copy(tmp_path / "a.kvm", url)
    with kvmmap.fetch(url, tmp_path / "b.kvm") as cache, kvmmap.open(tmp_path / "a.kvm") as original:
        same(original, cache)
        assert isinstance(cache.path, str)
        assert cache.path.endswith("b.kvm")
        before = os.stat(tmp_path / "b.kvm").st_ino
    with kvmmap.fetch(url, tmp_path / "b.kvm") as cache:
        assert os.stat(tmp_path / "b.kvm").st_ino == before
        check_filled(cache, 600)
    with kvmmap.open(tmp_path / "b.kvm", "a") as cache:
        cache.push_step(rows(2, 2, 8), rows(2, 2, 8))
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.fetch(url, tmp_path / "b.kvm")
    with kvmmap.fetch(url, tmp_path / "b.kvm", overwrite=True) as cache:
        check_filled(cache, 600)
    (tmp_path / "c.kvm").write_text("something else")
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.fetch(url, tmp_path / "c.kvm", overwrite=True)
    assert (tmp_path / "c.kvm").read_text() == "something else"


def test_a_server_that_is_killed_while_it_is_exported_to(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, s3: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is unchanged, the target is at its last commit, and running the copy again completes it."""
    monkeypatch.setattr("kvmmap.storage.zarr.receiver.COMMIT_BYTES", 1)
    first = tmp_path / "a.kvm"
    make_long(first)
    before = first.read_bytes()
    with Server(tmp_path_factory.mktemp("mortal")) as server:
        options = server.options(retry_config={"max_retries": 1})
        url = f"s3://{BUCKET}/cache.zarr"
        count = itertools.count()

        def kill(done: int, total: int) -> None:
            if next(count) == 1:
                server.kill()

        with pytest.raises(kvmmap.StoreError):
            kvmmap.copy(first, url, target_options=options, progress=kill)
        assert first.read_bytes() == before
        server.start()
        with kvmmap.open(url, storage_options=options) as part:
            assert part.seq_len in (0, 8192, 16_384)
            reached = part.seq_len
            assert part.verify().sound
        report = kvmmap.copy(first, url, target_options=options)
        assert report.resumed == reached
        with kvmmap.open(first) as one, kvmmap.open(url, storage_options=options) as two:
            same(one, two)
