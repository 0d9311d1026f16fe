"""What appends a position in one call: every instruction set encodes, keeps and records the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.support import rows

import kvmmap
from kvmmap import _core, encoding
from kvmmap.codecs import COMPILED
from kvmmap.geometry import LayerGeometry
from kvmmap.recent import RecentRing, RecentRows
from kvmmap.rows import Rows

LARGEST = np.nextafter(np.float32(65520), np.float32(0))
"""The largest number that f16 does not round to infinity."""


def geometry_of(heads: int, dim: int, value_dim: int, keys: str = "int8", values: str = "int8") -> LayerGeometry:
    made = kvmmap.QuantizedKvLayer(1, heads, dim, value_head_dim=value_dim, key_codec=keys, value_codec=values)
    return made.geometry


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 5), (24, 64), (128, 33)])
def test_records_of_many_positions_are_those_of_each(kernel: str, heads: int, dim: int, value_dim: int) -> None:
    layer = geometry_of(heads, dim, value_dim)
    ring, count = RecentRing(layer, 50), 40
    rings = _core.RecentRings(ring.parts, RecentRing(layer, 0).parts)
    keys, values = rows(count, heads, dim), rows(count, heads, value_dim, seed=1)
    rings.keep(5, keys, 0, values, 0)
    ring.tags[[7, 30]] = 0  # not held: their records are empty
    coded = Rows.empty(layer, count)
    assert encoding.pair_encoder(layer)(keys, 0, values, 0, coded, None, 5) == -1
    kept = RecentRows(50, ring, RecentRing(layer, 0))
    together = kept.records(ring, coded, 5, 5, 5 + count)
    apart = [kept.records(ring, coded, 5, position, position + 1)[0] for position in range(5, 5 + count)]
    np.testing.assert_array_equal(together, apart)
    assert not together[2].any()
    assert together[3].any()


@pytest.mark.parametrize("dim", [1, 16, 31, 40, 96])
def test_a_number_beyond_f16_is_found_wherever_it_is(kernel: str, dim: int) -> None:
    layer = geometry_of(1, dim, dim)
    ring = RecentRing(layer, 1)
    rings = _core.RecentRings(ring.parts, RecentRing(layer, 0).parts)
    usual = rows(1, 1, dim)
    for at in range(dim):
        for number, form in ((LARGEST, 1), (-LARGEST, 1), (65520, 2), (-65520, 2), (3e38, 2), (3.4e38, 0)):
            keys = usual.copy()
            keys[0, 0, at] = number
            rings.keep(at, keys, 0, usual, 0)
            tag = int(ring.tags[0])
            assert tag >> 40 & 255 == form, (at, number)
            if form == 1:
                np.testing.assert_array_equal(ring.keys[0].view(np.float16), keys[0].astype(np.float16))
            if form:
                assert tag >> 48 == 1
                np.testing.assert_array_equal(ring.values[0].view(np.float16), usual[0].astype(np.float16))


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_one_call_encodes_what_the_codecs_do(kernel: str, monkeypatch: pytest.MonkeyPatch, dtype: Any) -> None:
    """Keys and values of each codec, strided and of one position, with and without rings."""
    codecs = [codec.name for codec in COMPILED]
    number = 0 if dtype is np.float32 else 1
    for keys, values in zip(codecs, [*codecs[3:], *codecs[:3]], strict=True):
        layer = geometry_of(3, 48, 64, keys, values)
        x, y = rows(4, 6, 48).astype(dtype)[:, ::2], rows(4, 3, 64, seed=1).astype(dtype)
        found = []
        for compiled in (COMPILED, ()):
            monkeypatch.setattr(encoding, "COMPILED", compiled)
            encode = encoding.pair_encoder(layer)
            kept = RecentRows(8, RecentRing(layer, 8), RecentRing(layer, 2))
            many, one = Rows.allocate(layer, 4), Rows.allocate(layer, 1)
            assert encode(x, number, y, number, many, kept.rings, 0) == -1
            assert encode(x[2], number, y[2], number, one, kept.rings, 4) == -1
            assert all(np.array_equal(a[2:3], b) for a, b in zip(many, one, strict=True))
            found.append([*many, *kept.ring.parts, *kept.first.parts])
        for mine, theirs in zip(*found, strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("compiled", [True, False])
def test_a_refused_position_is_not_kept(monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    if not compiled:
        monkeypatch.setattr(encoding, "COMPILED", ())
    layer = kvmmap.QuantizedKvLayer(100, 2, 16, recent_window=4, sinks=1)
    x = rows(9, 2, 16)
    for row in x:
        layer.push(row, row)
    query = rows(1, 2, 16, seed=3)
    before = layer.attend(query)
    bad = x[0].copy()
    bad[1, 3] = np.nan
    for keys, values, name in ((bad, x[0], "keys"), (x[0], bad, "values")):
        with pytest.raises(kvmmap.NonFiniteError, match=f"{name}.*head 1"):
            layer.push(keys, values)
    np.testing.assert_array_equal(layer.attend(query), before)
    assert len(layer) == 9
