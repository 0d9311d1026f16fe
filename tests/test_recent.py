"""The last positions and the first ones in 16 bits beside their coded rows: attention, reading, and every storage."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import recent_oracle
from helpers.support import MakeCache, rows, run_python
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kvmmap
from kvmmap.codecs.presets import preset_recent
from kvmmap.format import Section
from kvmmap.storage.file import recent_records

WINDOW, SINKS = 16, 3
PAIRS = [("int8", "int8"), ("int8-rotated", "int4-rotated"), ("bf16", "int8"), ("fp8-e4m3", "int5-rotated")]


def layer_of(length: int, window: int, sinks: int, keys: str = "int8", values: str = "int8", **more: Any) -> Any:
    """A layer in memory, with the rows that were appended to it one by one and many at a time."""
    shape = {"num_kv_heads": 2, "head_dim": 16} | more
    layer = kvmmap.QuantizedKvLayer(600, **shape, key_codec=keys, value_codec=values, recent_window=window, sinks=sinks)
    appended = (
        rows(length, layer.num_kv_heads, layer.head_dim),
        rows(length, layer.num_kv_heads, layer.value_head_dim, seed=1),
    )
    for position in range(length // 3):
        layer.push(appended[0][position], appended[1][position])
    layer.extend(*(part[length // 3 :] for part in appended))
    return layer, *appended


def holding(layer: Any) -> int:
    kept = layer.recent_rows()
    return 0 if kept is None else kept.num_held(len(layer))


# Attention


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
@pytest.mark.parametrize(("length", "n"), [(2, 2), (40, 1), (300, 7), (130, 130), (17, 40)])
def test_attention_sees_the_last_and_first_rows_in_16_bits(
    kernel: str, pair: tuple[str, str], length: int, n: int
) -> None:
    layer, *_ = layer_of(length, WINDOW, SINKS, *pair)
    queries = rows(n, 4, 16, seed=2)

    def stands(query: int, positions: np.ndarray) -> np.ndarray:
        return (positions > query - WINDOW) & (positions >= length - WINDOW) | (positions < SINKS)

    options: tuple[dict[str, Any], ...] = (
        {"query_start": max(0, length - n)},
        {"query_start": length},
        {"query_start": 0, "window": 10, "sinks": 2},
        {"query_start": max(0, length - n), "window": 40, "softcap": 3.0},
        {"query_start": max(0, length - n), "causal": False},
        {"query_start": max(0, length - n), "positions": (length // 4, length)},
    )
    for more in options:
        expected, expected_lse = recent_oracle.attend(layer, queries, stands, **more)
        for resident in ("keep", "stream"):
            found, lse = layer.attend(queries, return_lse=True, resident=resident, **more)
            np.testing.assert_allclose(found, expected, atol=3e-5)
            np.testing.assert_allclose(lse, expected_lse, atol=3e-5)


def test_attention_by_heads_and_threads() -> None:
    layer, *_ = layer_of(600, 100, 4, "int8-rotated", "int8-rotated", num_kv_heads=3, value_head_dim=40)
    queries = rows(2, 6, 16, seed=3)
    blocks = np.array([[0, 2], [1, 2], [2, 0]])
    one = layer.attend(queries, positions=blocks, threads=1)
    np.testing.assert_allclose(layer.attend(queries, positions=blocks, threads=4), one, atol=1e-5)
    parts = [layer.attend(queries, positions=block, return_lse=True) for block in ((0, 256), (256, 600))]
    merged, _ = kvmmap.merge_attention([part[0] for part in parts], [part[1] for part in parts])
    np.testing.assert_allclose(merged, layer.attend(queries), atol=1e-5)


def test_a_codec_without_a_kernel_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    from kvmmap.attention import kernel

    layer, *_ = layer_of(200, WINDOW, SINKS)
    queries = rows(30, 4, 16, seed=2)
    expected = [layer.attend(queries, **more) for more in ({}, {"causal": False}, {"window": 9, "sinks": 1})]
    monkeypatch.setattr(kernel, "KERNELS", {})
    for found, more in zip(expected, ({}, {"causal": False}, {"window": 9, "sinks": 1}), strict=True):
        np.testing.assert_allclose(layer.attend(queries, **more), found, atol=2e-5)


def test_nearly_all_of_the_loss_of_the_newest_positions_is_gone() -> None:
    """Queries that attend to their neighbours: what the window is for."""
    length, heads, dim = 400, 2, 64
    keys, values = rows(length, heads, dim), rows(length, heads, dim, seed=1)
    found = {}
    for window in (0, 64):
        layer = kvmmap.QuantizedKvLayer(
            length, heads, dim, key_codec="int4-rotated", value_codec="int4-rotated", recent_window=window
        )
        layer.extend(keys, values)
        found[window] = layer.attend(4 * keys[-1:])  # attends to the last position most
    exact = kvmmap.QuantizedKvLayer(length, heads, dim, key_codec="f16", value_codec="f16")
    exact.extend(keys, values)
    expected = exact.attend(4 * keys[-1:])
    errors = {window: np.abs(out - expected).max() for window, out in found.items()}
    assert errors[64] < 0.02 * errors[0]


# Reading


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(0, 60),
    window=st.integers(0, 40),
    sinks=st.integers(0, 40),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    scale=st.sampled_from([1.0, 1e-6, 3e4]),
)
def test_reading_gives_the_best_that_is_stored(length: int, window: int, sinks: int, dtype: Any, scale: float) -> None:
    keys = rows(length, 2, 6) * scale
    keys = (np.clip(keys, -6e4, 6e4) if dtype is np.float16 else keys).astype(dtype)
    layer = kvmmap.QuantizedKvLayer(60, 2, 6, recent_window=window, sinks=sinks)
    layer.extend(keys, keys)
    coded = kvmmap.dequantize_rows(layer.key_codes, layer.key_scales)
    wide = keys.astype(np.float32)
    expected = np.where(recent_oracle.kept(length, window, sinks)[:, None, None], wide, coded)
    if dtype == np.float32:
        expected = recent_oracle.best(coded, wide, window, sinks)
    np.testing.assert_array_equal(layer.read_keys(), expected)
    np.testing.assert_array_equal(layer.read_values(length // 2, length), expected[length // 2 :])
    for position in {0, length // 2, length - 1} & set(range(length)):
        np.testing.assert_array_equal(layer.get_keys_at(position), expected[position])
        np.testing.assert_array_equal(layer.get_value(position, 1), expected[position, 1])


def test_rows_beyond_f16_are_kept_as_bfloat16_and_those_beyond_both_not_at_all() -> None:
    layer = kvmmap.QuantizedKvLayer(10, 1, 2, recent_window=5)
    largest = float(np.finfo(np.float32).max)
    keys = np.array([[[65504.0, 1 / 3]], [[65520.0, 1 / 3]], [[largest, 1 / 3]]], np.float32)
    layer.extend(keys, keys)
    found = layer.read_keys()
    np.testing.assert_array_equal(found[0], recent_oracle.halves(keys[0]))
    np.testing.assert_array_equal(found[1], keys[1].astype(ml_dtypes.bfloat16).astype(np.float32))
    assert holding(layer) == 2
    assert np.isfinite(layer.attend(np.zeros((1, 1, 2), np.float32))).all()


def test_views_of_codes_are_not_affected() -> None:
    with_recent, keys, values = layer_of(100, WINDOW, SINKS)
    plain = kvmmap.QuantizedKvLayer(600, 2, 16)
    plain.extend(keys, values)
    for mine, other in zip(with_recent.read_quantized(), plain.read_quantized(), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("window", [-1, 65_537, 1.5, True, "128"])
def test_a_window_that_makes_no_sense_is_refused(path: Path, window: Any) -> None:
    for arguments in ({"recent_window": window}, {"sinks": window}):
        with pytest.raises(kvmmap.ShapeMismatchError, match=next(iter(arguments))):
            kvmmap.create(path, num_layers=1, capacity=10, num_kv_heads=1, head_dim=8, **arguments)
    assert not path.exists()


# Truncation, and rows that come without


def test_truncating_costs_the_exactness_of_as_many_rows(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=1, recent_window=WINDOW, sinks=SINKS)
    keys = rows(1, 60, 2, 16)
    cache.extend(keys, keys)
    for length in (57, 50, 5, 2):
        before = holding(cache.layers[0])
        cut = cache.seq_len - length
        cache.truncate(length)
        assert holding(cache.layers[0]) >= min(before, length) - cut
        other = rows(1, 3, 2, 16, seed=length)
        cache.extend(other, other)  # and what follows is exact again
        np.testing.assert_array_equal(cache.layers[0].read_keys(length, length + 3), recent_oracle.halves(other[0]))


def test_rows_that_come_coded_have_none(make_cache: MakeCache) -> None:
    cache = make_cache(num_layers=1, recent_window=WINDOW, sinks=SINKS)
    keys = rows(1, 40, 2, 16)
    cache.extend(keys, keys)
    coded = [array.copy() for array in cache.layers[0].read_quantized(10, 20)]
    cache.truncate(30)
    cache.layers[0].extend_quantized(*coded)  # at positions that had other rows in 16 bits before
    expected = kvmmap.dequantize_rows(coded[0], coded[1])
    np.testing.assert_array_equal(cache.layers[0].read_keys(30, 40), expected)
    assert holding(cache.layers[0]) == SINKS + 30 - 24
    if cache.path is not None:
        cache.close()
        with kvmmap.open(cache.path) as again:
            np.testing.assert_array_equal(again.layers[0].read_keys(30, 40), expected)
            assert again.verify().sound


def test_a_step_that_is_refused_changes_nothing(make_cache: MakeCache) -> None:
    cache = make_cache(recent_window=WINDOW, sinks=SINKS)
    keys = rows(3, 40, 2, 16)
    cache.extend(keys, keys)
    before = [layer.read_keys() for layer in cache.layers]
    bad = rows(3, 2, 16)
    bad[2, 1, 3] = np.inf
    with pytest.raises(kvmmap.NonFiniteError):
        cache.push_step(bad, bad)
    for layer, expected in zip(cache.layers, before, strict=True):
        np.testing.assert_array_equal(layer.read_keys(), expected)
        assert holding(layer) == WINDOW + SINKS


# Closing and opening


@pytest.mark.parametrize("suffix", [".kvm", ".zarr"])
@settings(max_examples=12, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from([1, 1, 2, 5, 17, 40, -1, -3, -30]), st.booleans()), min_size=1, max_size=8)
)
@example([(40, True), (1, False), (-1, False)])
def test_a_reopened_cache_continues_as_if_never_closed(
    tmp_path_factory: pytest.TempPathFactory, suffix: str, steps: list[tuple[int, bool]]
) -> None:
    path = tmp_path_factory.mktemp("reopened") / f"cache{suffix}"
    shape = {
        "num_layers": 2,
        "capacity": 400,
        "num_kv_heads": 2,
        "head_dim": 8,
        "recent_window": WINDOW,
        "sinks": SINKS,
    }
    memory = kvmmap.QuantizedKvCache(**shape, value_codec="int4-rotated")
    cache = kvmmap.create(path, **shape, value_codec="int4-rotated")
    query = rows(2, 4, 8, seed=99)
    for number, (step, reopen) in enumerate(steps):
        for each in (cache, memory):
            if step < 0:
                each.truncate(max(0, each.seq_len + step))
            else:
                keys = rows(2, step, 2, 8, seed=number)
                each.extend(keys, -keys)
        if reopen:
            cache.close()
            cache = kvmmap.open(path, "a")
        for mine, other in zip(cache.layers, memory.layers, strict=True):
            np.testing.assert_array_equal(mine.read_keys(), other.read_keys())
            if len(other) and suffix == ".kvm":
                np.testing.assert_array_equal(mine.attend(query), other.attend(query))
    cache.close()
    with kvmmap.open(path) as reader:
        assert reader.verify().sound
        for mine, other in zip(reader.layers, memory.layers, strict=True):
            np.testing.assert_array_equal(mine.read_values(), other.read_values())


@pytest.mark.parametrize("seed", range(8))
def test_pushes_among_other_appends_lose_no_row(path: Path, seed: int) -> None:
    """What a reader finds after a commit is what the writer has, and what a layer in memory has."""
    random = np.random.default_rng(seed)
    shape = {"num_kv_heads": 2, "head_dim": 8, "recent_window": 40, "sinks": SINKS}
    memory = kvmmap.QuantizedKvLayer(1200, **shape)
    with kvmmap.create(path, num_layers=1, capacity=1200, **shape) as cache:
        layers = cache.layers[0], memory
        for step in range(30):
            length, count = len(memory), int(random.choice([1, 2, 7, 16, 33]))
            new = random.standard_normal((count, 2, 8)).astype(np.float32)
            kind = random.choice(["push", "push", "push", "extend", "coded", "truncate", "flush"])
            if kind == "coded" and length > count:
                coded = [array.copy() for array in memory.read_quantized(length - count, length)]
                for layer in layers:
                    layer.extend_quantized(*coded)
            elif kind == "truncate":
                cache.truncate(max(0, length - count))
                memory.truncate(max(0, length - count))
            for layer in layers:
                if kind == "extend":
                    layer.extend(new, -new)
                for row in new if kind == "push" else ():
                    layer.push(row, -row)
            if kind == "flush" or step == 29:
                cache.flush()
                with kvmmap.open(path) as reader:
                    assert holding(reader.layers[0]) == holding(cache.layers[0])
                    np.testing.assert_array_equal(reader.layers[0].read_values(), cache.layers[0].read_values())
        np.testing.assert_array_equal(cache.layers[0].read_keys(), memory.read_keys())


@pytest.mark.parametrize(("many", "more"), [(18, 2), (16, 15), (3, 1), (0, 5)])
def test_pushes_behind_others_that_were_not_saved_yet(
    path: Path, many: int, more: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a multiple of 16 positions all are in the file, without a commit, unless they come in a rush."""
    monkeypatch.setattr(recent_records, "clock", itertools.count().__next__)
    shape = {"num_layers": 1, "capacity": 100, "num_kv_heads": 2, "head_dim": 8}
    new = rows(48, 2, 8)
    with kvmmap.create(path, **shape, recent_window=40, sinks=SINKS) as cache:
        for start, stop in ((0, many), (many, many + more)):
            cache.layers[0].extend(new[start:stop], new[start:stop])
        for row in new[many + more :]:
            cache.layers[0].push(row, row)
        with kvmmap.open(path) as reader:
            assert holding(reader.layers[0]) == holding(cache.layers[0]) == 40 + SINKS
            np.testing.assert_array_equal(reader.layers[0].read_keys(), cache.layers[0].read_keys())


