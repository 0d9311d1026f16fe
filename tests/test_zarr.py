"""Zarr-backed caches: other programs that read them, failing stores, damage, locks, and memory."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from helpers.objects import CountingObjects, new_place
from helpers.support import check_filled, fill, make_file, rows, run_python

import kvmmap
from kvmmap.metadata import Document
from kvmmap.storage.objects.local import FolderObjects
from kvmmap.storage.objects.lock import LOCK_KEY
from kvmmap.storage.objects.protocol import Objects
from kvmmap.storage.protocols import Rows
from kvmmap.storage.zarr.layout import Layout
from kvmmap.storage.zarr.placement import create_group, open_locked
from kvmmap.storage.zarr.reader import ZarrReader

ARRAYS = ("key_codes", "key_scales", "value_codes", "value_scales")
GEOMETRY = kvmmap.CacheGeometry.build(num_layers=2, capacity=1200, num_kv_heads=2, head_dim=8)


@pytest.fixture
def group(tmp_path: Path) -> Path:
    return tmp_path / "cache.zarr"


def make_group(objects: Objects, shard_blocks: int = 1, **more: Any) -> kvmmap.QuantizedKvCache:
    """A group of short shards, so that few positions make many objects."""
    storage = create_group(objects, GEOMETRY, Document(None, {}), shard_blocks=shard_blocks, **more)
    return kvmmap.QuantizedKvCache.of_storage(storage)


def reopen(objects: Objects, mode: str = "r") -> kvmmap.QuantizedKvCache:
    storage = ZarrReader.open(objects) if mode == "r" else open_locked(objects)
    return kvmmap.QuantizedKvCache.of_storage(storage)


# Other programs


@pytest.mark.parametrize("compressor", [None, "zstd"])
def test_plain_zarr_reads_it(group: Path, compressor: str | None) -> None:
    with make_file(group, 600, compressor=compressor, metadata={"prompt": "héllo"}) as cache:
        cache.push_step(rows(2, 2, 8), rows(2, 2, 8))
    with kvmmap.open(group) as cache:
        plain = zarr.open_group(group, mode="r")
        facts = plain.attrs["kvmmap"]
        assert facts["seq_len"] == cache.seq_len == 601
        assert facts["document"]["metadata"] == {"prompt": "héllo"}
        for number, layer in enumerate(cache.layers):
            for name in ARRAYS:
                array = plain[f"layers/{number}/{name}"]
                np.testing.assert_array_equal(array[:601], getattr(layer, name))
                assert not array[601:].any()
            codes, scales = plain[f"layers/{number}/key_codes"], plain[f"layers/{number}/key_scales"]
            np.testing.assert_array_equal(codes[10:600] * scales[10:600][..., None], layer.read_keys(10, 600))
        np.testing.assert_array_equal(plain["token_ids"][:601], cache.token_ids)


@pytest.mark.parametrize("compressor", [None, "zstd"])
def test_tensorstore_reads_it(group: Path, compressor: str | None) -> None:
    make_file(group, 601, compressor=compressor).close()
    with kvmmap.open(group) as cache:
        for number, layer in enumerate(cache.layers):
            for name in ARRAYS:
                spec = {"driver": "zarr3", "kvstore": f"file://{group}/layers/{number}/{name}"}
                array = tensorstore.open(spec, read=True).result()
                np.testing.assert_array_equal(array[:601].read().result(), getattr(layer, name))


def test_a_group_rewritten_by_zarr_is_the_same_cache(group: Path, tmp_path: Path) -> None:
    """Another program may copy a group array by array, with shards of its own order, and keep the attributes."""
    make_file(group, 601).close()
    source, target = zarr.open_group(group, mode="r"), zarr.open_group(tmp_path / "copy.zarr", mode="w")
    target.attrs.update(source.attrs)
    for path, node in source.members(max_depth=None):
        if isinstance(node, zarr.Array):
            copy = target.create_array(
                path,
                shape=node.shape,
                dtype=node.dtype,
                chunks=node.chunks,
                shards=node.shards,
                compressors=None,
                filters=None,
                fill_value=node.fill_value,
            )
            copy[:] = node[:]
    with kvmmap.open(tmp_path / "copy.zarr") as cache:
        check_filled(cache, 601)
        assert cache.verify().sound


def test_zarr_is_loaded_when_it_is_needed(path: Path) -> None:
    run_python(
        "import sys, kvmmap; from helpers.support import make_file\n"
        "make_file(sys.argv[1], 3).close(); kvmmap.open(sys.argv[1]).close()\n"
        "assert not {'zarr', 'obstore', 'numcodecs', 'safetensors'} & set(sys.modules)",
        path,
    )


@pytest.mark.parametrize(("library", "url", "extra"), [("zarr", "x.zarr", "zarr"), ("obstore", "s3://bucket/x", "s3")])
def test_missing_libraries_are_named(tmp_path: Path, library: str, url: str, extra: str) -> None:
    code = (
        "import sys, kvmmap; sys.modules[sys.argv[1]] = None\n"
        "try: kvmmap.create(sys.argv[2], num_layers=1, capacity=1, num_kv_heads=1, head_dim=1)\n"
        "except kvmmap.MissingLibraryError as error: print(error)"
    )
    done = run_python(code, library, url if "://" in url else tmp_path / url)
    assert f"pip install 'kvmmap[{extra}]'" in done.stdout


# Layout


def test_a_long_layer_is_tens_of_objects(group: Path) -> None:
    layout = Layout.plan(kvmmap.CacheGeometry.build(num_layers=32, capacity=131072, num_kv_heads=8, head_dim=128), None)
    assert 4 * 131072 // layout.shard_tokens == 64
    with kvmmap.create(group, num_layers=1, capacity=20000, num_kv_heads=1, head_dim=8) as cache:
        cache.extend(rows(1, 17000, 1, 8), rows(1, 17000, 1, 8))
    data = [path for path in group.rglob("*") if path.is_file() and "/c/" in str(path)]
    assert len(data) == 4 * 3 + 3  # shards, and checksums


def test_groups_are_private(group: Path) -> None:
    old = os.umask(0)
    try:
        make_file(group, 300).close()
        modes = {stat.S_IMODE(path.stat().st_mode) for path in (group, *group.rglob("*")) if path.is_file()}
        assert modes == {0o600}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (group, *group.rglob("*")) if path.is_dir()} == {0o700}
    finally:
        os.umask(old)


def test_urls(group: Path) -> None:
    make_file(f"file://{group}", 5).close()  # type: ignore[arg-type]
    with kvmmap.open(f"file://{group}") as cache:
        check_filled(cache, 5)
    with kvmmap.open(group) as cache:
        check_filled(cache, 5)
    for bad in ("ftp://host/x.zarr", "s3://bucket/x.kvm"):
        with pytest.raises(kvmmap.NotACacheError):
            kvmmap.open(bad)
    with pytest.raises(kvmmap.NotACacheError, match=r"\.kvm files alone"):
        kvmmap.resize(group, 10)
    with pytest.raises(kvmmap.KvmmapError, match="compressed"):
        kvmmap.create(
            group.with_suffix(".kvm"), num_layers=1, capacity=1, num_kv_heads=1, head_dim=1, compressor="zstd"
        )


def test_existing_groups_are_not_overwritten(group: Path) -> None:
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.open(group)
    with pytest.raises(kvmmap.CacheNotFoundError):
        make_file(group / "deeper" / "x.zarr")
    group.mkdir()
    (group / "mine.txt").write_text("precious")
    with pytest.raises(kvmmap.CacheExistsError, match="something else"):
        make_file(group)
    assert sorted(path.name for path in group.iterdir()) == ["mine.txt"]
    (group / "mine.txt").unlink()
    zarr.open_group(group, mode="w")
    for overwrite in (False, True):
        with pytest.raises(kvmmap.CacheExistsError):
            make_file(group, overwrite=overwrite)
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.open(group)


def test_overwrite(group: Path) -> None:
    cache = make_file(group, 300)
    with pytest.raises(kvmmap.CacheExistsError):
        make_file(group)
    with pytest.raises(kvmmap.CacheLockedError):
        make_file(group, overwrite=True)
    cache.close()
    with kvmmap.open(group) as reader:
        make_file(group, 3, overwrite=True, capacity=500).close()
        with pytest.raises(kvmmap.CacheChangedError, match="replaced"):
            reader.layers[0].read_keys()
        with pytest.raises(kvmmap.CacheChangedError, match="replaced"):
            reader.refresh()
    with kvmmap.open(group) as reader:
        check_filled(reader, 3)
        assert reader.capacity == 500


# Commits


def test_readers_see_flushed_positions(group: Path) -> None:
    with make_file(group, 300) as cache, kvmmap.open(group) as reader:
        assert reader.seq_len == 0
        cache.flush()
        assert reader.seq_len == 0
        assert reader.refresh()
        assert not reader.refresh()
        check_filled(reader, 300)
        fill(cache, 310)
        cache.flush()
        check_filled(reader, 300)  # its own commit, out of objects that are longer by now
        reader.refresh()
        check_filled(reader, 310)
        assert reader.verify().sound


def test_commit_at_every_append(group: Path) -> None:
    with make_file(group, durability="commit") as cache, kvmmap.open(group) as reader:
        for length in (1, 2, 255, 256, 257, 300):
            fill(cache, length)
            reader.refresh()
            check_filled(reader, length)


def test_a_commit_of_nothing_stores_nothing() -> None:
    objects = CountingObjects(new_place())
    with make_group(objects) as cache:
        fill(cache, 300)
        cache.flush()
        before = objects.count
        cache.flush()
        assert objects.count == before


def test_layers_that_run_ahead(group: Path) -> None:
    """One layer is far ahead, its shards stored already; a commit counts what all have."""
    with make_group(FolderObjects(str(group))) as cache:
        ahead = rows(1000, 2, 8, seed=5)
        cache.layers[0].extend(ahead, ahead)
        for length in (5, 256, 300):
            other = cache.layers[1]
            other.extend(ahead[len(other) : length], ahead[len(other) : length])
            cache.flush()
            with kvmmap.open(group) as reader:
                assert reader.seq_len == length
                assert reader.verify().sound
                codes, _ = kvmmap.quantize_rows(ahead[:length])
                for layer in reader.layers:
                    np.testing.assert_array_equal(layer.key_codes, codes)
        assert len(cache.layers[0]) == 1000
        cache.layers[1].extend(ahead[300:], ahead[300:])
    with kvmmap.open(group) as reader:
        np.testing.assert_array_equal(reader.layers[0].key_codes, reader.layers[1].key_codes)


def test_an_append_that_fails_leaves_nothing() -> None:
    """Shards are written during an append; if a later layer refuses its rows, they are not committed."""
    objects = new_place()
    with make_group(objects) as cache:
        fill(cache, 100)
        cache.flush()
        bad = rows(2, 900, 2, 8)
        bad[1, 899, 1, 7] = np.nan
        for _ in range(2):
            with pytest.raises(kvmmap.NonFiniteError):
                cache.extend(bad, bad)
            cache.flush()
            check_filled(cache, 100)
            check_filled(reopen(objects), 100)
        fill(cache, 300)
        cache.flush()
        check_filled(reopen(objects), 300)
        with pytest.raises(kvmmap.NonFiniteError):
            cache.extend(bad[:, ::1], bad)
        cache.truncate(270)
        fill(cache, 800)
        check_filled(cache, 800)
    check_filled(reopen(objects), 800)
    assert reopen(objects).verify().sound


# Stores that fail


class Model:
    """What a cache holds, and what its commits held, beside one that is written."""

    def __init__(self) -> None:
        self.seeds: list[int] = []
        self.commits: list[list[int]] = []

    def extend(self, cache: kvmmap.QuantizedKvCache, count: int, seed: int) -> None:
        seeds = [seed * 10_000 + number for number in range(count)]
        keys = self.keys(seeds)
        cache.extend(keys, -keys, seeds)
        self.seeds += seeds

    @staticmethod
    def keys(seeds: Sequence[int]) -> np.ndarray:
        numbers = np.array(seeds, np.float32).reshape(1, -1, 1, 1) % 9973
        return numbers + np.arange(1, 33, dtype=np.float32).reshape(2, 1, 2, 8)

    def flush(self, cache: kvmmap.QuantizedKvCache) -> None:
        self.commits.append(list(self.seeds))
        cache.flush()

    def truncate(self, cache: kvmmap.QuantizedKvCache, length: int) -> None:
        self.commits.append(self.seeds[:length])
        cache.truncate(length)
        del self.seeds[length:]

    def check(self, cache: kvmmap.QuantizedKvCache) -> None:
        """Assert that a cache holds the last commit, or the one before if that did not come to its end."""
        ids = cache.token_ids.tolist()
        assert ids in ([[], *self.commits])[-2:]
        if ids:
            keys = self.keys(ids)
            for number, layer in enumerate(cache.layers):
                codes, scales = kvmmap.quantize_rows(keys[number])
                np.testing.assert_array_equal(layer.key_codes, codes)
                np.testing.assert_array_equal(layer.key_scales, scales)
                np.testing.assert_array_equal(layer.value_codes, -codes)
        report = cache.verify()
        assert report.sound, report.damages


def life(cache: kvmmap.QuantizedKvCache, model: Model) -> Iterator[None]:
    """A cache's life, in steps: shards begun, filled and completed, tails that grow, and truncations."""
    model.extend(cache, 300, 1)
    yield
    model.flush(cache)
    yield
    model.extend(cache, 300, 2)
    yield
    model.flush(cache)
    yield
    model.truncate(cache, 280)
    yield
    model.extend(cache, 100, 3)
    yield
    model.flush(cache)
    yield
    model.extend(cache, 1, 4)
    yield
    model.flush(cache)
    yield


