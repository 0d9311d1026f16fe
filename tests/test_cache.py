"""A whole cache: steps, all or nothing over the layers, token ids, metadata; over each storage."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.support import MakeCache, fill, rows
from ml_dtypes import bfloat16

import kvmmap


def test_push_step(make_cache: MakeCache) -> None:
    cache = make_cache(3, 10, 2, 16)
    keys, values = rows(3, 2, 16), rows(3, 2, 16, seed=1)
    cache.push_step(keys, values, 42)
    assert cache.seq_len == len(cache) == 1
    assert cache.token_ids.tolist() == [42]
    for layer in range(3):
        codes, scales = kvmmap.quantize_rows(keys[layer])
        np.testing.assert_array_equal(cache.layers[layer].get_keys_at(0), kvmmap.dequantize_rows(codes, scales))
        np.testing.assert_array_equal(cache.get_key(layer, 0, 1), cache.layers[layer].get_key(0, 1))
        np.testing.assert_array_equal(cache.get_value(layer, 0, 0), cache.layers[layer].get_value(0, 0))
    cache._check()


def test_extend_equals_steps(make_cache: MakeCache) -> None:
    one, two = make_cache(3), make_cache(3)
    keys, values = rows(3, 40, 2, 16), rows(3, 40, 2, 16, seed=1)
    one.extend(keys, values, range(40))
    for position in range(40):
        two.push_step(keys[:, position], values[:, position], position)
    for a, b in zip(one.layers, two.layers, strict=True):
        np.testing.assert_array_equal(a.key_codes, b.key_codes)
        np.testing.assert_array_equal(a.value_scales, b.value_scales)
    np.testing.assert_array_equal(one.token_ids, two.token_ids)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
def test_narrow_input(make_cache: MakeCache, dtype: type) -> None:
    one, two = make_cache(3), make_cache(3)
    keys, values = rows(3, 40, 2, 16).astype(dtype), rows(3, 40, 2, 16, seed=1).astype(dtype)
    one.extend(keys, values)
    for position in range(40):
        two.push_step(keys[:, position], list(values[:, position]))
    for layer in range(3):
        codes, scales = kvmmap.quantize_rows(keys[layer])
        for cache in (one, two):
            np.testing.assert_array_equal(cache.layers[layer].key_codes, codes)
            np.testing.assert_array_equal(cache.layers[layer].key_scales, scales)
        np.testing.assert_array_equal(one.layers[layer].value_codes, two.layers[layer].value_codes)


def test_dimensions(make_cache: MakeCache) -> None:
    cache = make_cache(3, 100, 4, 128)
    assert (cache.num_layers, cache.capacity, cache.seq_len) == (3, 100, 0)
    assert cache.memory_bytes == 3 * cache.layers[0].memory_bytes
    assert cache.fp32_memory_bytes == 3 * 2 * 100 * 4 * 128 * 4
    assert cache.compression_ratio == pytest.approx(3.8788, abs=1e-4)


def test_capacity_zero(make_cache: MakeCache) -> None:
    cache = make_cache(2, 0)
    assert cache.compression_ratio == 1.0
    with pytest.raises(kvmmap.CapacityExceededError):
        cache.push_step(rows(2, 2, 16), rows(2, 2, 16))
    assert cache.layers[0].key_codes.shape == (0, 2, 16)
    cache.flush()
    assert cache.verify().sound


def test_layers_may_differ(make_cache: MakeCache) -> None:
    cache = make_cache(2, 50, [2, 4], [16, 8], value_head_dim=[16, 12])
    keys, values = [rows(10, 2, 16), rows(10, 4, 8)], [rows(10, 2, 16), rows(10, 4, 12)]
    cache.extend(keys, values)
    cache.push_step([k[0] for k in keys], [v[0] for v in values])
    assert cache.layers[1].read_values().shape == (11, 4, 12)
    with pytest.raises(kvmmap.ShapeMismatchError, match="layer 1"):
        cache.push_step(rows(2, 2, 16), rows(2, 2, 16))
    assert cache.seq_len == 11
    with pytest.raises(kvmmap.ShapeMismatchError, match="3 entries for 2 layers"):
        make_cache(2, 50, [2, 4, 4])


def test_all_or_nothing_over_layers(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    fill(cache, 5)
    keys = rows(3, 4, 2, 16)
    keys[2, 3, 1, 0] = np.nan
    with pytest.raises(kvmmap.NonFiniteError, match=r"position 8, head 1 \(layer 2\)"):
        cache.extend(keys, rows(3, 4, 2, 16))
    with pytest.raises(kvmmap.NonFiniteError):
        cache.push_step(keys[:, 3], rows(3, 2, 16))
    assert [len(layer) for layer in cache.layers] == [5, 5, 5]
    with pytest.raises(kvmmap.CapacityExceededError):
        cache.extend(rows(3, 596, 2, 16), rows(3, 596, 2, 16))
    for shape in ((2, 4, 2, 16), (3, 2, 16), (3, 4, 2, 15)):
        with pytest.raises(kvmmap.ShapeMismatchError):
            cache.extend(rows(*shape), rows(*shape))
    with pytest.raises(kvmmap.ShapeMismatchError, match="layer 1 has 3 positions"):
        cache.extend([rows(4, 2, 16), rows(3, 2, 16), rows(4, 2, 16)], [rows(4, 2, 16), rows(3, 2, 16), rows(4, 2, 16)])
    assert [len(layer) for layer in cache.layers] == [5, 5, 5]
    assert cache.token_ids.tolist() == [0, 1, 2, 3, 4]


def test_a_step_that_reached_some_layers(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    fill(cache, 5)
    cache.layers[0].push(rows(2, 16), rows(2, 16))
    assert cache.seq_len == 5
    assert len(cache.layers[0]) == 6
    with pytest.raises(kvmmap.ShapeMismatchError, match="not level: they hold 5 to 6"):
        cache.push_step(rows(3, 2, 16), rows(3, 2, 16))
    with pytest.raises(kvmmap.PositionOutOfRangeError, match="complete in every layer"):
        cache.get_key(0, 5, 0)
    for layer in cache.layers[1:]:
        layer.push(rows(2, 16), rows(2, 16))
    assert cache.seq_len == 6
    assert cache.token_ids.tolist() == [0, 1, 2, 3, 4, -1]
    cache.layers[0].push(rows(2, 16), rows(2, 16))
    cache.truncate(cache.seq_len)
    assert [len(layer) for layer in cache.layers] == [6, 6, 6]


def test_layers_out_of_range(make_cache: MakeCache) -> None:
    cache = make_cache(3)
    for layer in (-1, 3):
        with pytest.raises(kvmmap.LayerOutOfRangeError, match="there are 3") as caught:
            cache.layers[layer]
        assert caught.value.layer == layer
        assert isinstance(caught.value, IndexError)
        with pytest.raises(kvmmap.LayerOutOfRangeError):
            cache.get_key(layer, 0, 0)
    assert len(list(cache.layers)) == len(cache.layers[:]) == 3


def test_token_ids(make_cache: MakeCache) -> None:
    cache = make_cache(2)
    cache.extend(rows(2, 3, 2, 16), rows(2, 3, 2, 16))
    cache.extend(rows(2, 2, 2, 16), rows(2, 2, 2, 16), np.array([7, 8], np.uint16))
    assert cache.token_ids.tolist() == [-1, -1, -1, 7, 8]
    cache.push_step(rows(2, 2, 16), rows(2, 2, 16))
    assert cache.token_ids.tolist() == [-1, -1, -1, 7, 8, -1]
    assert cache.token_len == 5
    cache.push_token_ids([9, 10])
    assert cache.token_ids.tolist() == [-1, -1, -1, 7, 8, 9]
    cache.push_step(rows(2, 2, 16), rows(2, 2, 16))
    assert cache.token_ids.tolist()[-1] == 10
    cache.truncate(4)
    assert cache.token_ids.tolist() == [-1, -1, -1, 7]
    assert cache.token_ids.dtype == np.int32
    for bad in ([1, 2], [-1], [2**31], [[1]]):
        with pytest.raises(kvmmap.ShapeMismatchError):
            cache.extend(rows(2, 1, 2, 16), rows(2, 1, 2, 16), bad)
    with pytest.raises(kvmmap.DtypeError):
        cache.extend(rows(2, 1, 2, 16), rows(2, 1, 2, 16), [1.5])
    with pytest.raises(kvmmap.CapacityExceededError):
        cache.push_token_ids(range(597))
    cache.extend(rows(2, 4, 2, 16), rows(2, 4, 2, 16))
    with pytest.raises(kvmmap.PositionOutOfRangeError, match="position 3 has its token id already"):
        cache.push_token_ids([1], 3)
    cache.push_token_ids([5, 6], 6)
    assert cache.token_ids.tolist() == [-1, -1, -1, 7, -1, -1, 5, 6]
    with pytest.raises(kvmmap.CapacityExceededError):
        cache.push_token_ids([1], 600)
    assert cache.seq_len == 8


def test_metadata(make_cache: MakeCache) -> None:
    notes = {"prompt": "héllo", "n": [1, 2.5, None, True], "deep": {"a": {}}}
    model = kvmmap.ModelInfo(name="m", revision="r", fingerprint="f", source_dtype="bfloat16", rope={"theta": 1e4})
    cache = make_cache(1, metadata=notes, model=model)
    assert cache.metadata == notes
    assert cache.model == model
    cache.metadata["prompt"] = "changed"
    assert cache.metadata == notes
    cache.metadata = {"other": 1}
    assert cache.metadata == {"other": 1}
    assert cache.model == model
    cache.model = None
    assert cache.model is None
    for bad in ({"a": float("nan")}, {"a": object()}, {1: 2}, {"a": {1: 2}}, [1], {"a": np.float32(1)}):
        with pytest.raises(kvmmap.MetadataError):
            cache.metadata = bad  # type: ignore[assignment]
        with pytest.raises(kvmmap.MetadataError):
            make_cache(1, metadata=bad)
    assert cache.metadata == {"other": 1}
    deep: dict[str, object] = {}
    for _ in range(99):
        deep = {"deeper": deep}
    cache.metadata = deep
    assert cache.metadata == deep
    with pytest.raises(kvmmap.MetadataError, match="nested more than 100 deep"):
        cache.metadata = {"one": {"too": deep}}
    with pytest.raises(kvmmap.MetadataError, match="the model's name is int"):
        cache.model = kvmmap.ModelInfo(name=5)  # type: ignore[arg-type]
    assert cache.metadata == deep
    cyclic: dict[str, object] = {}
    cyclic["self"] = cyclic
    with pytest.raises(kvmmap.MetadataError):
        cache.metadata = cyclic


def test_truncate(make_cache: MakeCache) -> None:
    cache = make_cache(2)
    fill(cache, 300)
    for bad in (-1, 301):
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.truncate(bad)
    cache.truncate(300)
    cache.truncate(257)
    assert cache.seq_len == 257
    other = rows(2, 2, 16, seed=99)
    cache.push_step(other, other, 5)
    assert cache.seq_len == 258
    codes, scales = kvmmap.quantize_rows(other[1])
    np.testing.assert_array_equal(cache.layers[1].get_keys_at(257), kvmmap.dequantize_rows(codes, scales))
    cache.truncate(0)
    assert (cache.seq_len, cache.token_ids.size) == (0, 0)


def test_closed(make_cache: MakeCache) -> None:
    cache = make_cache(2)
    fill(cache, 5)
    layer, view = cache.layers[0], cache.layers[0].key_codes
    kept = view.copy()
    with cache:
        pass
    assert cache.closed
    cache.close()
    np.testing.assert_array_equal(view, kept)
    for use in (
        lambda: cache.push_step(rows(2, 2, 16), rows(2, 2, 16)),
        lambda: layer.push(rows(2, 16), rows(2, 16)),
        lambda: layer.key_codes,
        lambda: layer.get_key(0, 0),
        lambda: layer.read_values(),
        lambda: cache.token_ids,
        lambda: cache.metadata,
        cache.flush,
        cache.refresh,
        cache.verify,
        lambda: cache.truncate(0),
        lambda: cache.push_token_ids([1]),
        cache.facts,
    ):
        with pytest.raises(kvmmap.ClosedError):
            use()
    assert "closed" in repr(cache)


def test_sizes_do_not_depend_on_length(make_cache: MakeCache) -> None:
    cache = make_cache(2)
    before = cache.memory_bytes
    fill(cache, 100)
    assert cache.memory_bytes == before
    assert "100/600" in repr(cache)


def test_dimensions_of_every_layer(tmp_path):
    same = kvmmap.QuantizedKvCache(num_layers=3, capacity=4, num_kv_heads=2, head_dim=8, value_head_dim=6)
    assert (same.num_kv_heads, same.head_dim, same.value_head_dim) == (2, 8, 6)
    with kvmmap.create(
        tmp_path / "c.kvm", num_layers=6, capacity=4, num_kv_heads=[4, 4, 2, 4, 2, 2], head_dim=8
    ) as cache:
        assert (cache.head_dim, cache.value_head_dim) == (8, 8)
        with pytest.raises(
            kvmmap.ShapeMismatchError,
            match=r"num_kv_heads: 4 in layers 0-1 and 3; 2 in layers 2 and 4-5; ask .*layers\[i\]\.num_kv_heads",
        ) as caught:
            _ = cache.num_kv_heads
        assert caught.value.actual == {4: (0, 1, 3), 2: (2, 4, 5)}
    many = kvmmap.QuantizedKvCache(num_layers=100, capacity=1, num_kv_heads=1, head_dim=[8, 4] * 50)
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"layers 0, 2, 4, 6, 8, 10, 12 and 43 more"):
        _ = many.head_dim
    with pytest.raises(kvmmap.ShapeMismatchError, match="differ in value_head_dim: 8 in layer 0; 4 in layer 1;"):
        _ = kvmmap.QuantizedKvCache(
            num_layers=2, capacity=1, num_kv_heads=1, head_dim=8, value_head_dim=[8, 4]
        ).value_head_dim