def test_a_process_that_is_killed_leaves_a_few_rows_coded(path: Path) -> None:
    code = """
import itertools, os, sys
import numpy as np, kvmmap
from kvmmap.storage.file import recent_records
recent_records.clock = itertools.count().__next__  # a push is not faster than a model's
cache = kvmmap.create(sys.argv[1], num_layers=1, capacity=400, num_kv_heads=2, head_dim=8, recent_window=64, sinks=4)
for position in range(100):
    row = np.random.default_rng(position).standard_normal((1, 2, 8), np.float32)
    cache.push_step(row, row)
os.kill(os.getpid(), 9)
"""
    assert run_python(code, path, check=False).returncode == -9
    expected = np.stack(
        [np.random.default_rng(position).standard_normal((2, 8), np.float32) for position in range(100)]
    )
    with kvmmap.open(path, "a") as cache:
        assert cache.seq_len == 100
        kept = holding(cache.layers[0])
        assert 64 + 4 - 16 < kept <= 68
        found, exact = cache.layers[0].read_keys(), recent_oracle.halves(expected)
        assert (found == exact).all(axis=(1, 2)).sum() == kept
        np.testing.assert_allclose(found, expected, atol=0.02)


# Records of a file


def recent_file(path: Path, length: int = 100, **more: Any) -> np.ndarray:
    """A closed file of one layer, and the keys in it; values are their negatives."""
    keys = rows(1, length, 2, 5)
    settings = {"num_layers": 1, "capacity": 200, "num_kv_heads": 2, "head_dim": 5} | more
    with kvmmap.create(path, **settings, recent_window=WINDOW, sinks=SINKS) as cache:
        cache.extend(keys, -keys)
    return keys[0]