def operations_of_a_life(objects: Objects) -> int:
    counting = CountingObjects(objects)
    with make_group(counting) as cache:
        for _ in life(cache, Model()):
            pass
    return counting.count


LIFE = operations_of_a_life(new_place())


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", range(1, LIFE + 1))
def test_a_store_that_dies_at_the_nth_operation(number: int, late: bool) -> None:
    """From some operation on the store fails. The last commit remains, or nothing, and can be continued."""
    place, model = new_place(), Model()
    objects = CountingObjects(place, lambda count: count >= number, late)
    try:
        cache = make_group(objects)
        for _ in life(cache, model):
            pass
        cache.close()
    except OSError:
        pass
    place.delete(LOCK_KEY)
    try:
        reader = reopen(place)
    except kvmmap.CacheNotFoundError:
        assert not model.commits
        make_group(place).close()
        return
    model.check(reader)
    with reopen(place, "a") as again:
        model.seeds = reader.token_ids.tolist()
        model.extend(again, 400, 9)
        model.flush(again)
    model.check(reopen(place))


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("number", range(1, LIFE + 1))
def test_a_store_that_fails_once(number: int, late: bool) -> None:
    """One operation fails: its call raises, and repeating the call succeeds."""
    place, model = new_place(), Model()
    objects = CountingObjects(place, lambda count: count == number, late)
    try:
        cache = make_group(objects)
    except OSError:
        place.delete(LOCK_KEY)
        cache = make_group(place, overwrite=True)
    steps: list[Callable[[], Any]] = [
        lambda: model.extend(cache, 300, 1),
        lambda: model.flush(cache),
        lambda: model.extend(cache, 300, 2),
        lambda: model.flush(cache),
        lambda: model.truncate(cache, 280),
        lambda: model.extend(cache, 100, 3),
        lambda: model.flush(cache),
        lambda: model.extend(cache, 1, 4),
        lambda: model.flush(cache),
    ]
    for step in steps:
        try:
            step()
        except OSError:
            step()
    assert cache.token_ids.tolist() == model.seeds
    try:
        cache.close()
    except OSError:
        place.delete(LOCK_KEY)
    model.check(reopen(place))


