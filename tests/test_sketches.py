"""Sketches: every kernel against the oracle, bounds, their sections in files, and selection of blocks."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import sketch_oracle as oracle
from helpers.support import MakeCache, fill, make_file, rows, run_python
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import kvmmap
from kvmmap import QuantizedKvLayer
from kvmmap.attention.topk import block_bounds
from kvmmap.format import SLAB_SECTIONS, Section, Superblock, checksum
from kvmmap.storage.sketches import layer_sketches, sketch_rows

GOLDEN = Path(__file__).parent / "golden"


def stored(cache: kvmmap.QuantizedKvCache, layer: int) -> np.ndarray:
    """The sketches of all complete blocks, as the store gives them."""
    store = cache.layers[layer]._store
    return np.concatenate(layer_sketches(store, store.length // 256, 256, store.version()))


def pieces(cache: kvmmap.QuantizedKvCache, blocks: int) -> list[np.ndarray]:
    """Those of layer 1 as its store gives them: of a file, what it keeps, and what had to be computed."""
    store = cache.layers[1]._store
    return list(layer_sketches(store, blocks, 256, store.version()))


def expected(layer: QuantizedKvLayer) -> np.ndarray:
    whole = len(layer) // 256 * 256
    return oracle.sketch(layer.key_codes[:whole], layer.key_scales[:whole], 256)


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-3, 1.0, 1e20, 3.4e38])
def test_kernels_give_the_oracles_sketches_and_bounds(kernel: str, heads: int, dim: int, magnitude: float) -> None:
    keys = (rows(96, heads, dim, seed=dim).clip(-3, 3) / 3).astype(np.float32) * np.float32(magnitude)
    codes, scales = kvmmap.quantize_rows(keys)
    sketches = sketch_rows(codes, scales, 32)
    np.testing.assert_array_equal(sketches, oracle.sketch(codes, scales, 32))
    query = rows(2 * heads, dim, seed=1) / np.float32(max(1.0, magnitude / 1e10))
    query[0, 0] = 0
    found = block_bounds(sketches, query, kvmmap.LayerGeometry(heads, dim, dim))
    with np.errstate(invalid="ignore"):
        wanted = oracle.bounds(query, sketches)
    bounded = np.isfinite(oracle.widen(sketches)).all(axis=(2, 3)).T.repeat(2, axis=0)  # [query heads, blocks]
    assert not (found < wanted)[~bounded].any()
    finite = np.isfinite(wanted) & bounded
    np.testing.assert_allclose(
        found[finite], wanted[finite], rtol=1e-5, atol=1e-5 * np.abs(wanted[finite]).max(initial=0)
    )
    assert not np.isnan(found).any()


@given(
    seed=st.integers(0, 10**6),
    dim=st.integers(1, 40),
    exponents=st.tuples(st.integers(-40, 37), st.integers(-40, 37)),
    spread=st.integers(0, 20),
)
@settings(max_examples=200, deadline=None)
def test_the_bound_is_a_bound(seed: int, dim: int, exponents: tuple[int, int], spread: int) -> None:
    """Of every key of the block, whatever the sizes of keys and queries, and of channels among themselves."""
    rng = np.random.default_rng(seed)
    channels = 2.0 ** rng.uniform(-spread, 0, dim)
    keys = (rng.uniform(-1, 1, (64, 2, dim)) * channels * 10.0 ** exponents[0]).astype(np.float32)
    query = (rng.uniform(-1, 1, (4, dim)) * 10.0 ** min(exponents[1], 37 - exponents[0])).astype(np.float32)
    codes, scales = kvmmap.quantize_rows(keys)
    sketches = sketch_rows(codes, scales, 32)
    exact = oracle.bounds(query, sketches)
    keys64 = (codes * scales[..., None]).astype(np.float64)  # as they are dequantised: the product rounds, to f32
    wide = oracle.widen(sketches).astype(np.float64)
    blocks = keys64.reshape(2, 32, 2, dim)
    assert (wide[:, :, 0] <= blocks.min(axis=1)).all()
    assert (wide[:, :, 1] >= blocks.max(axis=1)).all()
    products = np.abs(query.astype(np.float64)).sum(axis=1, keepdims=True) * np.abs(wide).max()
    computed = block_bounds(sketches, query, kvmmap.LayerGeometry(2, dim, dim))
    for head in range(4):
        scores = (blocks[:, :, head // 2] @ query[head].astype(np.float64)).max(axis=1)
        assert (scores <= exact[head] * (1 + 1e-12) + 1e-14 * products[head]).all()
        assert (scores <= computed[head] + 1e-6 * products[head] + 1e-44 * dim).all()


def test_infinite_keys(kernel: str) -> None:
    """What was quantised from the largest numbers may come back infinite, and bounds nothing."""
    largest = np.finfo(np.float32).max
    keys = np.zeros((4, 1, 3), np.float32)
    keys[0, 0], keys[1, 0] = [largest, 1, -largest], [-largest, 2, largest]
    codes, scales = kvmmap.quantize_rows(keys)
    sketches = sketch_rows(codes, scales, 4)
    geometry = kvmmap.LayerGeometry(1, 3, 3)
    for query in ([0, 1, 0], [1, 0, 0], [1, 0, -1], [0, 0, 0], [-1, 0, -1]):
        assert not np.isnan(block_bounds(sketches, np.array([query], np.float32), geometry)).any()
    assert block_bounds(sketches, np.array([[0, 0, 0]], np.float32), geometry) >= 0


def test_every_storage_gives_the_same(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=2, capacity=1500)
    keys = rows(2, 1100, 2, 16)
    cache.extend(keys[:, :255], keys[:, :255])
    cache.push_step(keys[:, 255], keys[:, 255])
    for layer in (0, 1):
        np.testing.assert_array_equal(stored(cache, layer), expected(cache.layers[layer]))
    cache.extend(keys[:, 256:1000], keys[:, 256:1000])
    for step in range(1000, 1100):
        cache.push_step(keys[:, step], keys[:, step])
    for layer in (0, 1):
        assert len(stored(cache, layer)) == 4
        np.testing.assert_array_equal(stored(cache, layer), expected(cache.layers[layer]))
    cache.truncate(600)
    cache.extend(-2 * keys[:, :300], keys[:, :300])
    for layer in (0, 1):
        assert len(stored(cache, layer)) == 3
        np.testing.assert_array_equal(stored(cache, layer), expected(cache.layers[layer]))


def test_the_file_stores_sketches_of_committed_blocks(path: Path) -> None:
    """The others are computed: once, by each handle, until they are committed."""
    cache = make_file(path, 700, capacity=1200)
    cache.flush()
    fill(cache, 1100)
    with kvmmap.open(path) as reader:
        for handle in (cache, reader):
            assert [len(piece) for piece in pieces(handle, 4)] == [2, 2]
            assert [len(piece) for piece in pieces(handle, 2)] == [2]
            np.testing.assert_array_equal(stored(handle, 1), expected(cache.layers[1]))
        first = pieces(cache, 4)[1]
        assert np.shares_memory(pieces(cache, 4)[1], first)
        cache.flush()
        reader.refresh()
        for handle in (cache, reader):
            assert [len(piece) for piece in pieces(handle, 4)] == [4]
            np.testing.assert_array_equal(stored(handle, 1), expected(cache.layers[1]))
    cache.truncate(300)
    fill(cache, 1000)
    assert [len(piece) for piece in pieces(cache, 3)] == [1, 2]
    np.testing.assert_array_equal(stored(cache, 1), expected(cache.layers[1]))
    cache.close()


def test_a_dead_writer_leaves_no_wrong_sketches(path: Path) -> None:
    """Nor does the next one, which commits what was published."""
    make_file(path, 10).close()
    code = (
        "import os, sys, kvmmap; from helpers.support import fill\n"
        "cache = kvmmap.open(sys.argv[1], 'a')\n"
        "for length in (255, 256, 300, 511, 512, 700): fill(cache, length)\n"
        "os._exit(0)"
    )
    run_python(code, path)
    for mode in ("r", "a", "r"):
        with kvmmap.open(path, mode) as cache:
            assert cache.seq_len == 700
            for layer in (0, 1):
                np.testing.assert_array_equal(stored(cache, layer), expected(cache.layers[layer]))


def test_resized_compacted_and_forked_files_keep_them(path: Path, tmp_path: Path) -> None:
    make_file(path, 700).close()
    kvmmap.resize(path, 2000)
    kvmmap.compact(path)
    kvmmap.fork(path, tmp_path / "fork.kvm", length=650, capacity=900).close()
    for file, blocks in ((path, 2), (tmp_path / "fork.kvm", 2)):
        with kvmmap.open(file) as cache:
            assert (Section.KEY_SKETCHES, 1) in cache._storage.superblock.sections
            assert len(stored(cache, 1)) == blocks
            np.testing.assert_array_equal(stored(cache, 1), expected(cache.layers[1]))
            assert cache.verify().sound


def test_files_without_them(tmp_path: Path) -> None:
    """A file of before: selecting works, appending continues without them, a fork and a resized file have them."""
    path = tmp_path / "old.kvm"
    shutil.copy(GOLDEN / "v1.kvm", path)
    with kvmmap.open(path, "a") as cache:
        assert (Section.KEY_SKETCHES, 0) not in cache._storage.superblock.sections
        cache.extend(rows(2, 30, 2, 5), rows(2, 30, 2, 5))
        query = rows(2, 5)
        assert cache.layers[0].select_blocks(query, 1).tolist() == [1]
        np.testing.assert_array_equal(stored(cache, 0), expected(cache.layers[0]))
        cache.truncate(100)
        cache.extend(rows(2, 180, 2, 5, seed=3), rows(2, 180, 2, 5))
        np.testing.assert_array_equal(stored(cache, 0), expected(cache.layers[0]))
        assert cache.verify().sound
    kvmmap.fork(path, tmp_path / "fork.kvm").close()
    kvmmap.resize(path, 400)
    for file in (path, tmp_path / "fork.kvm"):
        with kvmmap.open(file) as cache:
            assert (Section.KEY_SKETCHES, 0) in cache._storage.superblock.sections
            np.testing.assert_array_equal(stored(cache, 1), expected(cache.layers[1]))
            assert cache.verify().sound


def test_a_reader_of_an_old_file_follows_a_truncation(tmp_path: Path) -> None:
    path = tmp_path / "old.kvm"
    shutil.copy(GOLDEN / "v1.kvm", path)
    with kvmmap.open(path, "a") as writer, kvmmap.open(path) as reader:
        stored(reader, 0)
        writer.truncate(100)
        with pytest.raises(kvmmap.CacheChangedError):
            reader.layers[0].select_blocks(rows(2, 5), 1)
        writer.extend(rows(2, 170, 2, 5, seed=3), rows(2, 170, 2, 5))
        reader.refresh()
        np.testing.assert_array_equal(stored(reader, 0), expected(writer.layers[0]))


def test_verify_recomputes_them(path: Path) -> None:
    make_file(path, 700).close()
    with kvmmap.open(path) as cache:
        superblock = cache._storage.superblock
        assert cache.verify().sound
    sketches, keys = (superblock.sections[kind, 1].offset for kind in (Section.KEY_SKETCHES, SLAB_SECTIONS[0]))
    with path.open("r+b") as file:
        file.seek(sketches + 2 * 2 * 8 * 2 - 1)  # the last byte of block 0's
        file.write(b"\x41")
    with kvmmap.open(path) as cache:
        (damage,) = cache.verify().damages
        assert (damage.layer, damage.start, damage.stop) == (1, 0, 256)
        assert "sketch" in damage.what
        assert [len(piece) for piece in pieces(cache, 2)] == [0, 2]  # it, and what follows, is computed
        np.testing.assert_array_equal(stored(cache, 1), expected(cache.layers[1]))
        np.testing.assert_array_equal(stored(cache, 0), expected(cache.layers[0]))
    with kvmmap.open(path, verify="none") as cache:
        assert [len(piece) for piece in pieces(cache, 2)] == [2]
    with kvmmap.open(path, "a") as cache:
        assert [len(piece) for piece in pieces(cache, 2)] == [0, 2]
    sums = superblock.section(Section.SKETCH_CHECKSUMS).offset
    with path.open("r+b") as file:
        file.seek(sums)
        file.write(b"\0" * 8)
    with kvmmap.open(path) as cache:
        assert [damage.layer for damage in cache.verify().damages] == [0, 1]
        np.testing.assert_array_equal(stored(cache, 0), expected(cache.layers[0]))
    kvmmap.resize(path, 1000)
    with kvmmap.open(path) as cache:
        assert cache.verify().sound
        keys = cache._storage.superblock.sections[SLAB_SECTIONS[0], 1].offset
    with path.open("r+b") as file:
        file.seek(keys)
        file.write(b"\x00\x00\x00\x00")
    with kvmmap.open(path) as cache:  # damaged rows are reported once, and not as a wrong sketch as well
        (damage,) = cache.verify().damages
        assert "checksum" in damage.what


def test_copies_and_forks_compute_those_that_are_damaged(path: Path, tmp_path: Path) -> None:
    """Of two steps of a copy, which threads write side by side, and whose sketches are copied as far as they hold."""
    make_file(path, 9000, capacity=9000).close()
    with kvmmap.open(path) as cache:
        sketches = cache._storage.superblock.sections[Section.KEY_SKETCHES, 1].offset
    with path.open("r+b") as file:
        file.seek(sketches + 2 * 2 * 8 * 2 - 1)
        file.write(b"\x41")
    kvmmap.copy(path, tmp_path / "copy.kvm")
    kvmmap.fork(path, tmp_path / "fork.kvm").close()
    for made in ("copy", "fork"):
        with kvmmap.open(tmp_path / f"{made}.kvm") as cache:
            assert cache.verify().sound
            assert [len(piece) for piece in pieces(cache, 35)] == [35]
            for layer in (0, 1):
                np.testing.assert_array_equal(stored(cache, layer), expected(cache.layers[layer]))


def test_a_file_has_all_of_their_sections_or_none(path: Path) -> None:
    make_file(path, 10).close()
    data = bytearray(path.read_bytes())
    with kvmmap.open(path) as cache:
        superblock = cache._storage.superblock
    at = superblock.size - 8 - 24
    assert struct.unpack_from("<H", data, at)[0] == Section.KEY_SKETCHES
    struct.pack_into("<H", data, at, 99)
    data[superblock.size - 8 : superblock.size] = checksum(bytes(data[: superblock.size - 8])).to_bytes(8, "little")
    path.write_bytes(data)
    with pytest.raises(kvmmap.CorruptCacheError, match="KEY_SKETCHES of layer 1 is missing"):
        kvmmap.open(path)


def test_files_with_unknown_sections_are_read_only(path: Path) -> None:
    make_file(path, 300).close()
    data = bytearray(path.read_bytes())
    with kvmmap.open(path) as cache:
        superblock = cache._storage.superblock
    size = superblock.size
    for at in range(size - 8 - 24 * len(superblock.sections), size - 8, 24):  # section entries: kind, flags, …
        kind, flags = struct.unpack_from("<HH", data, at)
        assert flags == (kind in (Section.KEY_SKETCHES, Section.SKETCH_CHECKSUMS))
        if flags:
            struct.pack_into("<H", data, at, 79 + kind)
    data[size - 8 : size] = checksum(bytes(data[: size - 8])).to_bytes(8, "little")
    path.write_bytes(data)
    assert Superblock.decode(bytes(data[:size]), "f", len(data)).unknown_sections == (87, 99)
    with kvmmap.open(path) as cache:
        assert cache.seq_len == 300
        assert cache.layers[1].select_blocks(rows(2, 8), 1).tolist() == [1]
    with pytest.raises(kvmmap.VersionMismatchError, match="99"):
        kvmmap.open(path, "a")
    assert path.read_bytes() == data
    kvmmap.remove(path)


# Choosing


def pointed(layer_heads: int = 2, dim: int = 16) -> tuple[QuantizedKvLayer, np.ndarray]:
    """A layer of 6 blocks and a tail, where block b of head h holds one key far along axis b + 6 * h."""
    layer = QuantizedKvLayer(2000, layer_heads, dim)
    keys = rows(1600, layer_heads, dim) * np.float32(0.01)
    for block in range(6):
        for head in range(layer_heads):
            keys[block * 256 + 7 * head, head, block] = 5 + head
    layer.extend(keys, keys)
    return layer, keys


def test_blocks_with_the_queried_keys_are_selected() -> None:
    layer, _ = pointed()
    query = np.zeros((4, 16), np.float32)
    query[:2, 1] = 8  # query heads 0 and 1 belong to KV head 0
    query[2:, 4] = 8
    assert layer.select_blocks(query, 3).tolist() == [1, 4, 6]
    assert layer.select_blocks(query, 2, per_head=True).tolist() == [[1, 6], [4, 6]]
    assert layer.select_blocks(query, 1).tolist() == [6]
    for k in (7, 8, 10**9):
        assert layer.select_blocks(query, k).tolist() == list(range(7))
        assert layer.select_blocks(query, k, per_head=True).tolist() == [list(range(7))] * 2
    assert layer.select_blocks(query, 3).dtype == np.int64


def test_no_head_dominates_by_size() -> None:
    layer, _ = pointed()
    query = np.zeros((2, 16), np.float32)
    query[0, 1], query[0, 2], query[1, 4] = 1000, 999, 8
    chosen = layer.select_blocks(query, 3).tolist()
    assert chosen == [1, 4, 6]  # and not 1, 2, which both of one head's bounds put before the other's


def test_attention_over_selected_blocks_covers_nearly_everything(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=1, capacity=2000)
    _, keys = pointed()
    values = rows(1600, 2, 16, seed=4)
    cache.layers[0].extend(keys, values)
    layer = cache.layers[0]
    query = np.zeros((4, 16), np.float32)
    query[:2, 1], query[2:, 4] = 40, 40
    everything = layer.attend(query[None])
    for blocks in (layer.select_blocks(query, 3), layer.select_blocks(query, 2, per_head=True)):
        np.testing.assert_allclose(layer.attend(query[None], positions=blocks), everything, atol=1e-4)
    assert np.abs(layer.attend(query[None], positions=np.array([0, 6])) - everything).max() > 0.1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_queries_of_any_dtype_and_strides(dtype: Any) -> None:
    layer, _ = pointed()
    query = rows(4, 16, seed=8).astype(dtype)
    strided = np.zeros((4, 32), dtype)[:, ::2]
    strided[:] = query
    expected = layer.select_blocks(query.astype(np.float32), 4)
    np.testing.assert_array_equal(layer.select_blocks(query, 4), expected)
    np.testing.assert_array_equal(layer.select_blocks(strided, 4), expected)
    np.testing.assert_array_equal(layer.select_blocks(query, 4, scale=0.25), expected)


def test_invalid_arguments_are_refused() -> None:
    layer, _ = pointed()
    query = rows(4, 16)
    with pytest.raises(kvmmap.EmptyCacheError):
        QuantizedKvLayer(10, 2, 16).select_blocks(query, 1)
    for bad in (rows(3, 16), rows(4, 15), rows(1, 4, 16), rows(16), rows(0, 16)):
        with pytest.raises(kvmmap.ShapeMismatchError):
            layer.select_blocks(bad, 2)
    for k in (0, -1, 1.5, "2", True):
        with pytest.raises(kvmmap.ShapeMismatchError):
            layer.select_blocks(query, k)  # type: ignore[arg-type]
    with pytest.raises(kvmmap.DtypeError):
        layer.select_blocks(query.astype(np.int32), 2)
    query[2, 5] = np.nan
    with pytest.raises(kvmmap.NonFiniteError) as caught:
        layer.select_blocks(query, 2)
    assert caught.value.head == 2
    with pytest.raises(ValueError, match="scale"):
        layer.select_blocks(rows(4, 16), 2, scale=float("inf"))


def test_a_closed_cache_selects_nothing(path: Path) -> None:
    cache = make_file(path, 700)
    cache.close()
    with pytest.raises(kvmmap.ClosedError):
        cache.layers[0].select_blocks(rows(2, 8), 1)
    with pytest.raises(kvmmap.ClosedError):
        cache.layers[0].select_blocks(rows(2, 8), 10)