def records_of(path: Path, kind: Section) -> tuple[int, int]:
    """Return the offset of a section of records, and the size of a record."""
    with kvmmap.open(path) as cache:
        superblock = cache.storage.superblock  # type: ignore[attr-defined]
        return superblock.section(kind, 0).offset, cache.geometry.layers[0].recent_bytes


@pytest.mark.parametrize(("dtype", "form"), [(np.float32, 1), (np.float16, 1), (ml_dtypes.bfloat16, 2)])
def test_records_are_those_of_the_specification(path: Path, dtype: Any, form: int) -> None:
    keys = rows(1, 40, 2, 5).astype(dtype)
    with kvmmap.create(
        path, num_layers=1, capacity=40, num_kv_heads=2, head_dim=5, recent_window=WINDOW, sinks=SINKS
    ) as cache:
        cache.extend(keys, -keys)
    data = path.read_bytes()
    bits = (keys.astype(np.float16) if form == 1 else keys)[0].view(np.uint16)
    with kvmmap.open(path) as cache:
        for kind, positions, slots in (
            (Section.RECENT_ROWS, range(24, 40), WINDOW),
            (Section.SINK_ROWS, range(3), SINKS),
        ):
            offset, size = records_of(path, kind)
            for position in positions:
                at = offset + position % slots * size
                expected = recent_oracle.record(
                    cache.layers[0], position, form, bits[position], bits[position] ^ 0x8000
                )
                assert data[at : at + size] == expected