# Damage


def damaged(group: Path, pattern: str) -> list[Path]:
    return sorted(path for path in group.glob(pattern) if path.is_file())


@pytest.mark.parametrize("compressor", [None, "zstd"])
@pytest.mark.parametrize("array", ARRAYS)
def test_a_flipped_bit_is_detected_and_located(group: Path, array: str, compressor: str | None) -> None:
    make_file(group, 600, compressor=compressor).close()
    (path,) = damaged(group, f"layers/1/{array}/c/**/*")
    data = bytearray(path.read_bytes())
    data[600 if array.endswith("codes") else 100] ^= 4
    path.write_bytes(data)
    with kvmmap.open(group) as cache:
        report = cache.verify()
        assert not report.sound
        assert {damage.layer for damage in report.damages} == {1}
        assert report.damages[0].start == 0
        with pytest.raises(kvmmap.CorruptCacheError, match="layer 1") as caught:
            cache.layers[1].read_keys()
        assert (caught.value.layer, caught.value.position) == (1, 0)
        np.testing.assert_array_equal(cache.layers[0].read_keys().shape, (600, 2, 8))
    if compressor is None:
        with kvmmap.open(group, "a") as cache, pytest.raises(kvmmap.CorruptCacheError):
            fill(cache, 601)


@pytest.mark.parametrize("pattern", ["layers/1/key_codes/c/**/*", "block_checksums/c/**/*", "token_ids/c/*"])
@pytest.mark.parametrize("how", ["removed", "cut", "emptied"])
def test_what_is_missing_is_damage(group: Path, pattern: str, how: str) -> None:
    make_file(group, 600).close()
    for path in damaged(group, pattern):
        if how == "removed":
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: 20 if how == "cut" else 0])
    with kvmmap.open(group) as cache:
        assert not cache.verify().sound
        with pytest.raises(kvmmap.CorruptCacheError):
            _ = cache.token_ids if "token" in pattern else cache.layers[1].read_keys()


