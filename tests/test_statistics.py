"""Statistics, grids, differences and the file's map, against plain numpy over the whole arrays."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.support import make_file, rows

import kvmmap
from kvmmap import codecs, report
from kvmmap.report import RowStatistics, gathering, tally


def plain_statistics(codes: np.ndarray, scales: np.ndarray) -> dict[str, float]:
    """The same figures from whole arrays, in f64."""
    x = codes.astype(np.float64) * scales[..., None].astype(np.float64)
    rms = np.sqrt((x**2).mean(axis=-1))
    alive = rms > 0
    crest = np.abs(x).max(axis=-1)[alive] / rms[alive]
    _, counts = np.unique(codes, return_counts=True)
    shares = counts / codes.size
    noise = math.sqrt((np.where(alive, scales.astype(np.float64), 0) ** 2).mean() / 12)
    return {
        "rows": scales.size,
        "zero_rows": int((~alive).sum()),
        "crest": float(crest.mean()) if alive.any() else 0.0,
        "outlier_ratio": float((crest > tally.OUTLIER_CREST).sum() / scales.size),
        "saturation": float((np.abs(codes.astype(int)) == 127).mean()),
        "entropy": float(-(shares * np.log2(shares)).sum()),
        "error_bound": float(scales[alive].max() / 2) if alive.any() else 0.0,
        "rms_error": noise,
        "relative_error": noise / math.sqrt((x**2).mean()) if alive.any() else 0.0,
    }


def verify_rows(found: RowStatistics, codes: np.ndarray, scales: np.ndarray) -> None:
    for name, value in plain_statistics(codes, scales).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-5, abs=1e-12), name
    assert found.code_counts == tuple(int((codes == code).sum()) for code in range(-127, 128))
    alive = scales[(codes != 0).any(axis=-1)]
    if not len(alive):
        assert found.scales is None
        return
    told = found.scales
    assert told is not None
    assert (told.smallest, told.largest) == (alive.min(), alive.max())
    assert told.mean == pytest.approx(alive.mean(dtype=np.float64))
    for share, value in ((0.01, told.p01), (0.5, told.median), (0.99, told.p99)):
        exact = np.quantile(alive, share, method="lower")
        assert value == pytest.approx(float(exact), rel=0.008)


def spread_rows(*shape: int) -> np.ndarray:
    """Rows over 20 octaves, with zero rows, an outlier channel and a position that stands out."""
    x = rows(*shape) * np.exp2(rows(*shape[:-1], seed=1) * 3)[..., None].astype(np.float32)
    x[..., 3] *= 50
    x[:, 5] = 0
    x[0, 17] *= 1e4
    return x


@pytest.mark.parametrize("step", [7, 64, 10**6])
def test_statistics_are_those_of_the_whole_arrays(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(gathering, "STEP_NUMBERS", step * 3 * 72)
    cache = kvmmap.QuantizedKvCache(2, 400, 3, 32, 40)
    cache.extend(spread_rows(2, 300, 3, 32), rows(2, 300, 3, 40))
    seen: list[tuple[int, int]] = []
    found = report.statistics(cache, progress=lambda done, total: seen.append((done, total)))
    assert (found.seq_len, [layer.index for layer in found.layers]) == (300, [0, 1])
    stored = 300 * sum(layer.position_bytes for layer in cache.geometry.layers)
    assert seen[-1] == (stored, stored)
    for told, layer in zip(found.layers, cache.layers, strict=True):
        verify_rows(told.keys, layer.key_codes, layer.key_scales)
        verify_rows(told.values, layer.value_codes, layer.value_scales)
    verify_rows(
        found.keys,
        np.concatenate([layer.key_codes for layer in cache.layers]),
        np.concatenate([layer.key_scales for layer in cache.layers]),
    )
    assert json.loads(json.dumps(found.to_dict()))["keys"]["rows"] == 2 * 300 * 3


def test_outliers_are_named() -> None:
    cache = kvmmap.QuantizedKvCache(3, 400, 2, 32)
    keys, values = rows(3, 300, 2, 32), rows(3, 300, 2, 32, seed=1)
    keys[1, :, 1, 7] *= 30
    keys[0, :, 0, 3] *= 9
    values[2, 250, 1] *= 100
    cache.extend(keys, values)
    out = report.statistics(cache).outliers
    assert [(o.layer, o.head, o.channel) for o in out.key_channels] == [(1, 1, 7), (0, 0, 3)]
    assert out.key_channels[0].ratio == pytest.approx(30, rel=0.2)
    assert [(o.layer, o.position, o.head) for o in out.value_positions] == [(2, 250, 1)]
    assert out.value_positions[0].ratio == pytest.approx(100, rel=0.5)
    assert not out.key_positions  # a head that is larger throughout has no position that stands out
    one = report.statistics(cache, [1])
    assert [layer.index for layer in one.layers] == [1]
    assert one.layers[0].keys == report.statistics(cache).layers[1].keys
    assert one.layers[0].keys == one.keys
    with pytest.raises(kvmmap.LayerOutOfRangeError):
        report.statistics(cache, [3])


def test_gaussian_rows_look_like_what_the_docstrings_say() -> None:
    cache = kvmmap.QuantizedKvCache(1, 4000, 2, 128)
    x = rows(1, 4000, 2, 128)
    cache.extend(x, x)
    found = report.statistics(cache).keys
    assert found.crest == pytest.approx(2.8, abs=0.1)
    assert found.outlier_ratio < 1e-3
    error = cache.layers[0].read_keys() - x[0]
    assert found.rms_error == pytest.approx(float(np.sqrt((error.astype(np.float64) ** 2).mean())), rel=0.01)
    assert np.abs(error).max() <= found.error_bound * (1 + 1e-5)


@pytest.mark.parametrize("length", [0, 1])
def test_statistics_of_next_to_nothing(length: int) -> None:
    cache = kvmmap.QuantizedKvCache(1, 4, 1, 4)
    zeros = np.zeros((1, length, 1, 4), np.float32)
    cache.extend(zeros, zeros)
    found = report.statistics(cache)
    assert (found.keys.rows, found.keys.zero_rows, found.keys.scales) == (length, length, None)
    assert found.keys.relative_error == found.keys.entropy == found.keys.error_bound == 0.0
    assert report.compare(cache, cache).same
    assert report.scale_grids(cache, 8)[0].keys.shape == (1, length)


def test_extreme_scales() -> None:
    cache = kvmmap.QuantizedKvCache(1, 4, 1, 4)
    largest = float(np.finfo(np.float32).max)
    x = np.array([[1e-30, 0, 0, 0], [largest, 1, -largest, 0], [1, 1, 1, 1]], np.float32).reshape(1, 3, 1, 4)
    cache.extend(x, x)
    found = report.statistics(cache)
    assert found.keys.zero_rows == 1  # all of its codes are
    assert found.keys.scales is not None
    assert found.keys.scales.largest == pytest.approx(largest / 127)
    assert np.isfinite(found.keys.relative_error)
    assert json.dumps(found.to_dict(), allow_nan=False)


@pytest.mark.parametrize("step", [1, 7, 31, 10**6])
def test_grids_are_means_over_their_bins(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    monkeypatch.setattr(gathering, "STEP_NUMBERS", step * 3 * 32)
    cache = kvmmap.QuantizedKvCache(2, 400, 3, 16)
    cache.extend(spread_rows(2, 301, 3, 16), rows(2, 301, 3, 16))
    grids = report.scale_grids(cache, 10)
    assert [grid.layer for grid in grids] == [0, 1]
    for grid in grids:
        assert grid.keys.shape == grid.values.shape == (3, 10)
        assert (grid.edges[0], grid.edges[-1]) == (0, 301)
        for bin, (start, stop) in enumerate(zip(grid.edges, grid.edges[1:], strict=False)):
            layer = cache.layers[grid.layer]
            np.testing.assert_allclose(grid.keys[:, bin], layer.key_scales[start:stop].mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(grid.values[:, bin], layer.value_scales[start:stop].mean(axis=0), rtol=1e-5)
    fine = report.scale_grids(cache, 1000, [1])[0]
    np.testing.assert_array_equal(fine.keys, cache.layers[1].key_scales.T)


def test_a_cache_and_its_copy_are_the_same(tmp_path: Path) -> None:
    with make_file(tmp_path / "a.kvm", 300) as a, make_file(tmp_path / "b.kvm", 300, capacity=300) as b:
        told = report.compare(a, b)
        assert told.same
        assert told.same_about
        assert (told.lengths, told.compared, told.first, told.first_token) == ((300, 300), 300, None, None)
        b.truncate(290)
        told = report.compare(a, b)
        assert (told.same, told.lengths, told.first) == (False, (300, 290), None)
        b.metadata = {"x": 1}
        assert not report.compare(a, b).same_about


def test_differences_are_placed_and_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering, "STEP_NUMBERS", 100 * 2 * 16)
    a, b = (kvmmap.QuantizedKvCache(3, 500, 2, 8) for _ in "ab")
    keys, values = rows(3, 450, 2, 8), rows(3, 450, 2, 8, seed=1)
    a.extend(keys, values, np.arange(450))
    others = keys.copy()
    others[1, 320, 1] *= 1.5
    others[1, 321, 0, 2] += 3
    changed = values.copy()
    changed[2, 17] = -changed[2, 17]
    b.extend(others, changed, np.where(np.arange(450) == 33, 7, np.arange(450)))
    seen: list[tuple[int, int]] = []
    told = report.compare(a, b, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [layer.first for layer in told.layers] == [None, 320, 17]
    assert (told.first, told.first_token, told.same) == (17, 33, False)
    part = told.layers[1].keys
    mine, theirs = a.layers[1].read_keys().astype(np.float64), b.layers[1].read_keys()
    assert (part.rows, part.different_rows, part.first) == (900, 2, 320)
    assert part.largest == pytest.approx(np.abs(mine - theirs).max())
    assert part.mean == pytest.approx(np.abs(mine - theirs).mean())
    assert part.relative == pytest.approx(np.sqrt(((mine - theirs) ** 2).sum() / (mine**2).sum()))
    assert told.layers[2].values.relative == pytest.approx(2 / math.sqrt(450), rel=0.5)
    assert json.loads(json.dumps(told.to_dict()))["layers"][1]["first"] == 320


def test_unlike_shapes_are_not_compared() -> None:
    a = kvmmap.QuantizedKvCache(2, 5, [2, 1], 8)
    with pytest.raises(kvmmap.ShapeMismatchError, match="2 layers, and 3"):
        report.compare(a, kvmmap.QuantizedKvCache(3, 5, 2, 8))
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"layer 1 has 1 KV heads x 8 .*, and 2 KV heads x 8"):
        report.compare(a, kvmmap.QuantizedKvCache(2, 5, 2, 8))


def test_truncated_rows_are_detected(tmp_path: Path) -> None:
    with make_file(tmp_path / "a.kvm", 600) as writer, kvmmap.open(tmp_path / "a.kvm") as reader:
        writer.truncate(10)
        for look in (
            report.statistics,
            lambda cache: report.scale_grids(cache, 4),
            lambda c: report.compare(c, writer),
        ):
            with pytest.raises(kvmmap.CacheChangedError):
                look(reader)
        reader.refresh()
        assert report.statistics(reader).seq_len == 10


def test_the_map_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    make_file(path, 300, capacity=100_000, head_dim=64).close()
    with kvmmap.open(path) as cache:
        found = report.file_map(cache)
    assert found is not None
    assert found.file_bytes == path.stat().st_size
    names = [(section.name, section.layer) for section in found.sections]
    assert names[:4] == [("superblock", None), ("slot-a", None), ("slot-b", None), ("live", None)]
    assert names[-5:-1] == [("key-codes", 1), ("key-scales", 1), ("value-codes", 1), ("value-scales", 1)]
    assert names[-1] == ("key-sketches", 1)
    end = 0
    for section in found.sections:
        assert section.offset >= end
        end = section.offset + section.bytes
        assert 0 <= section.disk_bytes <= section.bytes
        assert section.about
    assert end <= found.file_bytes
    codes = next(section for section in found.sections if (section.name, section.layer) == ("key-codes", 0))
    assert codes.bytes == 100_000 * 2 * 64
    whole = path.stat().st_blocks * 512 >= path.stat().st_size
    assert whole or 300 * 2 * 64 <= codes.disk_bytes < 20 * 300 * 2 * 64
    held = sum(size for _, size in found.data)
    assert held <= found.file_bytes
    assert json.loads(json.dumps(found.to_dict()))["sections"][0]["name"] == "superblock"
    assert report.file_map(kvmmap.QuantizedKvCache(1, 1, 1, 1)) is None


def test_the_public_names_are_all_there() -> None:
    for name in report.__all__:
        assert getattr(report, name).__doc__
        assert name in dir(report)
    with pytest.raises(AttributeError):
        _ = report.nothing


@pytest.mark.parametrize("name", codecs.names())
def test_caches_of_two_codecs_are_compared_by_their_numbers(tmp_path: Path, name: str) -> None:
    keys, values = rows(300, 1, 64), rows(300, 1, 64, seed=1)
    with kvmmap.create(
        tmp_path / "a.kvm", num_layers=1, capacity=300, num_kv_heads=1, head_dim=64, key_codec="f32", value_codec="f32"
    ) as a:
        a.extend([keys], [values])
        kvmmap.copy(a, tmp_path / "b.kvm", key_codec=name)
        with kvmmap.open(tmp_path / "b.kvm") as b:
            told = report.compare(a, b)
            off = np.abs(b.layers[0].read_keys().astype(np.float64) - keys)
    (layer,) = told.layers
    assert told.same == (not off.any()) == (name == "f32")
    assert layer.keys.different_rows == off.any(axis=-1).sum()
    assert layer.keys.largest == off.max()
    assert layer.keys.mean == pytest.approx(off.mean())
    assert layer.keys.relative == pytest.approx(np.sqrt((off**2).sum() / (keys.astype(np.float64) ** 2).sum()))
    assert layer.values.different_rows == 0