def test_a_file_without_them_has_the_bytes_that_it_always_had(path: Path, tmp_path: Path) -> None:
    shape = {"num_layers": 2, "capacity": 100, "num_kv_heads": 2, "head_dim": 8}
    kvmmap.create(path, **shape).close()
    kvmmap.create(tmp_path / "none.kvm", **shape, recent_window=0, sinks=0).close()
    with kvmmap.open(path) as one, kvmmap.open(tmp_path / "none.kvm") as other:
        assert one.storage.superblock.sections.keys() == other.storage.superblock.sections.keys()  # type: ignore[attr-defined]
        assert not {kind for kind, _ in one.storage.superblock.sections} & {24, 25}  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", [Section.RECENT_ROWS, Section.SINK_ROWS])
def test_each_flipped_bit_of_a_record_makes_it_the_coded_row(path: Path, kind: Section) -> None:
    keys = recent_file(path)
    offset, size = records_of(path, kind)
    position = 90 if kind is Section.RECENT_ROWS else 1
    at = offset + position % (WINDOW if kind is Section.RECENT_ROWS else SINKS) * size
    whole = path.read_bytes()
    coded = kvmmap.dequantize_rows(*kvmmap.quantize_rows(keys))
    for bit in range(0, 8 * (24 + 2 * 20), 7):
        image = bytearray(whole)
        image[at + bit // 8] ^= 1 << bit % 8
        path.write_bytes(image)
        with kvmmap.open(path) as cache:
            np.testing.assert_array_equal(cache.layers[0].read_keys()[position], coded[position])
            report = cache.verify()
            assert report.sound  # nothing is lost
            (damage,) = report.inexact
            assert (damage.layer, damage.start, damage.stop) == (0, position, position + 1)
            expected = recent_oracle.best(coded, keys, WINDOW, SINKS)
            expected[position] = coded[position]
            np.testing.assert_array_equal(cache.layers[0].read_keys(), expected)


def test_a_record_of_another_row_never_counts(path: Path) -> None:
    """Stale, moved, and of a row that was written again."""
    keys = recent_file(path)
    offset, size = records_of(path, Section.RECENT_ROWS)
    coded = kvmmap.dequantize_rows(*kvmmap.quantize_rows(keys))
    stale = path.read_bytes()[offset : offset + WINDOW * size]
    with kvmmap.open(path, "a") as cache:
        cache.truncate(80)
        other = rows(1, 20, 2, 5, seed=5)
        cache.extend(other, other)
    image = bytearray(path.read_bytes())
    image[offset : offset + WINDOW * size] = stale
    path.write_bytes(image)
    with kvmmap.open(path) as cache:
        expected = kvmmap.dequantize_rows(*kvmmap.quantize_rows(other[0]))
        np.testing.assert_array_equal(cache.layers[0].read_keys(80), expected)
        assert not cache.verify().inexact  # nothing of it is damaged
    moved = bytearray(stale)
    moved[:size], moved[size : 2 * size] = moved[size : 2 * size], moved[:size]
    recent_file(path.with_name("moved.kvm"))
    image = bytearray(path.with_name("moved.kvm").read_bytes())
    image[offset : offset + WINDOW * size] = moved
    path.with_name("moved.kvm").write_bytes(image)
    with kvmmap.open(path.with_name("moved.kvm")) as cache:
        found = cache.layers[0].read_keys()
        for position in (96, 97):  # those of slots 0 and 1
            np.testing.assert_array_equal(found[position], coded[position])


def test_records_that_were_torn_are_emptied_once_the_file_is_closed(path: Path) -> None:
    recent_file(path)
    offset, size = records_of(path, Section.RECENT_ROWS)
    with kvmmap.open(path, "a") as cache:
        cache.extend(rows(1, 1, 2, 5), rows(1, 1, 2, 5))
        cache.flush()
        image = bytearray(path.read_bytes())  # as if power failed now
    image[offset + 3 * size + 30] ^= 1
    torn = path.with_name("torn.kvm")
    torn.write_bytes(image)
    with kvmmap.open(torn, "a"):
        pass
    with kvmmap.open(torn) as cache:
        assert not cache.verify().inexact
        assert holding(cache.layers[0]) == WINDOW + SINKS - 1


def test_the_superblock_is_checked(path: Path) -> None:
    from kvmmap.format import Superblock

    recent_file(path)
    with kvmmap.open(path) as cache:
        superblock = cache.storage.superblock  # type: ignore[attr-defined]
    sections = dict(superblock.sections)
    import dataclasses

    for change in (
        {(24, 0): sections[24, 0]._replace(size=sections[24, 0].size - 1)},
        {(24, 0): sections[24, 0]._replace(size=10)},
        {(25, 0): sections[25, 0]._replace(size=2**20)},
    ):
        broken = dataclasses.replace(superblock, sections=sections | change)
        with pytest.raises(kvmmap.CorruptCacheError):
            Superblock.decode(broken.encode(), "x", superblock.file_bytes)


# Readers beside a writer


def test_a_reader_beside_a_writer_never_sees_a_wrong_row(path: Path) -> None:
    """Every row that it reads is the coded one or that in 16 bits, of what it has refreshed to."""
    shape = {"num_layers": 1, "capacity": 3000, "num_kv_heads": 2, "head_dim": 8}
    keys = rows(2500, 2, 8)
    coded = kvmmap.dequantize_rows(*kvmmap.quantize_rows(keys))
    exact = recent_oracle.halves(keys)
    done = threading.Event()

    def write() -> None:
        with kvmmap.create(path, **shape, recent_window=WINDOW, sinks=SINKS) as cache:
            started.set()
            for position in range(len(keys)):
                cache.push_step(keys[None, position], keys[None, position])
        done.set()

    started = threading.Event()
    writer = threading.Thread(target=write)
    writer.start()
    started.wait()
    looks = 0
    with kvmmap.open(path) as reader:
        while not done.is_set() or not looks:
            reader.refresh()
            length = reader.seq_len
            found = reader.layers[0].read_keys(max(0, length - 2 * WINDOW), length)
            place = slice(max(0, length - 2 * WINDOW), length)
            right = (found == coded[place]).all(axis=(1, 2)) | (found == exact[place]).all(axis=(1, 2))
            assert right.all()
            looks += 1
    writer.join()


def test_threads_that_attend_while_another_appends(make_cache: MakeCache) -> None:
    """Values tell which rows took part: those of a position are its number, in either form."""
    cache = make_cache(num_layers=1, capacity=600, num_kv_heads=1, head_dim=8, recent_window=8)
    wrong: list[float] = []
    done = threading.Event()

    def attend() -> None:
        query = np.zeros((1, 1, 8), np.float32)
        while not done.is_set():
            if len(cache.layers[0]):
                values = cache.layers[0].attend(query)[0, 0]
                wrong.extend(values[np.abs(values - values[0]) > 0.05].tolist())  # a row that is half another

    cache.push_step(np.zeros((1, 1, 8), np.float32), np.ones((1, 1, 8), np.float32))
    threads = [threading.Thread(target=attend) for _ in range(2)]
    for thread in threads:
        thread.start()
    for position in range(400):
        cache.push_step(np.zeros((1, 1, 8), np.float32), np.full((1, 1, 8), position % 64, np.float32))
    done.set()
    for thread in threads:
        thread.join()
    assert not wrong


# Copies of every kind


@pytest.mark.parametrize("suffix", [".kvm", ".zarr"])
def test_copies_have_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"source{suffix}"
    keys = rows(2, 300, 2, 8)
    with kvmmap.create(
        path, num_layers=2, capacity=400, num_kv_heads=2, head_dim=8, preset="tiny", recent_window=WINDOW, sinks=SINKS
    ) as cache:
        cache.extend(keys, -keys)
    with kvmmap.open(path) as source:
        for target in (tmp_path / "copy.kvm", tmp_path / "copy.zarr"):
            kvmmap.copy(path, target)
            with kvmmap.open(target) as found:
                assert found.geometry == source.geometry
                for mine, other in zip(found.layers, source.layers, strict=True):
                    np.testing.assert_array_equal(mine.read_keys(), other.read_keys())
                    assert holding(mine) == WINDOW + SINKS
                assert found.verify().sound
        kvmmap.copy(path, tmp_path / "part.kvm", start=290, stop=298, layers=[1])
        with kvmmap.open(tmp_path / "part.kvm") as found:
            np.testing.assert_array_equal(found.layers[0].read_values(), source.layers[1].read_values(290, 298))
            assert holding(found.layers[0]) == 8


def test_forks_and_files_of_another_capacity_have_them(tmp_path: Path, path: Path) -> None:
    keys = recent_file(path)
    expected = recent_oracle.best(kvmmap.dequantize_rows(*kvmmap.quantize_rows(keys)), keys, WINDOW, SINKS)
    with kvmmap.fork(path, tmp_path / "whole.kvm") as fork:
        np.testing.assert_array_equal(fork.layers[0].read_keys(), expected)
    with kvmmap.open(tmp_path / "whole.kvm") as fork:
        np.testing.assert_array_equal(fork.layers[0].read_keys(), expected)
    with kvmmap.fork(path, tmp_path / "part.kvm", length=95) as fork:
        assert holding(fork.layers[0]) == SINKS + 11
        np.testing.assert_array_equal(fork.layers[0].read_keys(84), expected[84:95])
    kvmmap.compact(path)
    kvmmap.resize(path, 150)
    with kvmmap.open(path) as cache:
        assert cache.geometry.recent_window == WINDOW
        np.testing.assert_array_equal(cache.layers[0].read_keys(), expected)


def test_repair_keeps_what_holds(tmp_path: Path, path: Path) -> None:
    keys = recent_file(path)
    offset, _ = records_of(path, Section.RECENT_ROWS)
    image = bytearray(path.read_bytes())
    image[offset + 40] ^= 1
    path.write_bytes(image)
    report = kvmmap.repair(path, tmp_path / "new.kvm")
    assert report.complete
    with kvmmap.open(tmp_path / "new.kvm") as cache:
        assert holding(cache.layers[0]) == WINDOW + SINKS - 1
        np.testing.assert_array_equal(cache.layers[0].read_keys(99), recent_oracle.halves(keys[99:]))
        assert not cache.verify().inexact


def test_a_program_that_knows_no_such_sections_reads_the_file_and_does_not_write() -> None:
    """By the rule of flag bit 0, which released versions follow for every kind that they do not know."""
    from kvmmap.format.records import OPTIONAL_SECTIONS

    assert {Section.RECENT_ROWS, Section.SINK_ROWS} <= OPTIONAL_SECTIONS


def test_presets_keep_them(tmp_path: Path) -> None:
    expected = {"int8": (0, 0), "lossless": (0, 0), "fidelity": (128, 4)}
    expected |= {"compact": (256, 4), "small": (512, 4), "tiny": (256, 4)}
    for (preset, pair), number in zip(expected.items(), itertools.count(), strict=False):
        path = tmp_path / f"{number}.kvm"
        with kvmmap.create(path, num_layers=1, capacity=10, num_kv_heads=1, head_dim=8, preset=preset) as cache:
            assert (cache.geometry.recent_window, cache.geometry.sinks) == pair
            report = kvmmap.report.inspect(cache)
            assert (report.recent_window, report.sinks) == pair
            assert report.recent_bytes == sum(pair) * 56
    with kvmmap.create(
        tmp_path / "own.kvm", num_layers=1, capacity=10, num_kv_heads=1, head_dim=8, preset="tiny", recent_window=0
    ) as cache:
        assert (cache.geometry.recent_window, cache.geometry.sinks) == (0, 4)


@pytest.mark.parametrize("exact", ["f16", "f32", ["f32", "f16"]])
def test_a_preset_with_codecs_as_exact_keeps_none_unasked(tmp_path: Path, exact: Any) -> None:
    """A window would make rows of f32 less exact, and those of f16 take their place twice."""
    shape: dict[str, Any] = {"num_layers": 2, "capacity": 20, "num_kv_heads": 1, "head_dim": 16}
    both = {"key_codec": exact, "value_codec": exact}

    def kept(cache: kvmmap.QuantizedKvCache) -> tuple[int, int]:
        with cache:
            return cache.geometry.recent_window, cache.geometry.sinks

    for preset in ("fidelity", "tiny"):
        window = preset_recent(preset)
        memory = kvmmap.QuantizedKvCache(2, 20, 1, 16, preset=preset, **both)
        kvmmap.copy(memory, tmp_path / "b.kvm", preset=preset, **both, overwrite=True)
        assert kept(kvmmap.create(tmp_path / "a.kvm", **shape, preset=preset, **both, overwrite=True)) == (0, 0)
        assert kept(kvmmap.open(tmp_path / "b.kvm")) == kept(memory) == (0, 0)
        for more, there in (
            ({"recent_window": 3}, (3, 0)),
            ({"sinks": 2}, (0, 2)),
            ({"key_codec": "int8"}, window),
            ({"value_codec": ["f32", "bf16"]}, window),
        ):
            assert kept(kvmmap.QuantizedKvCache(2, 20, 1, 16, preset=preset, **both | more)) == there
    rows = np.random.default_rng(0).standard_normal((2, 9, 1, 16), dtype=np.float32)
    with kvmmap.create(
        tmp_path / "a.kvm", **shape, preset="tiny", key_codec="f32", value_codec="f32", overwrite=True
    ) as c:
        c.extend(rows, rows)
        assert all(np.array_equal(layer.read_keys(), one) for layer, one in zip(c.layers, rows, strict=True))