def test_every_byte_of_the_root_counts(group: Path) -> None:
    make_file(group, 300, metadata={"note": "text"}).close()
    root = group / "zarr.json"
    data = root.read_bytes()
    with kvmmap.open(group) as cache:
        expected = cache._storage.root  # type: ignore[attr-defined]
    for place in range(0, len(data), 3):
        changed = bytearray(data)
        changed[place] ^= 1
        root.write_bytes(changed)
        try:
            with kvmmap.open(group) as cache:
                assert cache._storage.root == expected  # type: ignore[attr-defined]  # blanks, and zarr's own keys
        except kvmmap.FormatError:
            pass
    root.write_bytes(data)


def change_root(group: Path, **changes: Any) -> None:
    """Change facts of a group's root, and recompute its checksum."""
    from kvmmap.storage.zarr.root import _digest

    root = group / "zarr.json"
    document = json.loads(root.read_bytes())
    facts = document["attributes"]["kvmmap"]
    del facts["checksum"]
    facts |= changes
    facts["checksum"] = _digest(facts)
    root.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capacity", -1),
        ("capacity", 2**60),
        ("seq_len", 2**70),
        ("seq_len", "5"),
        ("shard_blocks", 0),
        ("shard_blocks", 2**40),
        ("shard_blocks", 1.5),
        ("shard_blocks", [[1, 1, 1]] * 2**20),  # it must not be multiplied by the positions in a block
        ("layers", []),
        ("layers", [[1]]),
        ("layers", [[2, 8, 2**70], [2, 8, 8]]),
        ("tails", ["00"]),
        ("tails", ["zz", "00"]),
        ("block_tokens", 0),
        ("document", {}),
        ("generation", True),
        ("token_len", 1000),
    ],
)
def test_a_hostile_root_is_refused(group: Path, name: str, value: Any) -> None:
    make_file(group, 300).close()
    change_root(group, **{name: value})
    with pytest.raises(kvmmap.CorruptCacheError):
        kvmmap.open(group)


