"""One layer on its own: appending, reading, views, and every error; over each storage."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.support import MakeCache, rows
from ml_dtypes import bfloat16

import kvmmap
from kvmmap import QuantizedKvLayer


def test_push_and_get() -> None:
    layer = QuantizedKvLayer(4, 2, 8)
    keys, values = rows(2, 8), rows(2, 8, seed=1)
    layer.push(keys, values)
    layer.push(keys.ravel(), values.ravel())
    assert len(layer) == 2
    codes, scales = kvmmap.quantize_rows(keys)
    for position in range(2):
        np.testing.assert_array_equal(layer.get_keys_at(position), kvmmap.dequantize_rows(codes, scales))
        np.testing.assert_array_equal(layer.get_key(position, 1), layer.get_keys_at(position)[1])
        np.testing.assert_array_equal(layer.get_value(position, 1), layer.get_values_at(position)[1])
        assert np.abs(layer.get_values_at(position) - values).max() <= np.abs(values).max() / 254 * 1.001


def test_dimensions() -> None:
    layer = QuantizedKvLayer(10, 4, 128)
    assert (layer.capacity, layer.num_kv_heads, layer.head_dim, layer.value_head_dim) == (10, 4, 128, 128)
    assert layer.memory_bytes == 10 * 4 * 2 * (128 + 4)
    assert layer.fp32_memory_bytes == 2 * 10 * 4 * 128 * 4
    assert layer.compression_ratio == pytest.approx(3.8788, abs=1e-4)
    assert QuantizedKvLayer(0, 4, 128).compression_ratio == 1.0
    wide = QuantizedKvLayer(10, 4, 128, value_head_dim=64)
    assert wide.memory_bytes == 10 * 4 * (128 + 64 + 8)
    assert wide.fp32_memory_bytes == 10 * 4 * (128 + 64) * 4


def test_arrays_in_memory_start_at_cache_lines() -> None:
    for codecs in ({}, {"key_codec": "int5-rotated", "value_codec": "bf16"}):
        for capacity in (1, 17, 3000):
            layer = QuantizedKvLayer(capacity, 3, 64, **codecs)
            layer.extend(rows(1, 3, 64), rows(1, 3, 64))
            for array in layer._store.slabs():
                assert array.ctypes.data % 64 == 0
                assert array.flags.c_contiguous


def test_storage_is_reserved_up_front() -> None:
    import tracemalloc

    layer = QuantizedKvLayer(2000, 4, 64)
    keys = rows(4, 64)
    layer.push(keys, keys)
    tracemalloc.start()
    try:
        for _ in range(100):
            layer.push(keys, keys)
        before = tracemalloc.get_traced_memory()[0]
        for _ in range(1800):
            layer.push(keys, keys)
        assert tracemalloc.get_traced_memory()[0] - before < 2000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_extend_equals_pushes(make_cache: MakeCache, dtype: type) -> None:
    keys, values = rows(300, 2, 16).astype(dtype), rows(300, 2, 16, seed=1).astype(dtype)
    one, two = make_cache(1), make_cache(1)
    one.layers[0].extend(keys, values)
    for key, value in zip(keys, values, strict=True):
        two.layers[0].push(key, value)
    for name in ("key_codes", "key_scales", "value_codes", "value_scales"):
        np.testing.assert_array_equal(getattr(one.layers[0], name), getattr(two.layers[0], name))
    codes, scales = kvmmap.quantize_rows(keys)
    np.testing.assert_array_equal(one.layers[0].key_codes, codes)
    np.testing.assert_array_equal(one.layers[0].key_scales, scales)


def test_extend_accepts_the_layout_of_models(make_cache: MakeCache) -> None:
    """[heads, n, dim] transposed is a view with its last axis contiguous; other strides are copied."""
    layer = make_cache(1).layers[0]
    keys = rows(2, 100, 16)
    layer.extend(keys.transpose(1, 0, 2), keys[:, :, ::-1].transpose(1, 0, 2))
    codes, scales = kvmmap.quantize_rows(np.ascontiguousarray(keys.transpose(1, 0, 2)))
    np.testing.assert_array_equal(layer.key_codes, codes)
    np.testing.assert_array_equal(layer.value_codes, codes[:, :, ::-1])
    np.testing.assert_array_equal(layer.value_scales, scales)


def test_long_input_is_split_without_gaps(make_cache: MakeCache) -> None:
    """A file takes long input in parts; nothing is lost or doubled at their boundaries."""
    keys = rows(3000, 4, 64)
    layer = make_cache(1, 3000, 4, 64).layers[0]
    layer.extend(keys[:1], keys[:1])
    layer.extend(keys[1:], keys[1:])
    codes, scales = kvmmap.quantize_rows(keys)
    np.testing.assert_array_equal(layer.key_codes, codes)
    np.testing.assert_array_equal(layer.value_scales, scales)


def test_value_head_dim(make_cache: MakeCache) -> None:
    layer = make_cache(1, 50, 2, 24, value_head_dim=16).layers[0]
    keys, values = rows(20, 2, 24), rows(20, 2, 16)
    layer.extend(keys, values)
    layer.push(keys[0], values[0])
    assert layer.read_keys().shape == (21, 2, 24)
    assert layer.read_values().shape == (21, 2, 16)
    assert layer.get_value(20, 1).shape == (16,)
    with pytest.raises(kvmmap.ShapeMismatchError):
        layer.push(values[0], values[0])


def test_read(make_cache: MakeCache) -> None:
    layer = make_cache(1).layers[0]
    layer.extend(rows(100, 2, 16), rows(100, 2, 16, seed=1))
    np.testing.assert_array_equal(
        layer.read_keys(10, 20), kvmmap.dequantize_rows(layer.key_codes[10:20], layer.key_scales[10:20])
    )
    out = np.empty((90, 2, 16), np.float32)
    assert layer.read_values(10, out=out) is out
    np.testing.assert_array_equal(out[3], layer.get_values_at(13))
    assert layer.read_keys(5, 5).shape == (0, 2, 16)
    assert layer.read_keys(dtype="float16").dtype == np.float16
    assert layer.read_keys(dtype="bfloat16").dtype == bfloat16
    for start, stop in ((-1, 5), (0, 101), (6, 5), (101, None)):
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            layer.read_keys(start, stop)


def test_views_are_read_only_and_zero_copy(make_cache: MakeCache) -> None:
    layer = make_cache(1).layers[0]
    layer.extend(rows(100, 2, 16), rows(100, 2, 16))
    view = layer.key_codes
    assert view.shape == (100, 2, 16)
    assert not view.flags.writeable
    assert view.base is not None
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    assert np.shares_memory(view, layer.key_codes)


def test_extend_quantized_is_lossless(make_cache: MakeCache) -> None:
    one, two = make_cache(1).layers[0], make_cache(1).layers[0]
    one.extend(rows(300, 2, 16), rows(300, 2, 16, seed=1))
    two.extend_quantized(one.key_codes, one.key_scales, one.value_codes, one.value_scales)
    np.testing.assert_array_equal(one.key_codes, two.key_codes)
    np.testing.assert_array_equal(one.value_scales, two.value_scales)


def test_extend_quantized_refuses_what_the_codec_never_makes(make_cache: MakeCache) -> None:
    layer = make_cache(1).layers[0]
    codes, scales = np.zeros((3, 2, 16), np.int8), np.ones((3, 2), np.float32)
    for bad_codes in (np.full_like(codes, -128),):
        with pytest.raises(kvmmap.NonFiniteError, match="-128"):
            layer.extend_quantized(codes, scales, bad_codes, scales)
    for value in (np.nan, np.inf, 0.0, -1.0, 2.0**-24):
        with pytest.raises(kvmmap.NonFiniteError):
            layer.extend_quantized(codes, np.full_like(scales, value), codes, scales)
    with pytest.raises(kvmmap.DtypeError, match="int8"):
        layer.extend_quantized(codes.astype(np.int16), scales, codes, scales)
    with pytest.raises(kvmmap.ShapeMismatchError):
        layer.extend_quantized(codes, scales[:2], codes, scales)
    assert len(layer) == 0


@pytest.mark.parametrize(
    ("keys", "values"),
    [((2, 15), (2, 16)), ((2, 16), (3, 16)), ((16,), (2, 16)), ((1, 2, 16), (2, 16)), ((2, 16), ())],
)
def test_push_refuses_wrong_shapes(make_cache: MakeCache, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    layer = make_cache(2).layers[1]
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"layer 1") as caught:
        layer.push(np.zeros(keys, np.float32), np.zeros(values, np.float32))
    assert caught.value.layer == 1
    assert caught.value.expected == (2, 16)
    assert isinstance(caught.value, ValueError)
    assert len(layer) == 0


@pytest.mark.parametrize(("keys", "values"), [((5, 2, 15), (5, 2, 16)), ((5, 2, 16), (4, 2, 16)), ((2, 16), (2, 16))])
def test_extend_refuses_wrong_shapes(make_cache: MakeCache, keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    layer = make_cache(1).layers[0]
    with pytest.raises(kvmmap.ShapeMismatchError):
        layer.extend(np.zeros(keys, np.float32), np.zeros(values, np.float32))
    assert len(layer) == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_non_finite_numbers_are_refused_with_their_place(make_cache: MakeCache, bad: float, where: str) -> None:
    layer = make_cache(3, 2000).layers[2]
    good = rows(1500, 2, 16)
    layer.extend(good[:10], good[:10])
    spoiled = good.copy()
    spoiled[1234, 1, 7] = bad
    keys, values = (spoiled, good) if where == "keys" else (good, spoiled)
    with pytest.raises(kvmmap.NonFiniteError, match=f"{where} .*position 1244, head 1 .*layer 2") as caught:
        layer.extend(keys, values)
    assert (caught.value.position, caught.value.head, caught.value.layer) == (1244, 1, 2)
    with pytest.raises(kvmmap.NonFiniteError, match="position 10, head 1"):
        layer.push(keys[1234], values[1234])
    assert len(layer) == 10


def test_capacity(make_cache: MakeCache) -> None:
    layer = make_cache(1, 5).layers[0]
    layer.extend(rows(4, 2, 16), rows(4, 2, 16))
    with pytest.raises(kvmmap.CapacityExceededError, match="capacity is 5") as caught:
        layer.extend(rows(2, 2, 16), rows(2, 2, 16))
    assert (caught.value.capacity, caught.value.position) == (5, 4)
    layer.push(rows(2, 16), rows(2, 16))
    with pytest.raises(kvmmap.CapacityExceededError):
        layer.push(rows(2, 16), rows(2, 16))
    layer.extend(rows(0, 2, 16), rows(0, 2, 16))
    assert len(layer) == 5


def test_positions_and_heads_out_of_range(make_cache: MakeCache) -> None:
    layer = make_cache(1).layers[0]
    layer.push(rows(2, 16), rows(2, 16))
    for position in (-1, 1, 10**12):
        with pytest.raises(kvmmap.PositionOutOfRangeError, match=str(position)) as caught:
            layer.get_key(position, 0)
        assert caught.value.position == position
        assert isinstance(caught.value, IndexError)
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            layer.get_values_at(position)
    for head in (-1, 2):
        with pytest.raises(kvmmap.HeadOutOfRangeError, match="2 KV heads") as raised:
            layer.get_value(0, head)
        assert raised.value.head == head
    with pytest.raises(kvmmap.ShapeMismatchError, match="whole number"):
        layer.get_key(0.5, 0)  # type: ignore[arg-type]
    np.testing.assert_array_equal(layer.get_key(np.int64(0), np.uint8(1)), layer.get_key(0, 1))  # type: ignore[arg-type]


def test_truncate_alone() -> None:
    layer = QuantizedKvLayer(10, 2, 16)
    layer.extend(rows(10, 2, 16), rows(10, 2, 16))
    layer.truncate(3)
    assert len(layer) == 3
    with pytest.raises(kvmmap.PositionOutOfRangeError):
        layer.truncate(4)
    layer.push(rows(2, 16), rows(2, 16))
    assert len(layer) == 4


def test_a_layer_of_a_cache_is_not_truncated_alone(make_cache: MakeCache) -> None:
    with pytest.raises(kvmmap.KvmmapError, match=r"cache\.truncate"):
        make_cache(2).layers[0].truncate(0)


@pytest.mark.parametrize(
    "numbers",
    [(-1, 2, 8), (10, 0, 8), (10, 2, 0), (10, 2, 70000), (2**40, 2, 8), (1.5, 2, 8), ("a", 2, 8), (True, 2, 8)],
)
def test_impossible_geometry(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError):
        QuantizedKvLayer(*numbers)


def test_quantized_rows_are_read_unchanged(make_cache: MakeCache) -> None:
    with make_cache(2, 600) as cache:
        x = rows(2, 550, 2, 16)
        cache.extend(x, -x)
        for start, stop in ((0, None), (3, 3), (250, 513), (549, 550)):
            found = cache.layers[1].read_quantized(start, stop)
            for name in ("key_codes", "key_scales", "value_codes", "value_scales"):
                part = getattr(found, name)
                np.testing.assert_array_equal(part, getattr(cache.layers[1], name)[start:stop])
                assert not part.flags.writeable
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.layers[0].read_quantized(0, 551)
        copy = kvmmap.QuantizedKvLayer(600, 2, 16)
        copy.extend_quantized(*cache.layers[0].read_quantized(10, 300))
        np.testing.assert_array_equal(copy.key_codes, cache.layers[0].key_codes[10:300])