def test_a_list_in_place_of_a_count_is_not_multiplied(group: Path) -> None:
    make_file(group, 0).close()
    change_root(group, shard_blocks=[0] * 2**18, block_tokens=2**20)
    with pytest.raises(kvmmap.CorruptCacheError):
        kvmmap.open(group)


@pytest.mark.parametrize(
    ("name", "value"), [("version", 2), ("codec", "int4"), ("transform", "hadamard"), ("compressor", "lz4")]
)
def test_groups_of_later_versions_are_refused(group: Path, name: str, value: Any) -> None:
    make_file(group, 300).close()
    change_root(group, **{name: value})
    with pytest.raises(kvmmap.VersionMismatchError, match=str(value)):
        kvmmap.open(group)


# Locks


def test_a_killed_writer_does_not_block_the_next(group: Path) -> None:
    make_file(group, 10).close()
    code = (
        "import os, sys, kvmmap; from helpers.support import fill\n"
        "cache = kvmmap.open(sys.argv[1], 'a'); fill(cache, 270); cache.flush(); fill(cache, 300)\n"
        "print('ready', flush=True); sys.stdin.readline()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(group)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    ) as writer:
        assert writer.stdout
        assert writer.stdout.readline() == "ready\n"
        with kvmmap.open(group) as reader:
            assert reader.facts()["state"] == "open for writing"
            assert reader.facts()["writer_pid"] == writer.pid
        with pytest.raises(kvmmap.CacheLockedError, match=f"process {writer.pid}"):
            kvmmap.open(group, "a")
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    (group / "layers" / "0" / ".left.tmp").write_bytes(b"half of something")
    with kvmmap.open(group) as reader:
        assert reader.facts()["state"] == "interrupted"
        check_filled(reader, 270)
    with kvmmap.open(group, "a") as cache:
        check_filled(cache, 270)
        fill(cache, 400)
    assert not list(group.rglob("*.tmp"))
    with kvmmap.open(group) as reader:
        check_filled(reader, 400)


def test_object_locks() -> None:
    place = new_place()
    cache = make_group(place)
    with pytest.raises(kvmmap.CacheLockedError, match=r"this process .* since .*break_lock=True"):
        reopen(place, "a")
    fill(cache, 5)
    cache.close()
    dead = run_python(
        "from kvmmap.storage.objects.lock import new_owner; import json; print(json.dumps(new_owner()))"
    ).stdout
    place.put(LOCK_KEY, [dead.encode()])
    with reopen(place, "a") as cache:  # its owner ran here, and is gone
        fill(cache, 10)
    other = json.loads(dead) | {"host": "elsewhere", "machine": "another boot"}
    place.put(LOCK_KEY, [json.dumps(other).encode()])
    with pytest.raises(kvmmap.CacheLockedError, match=f"process {other['pid']} on elsewhere"):
        reopen(place, "a")
    with kvmmap.open(place.url, "a", break_lock=True) as cache:
        check_filled(cache, 10)
    with reopen(place, "a"):
        pass


def test_a_writer_detects_that_its_lock_was_broken() -> None:
    place = new_place()
    first = make_group(place)
    fill(first, 5)
    first.flush()
    with kvmmap.open(place.url, "a", break_lock=True) as second:
        fill(second, 7)
    fill(first, 300)
    with pytest.raises(kvmmap.CacheChangedError, match="another writer"):
        first.flush()
    with pytest.raises(kvmmap.CacheChangedError, match="another writer"):
        fill(first, 301)
    first.close()
    check_filled(reopen(place), 7)


def test_a_server_without_conditional_puts_is_detected() -> None:
    class Careless(CountingObjects):
        def put_if(self, key: str, data: bytes, tag: str | None) -> str:
            self.inner.put(key, [data])
            return "tag"

        def lock(self, timeout: float, *, break_lock: bool) -> Any:
            from kvmmap.storage.objects.lock import ObjectLock

            return ObjectLock.take(self, timeout, break_lock=break_lock)  # type: ignore[arg-type]

    place = new_place()
    with pytest.raises(kvmmap.KvmmapError, match="ignores conditions"):
        make_group(Careless(place))
    assert not list(place.list())


# Memory


def test_fetched_rows_are_bounded(group: Path) -> None:
    with make_group(FolderObjects(str(group))) as cache:
        fill(cache, 1200)
    shard = 256 * GEOMETRY.layers[0].position_bytes
    storage = ZarrReader.open(FolderObjects(str(group)), cache_bytes=2 * shard)
    with kvmmap.QuantizedKvCache.of_storage(storage) as cache:
        for layer in cache.layers:
            layer.read_keys()
            assert len(storage.shards._kept) <= 2
        check_filled(cache, 1200)
        view = cache.layers[0].key_codes
        kept = view.copy()
        cache.layers[1].read_values()
        np.testing.assert_array_equal(view, kept)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("lengths", [(300, 511, 700), (256, 512, 1100), (700, 701, 1200)])
def test_a_reader_sees_growing_rows(far: bool, lengths: tuple[int, ...]) -> None:
    """A shard that was fetched whole has no room for further rows."""
    place = new_place(far=far)
    with make_group(place, shard_blocks=2) as cache, reopen(place) as reader:
        views = []
        for length in lengths:
            fill(cache, length)
            cache.flush()
            assert reader.refresh()
            check_filled(reader, length)
            views.append((length, reader.layers[1].value_codes, reader.layers[1].value_codes.copy()))
            for _, view, was in views:
                np.testing.assert_array_equal(view, was)
        cache.truncate(lengths[0] - 1)
        cache.flush()
        assert reader.refresh()
        check_filled(reader, lengths[0] - 1)
        assert reader.verify().sound


def test_borrowed_rows_are_released_by_a_commit() -> None:
    """A copy borrows the caller's rows until the commit; later appends and changes by the caller are independent."""
    place = new_place()
    own = kvmmap.QuantizedKvCache(2, 2048, 2, 8)
    fill(own, 1000)
    with make_group(place, shard_blocks=2) as cache:
        lent = [Rows.of(layer.geometry, [array.copy() for array in layer.read_quantized()]) for layer in own.layers]
        for start, stop in ((0, 300), (300, 512), (512, 600)):
            for store, rows in zip(cache.storage.layers, lent, strict=True):
                store.write(store.begin(stop - start), rows.part(start, stop))
                store.publish(stop)
            if stop == 512:
                cache.storage.commit()
        cache.storage.commit()
        for rows in lent:
            for array in rows:
                array[:] = 1
        fill(cache, 900)
        for layer, other in zip(cache.layers, own.layers, strict=True):
            np.testing.assert_array_equal(layer.key_codes, other.key_codes[:900])
            np.testing.assert_array_equal(layer.value_scales, other.value_scales[:900])
    with reopen(place) as reader:
        for layer, other in zip(reader.layers, own.layers, strict=True):
            np.testing.assert_array_equal(layer.value_codes, other.value_codes[:900])
        assert reader.verify().sound


def test_a_part_reads_a_part(group: Path) -> None:
    """Reading one position fetches its block, not the layer."""
    with make_group(FolderObjects(str(group)), shard_blocks=4) as cache:
        fill(cache, 1200)
    objects = CountingObjects(FolderObjects(str(group)))
    with kvmmap.QuantizedKvCache.of_storage(ZarrReader.open(objects)) as cache:  # type: ignore[arg-type]
        opened = objects.count
        cache.layers[0].get_key(700, 1)
        assert objects.count - opened == 4 * 2 + 1  # an index and a block of four arrays, and the checksums
        again = objects.count
        cache.layers[0].get_value(767, 0)
        assert objects.count == again
        cache.layers[1].get_value(700, 0)
        assert objects.count - again == 8


def test_a_shard_is_no_larger_than_readers_accept(group: Path) -> None:
    wide = kvmmap.CacheGeometry.build(num_layers=1, capacity=100_000, num_kv_heads=1000, head_dim=1000)
    layout = Layout.plan(wide, None)
    assert layout.shard_blocks == 8
    assert layout.shard_bytes <= 2**32
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"make a \.kvm file"):
        kvmmap.create(group, num_layers=1, capacity=1, num_kv_heads=65535, head_dim=200)
    assert not group.exists()
