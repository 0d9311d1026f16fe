"""Attention: every kernel against the f64 oracle, over memory and file; what is refused; merging."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import numpy as np
import pytest
from helpers import attention_oracle as oracle
from helpers.support import MakeCache, rows
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

import kvmmap
from kvmmap import QuantizedKvLayer, _core, merge_attention

TOLERANCE = 2e-6  # of the largest number of the output
TOLERANCE_16_BITS = 4e-4  # the same, for queries of f16 and bf16


def filled(
    length: int, heads: int = 2, dim: int = 16, value_dim: int | None = None, *, seed: int = 0, scale: float = 1
) -> QuantizedKvLayer:
    layer = QuantizedKvLayer(max(length, 1), heads, dim, value_dim)
    keys = rows(length, heads, dim, seed=seed) * np.float32(scale)
    layer.extend(keys, rows(length, heads, value_dim or dim, seed=seed + 1) * np.float32(scale))
    return layer


def check(
    layer: QuantizedKvLayer,
    queries: Any,
    *,
    keep: Any = None,
    sizes: bool = False,
    tolerance: float = TOLERANCE,
    **more: Any,
) -> None:
    """Compare with the oracle; with `sizes`, in proportion to what is summed and not to what is left of it."""
    out, lse = layer.attend(queries, return_lse=True, **more)
    more.pop("threads", None)
    more.pop("precision", None)
    more.pop("positions", None)
    expected, expected_lse = oracle.attend(layer, queries, keep=keep, **more)
    size = oracle.attend(layer, queries, keep=keep, sizes=True, **more)[0] if sizes else np.abs(expected)
    assert out.dtype == lse.dtype == np.float32
    assert out.shape == expected.shape
    assert np.abs(out - expected).max(initial=0) <= tolerance * size.max(initial=0)
    seen = np.isfinite(expected_lse)
    assert (np.isneginf(lse) == ~seen).all()
    assert (out[~seen] == 0).all()
    np.testing.assert_allclose(lse[seen], expected_lse[seen], rtol=1e-5, atol=1e-5 if tolerance == TOLERANCE else 1e-4)


@pytest.mark.parametrize("length", [1, 2, 15, 16, 63, 64, 65, 127, 128, 255, 256, 257, 4095, 4096, 4097, 9000])
def test_lengths_around_edges(kernel: str, length: int) -> None:
    check(filled(length), rows(1, 4, 16, seed=9))


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 8, 16])
@pytest.mark.parametrize("heads", [1, 3, 8])
def test_query_heads_share_kv_heads(kernel: str, heads: int, group: int) -> None:
    check(filled(130, heads, 32), rows(2, heads * group, 32, seed=9))


@pytest.mark.parametrize("dim", [1, 3, 15, 16, 17, 63, 64, 65, 80, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("value_dim", [None, 1, 40, 128, 512])
def test_head_dims(kernel: str, dim: int, value_dim: int | None) -> None:
    check(filled(100, 2, dim, value_dim), rows(2, 4, dim, seed=9))


@pytest.mark.parametrize(
    "more",
    [
        {"causal": False},
        {"query_start": 0},
        {"query_start": 95},
        {"query_start": 300},
        {"query_start": 5000},
        {"window": 1},
        {"window": 70},
        {"window": 70, "sinks": 4},
        {"window": 10, "sinks": 250},
        {"window": 64, "causal": False},
        {"window": 10, "query_start": 400},
        {"window": 10, "query_start": 400, "sinks": 2},
        {"scale": 0.3},
        {"scale": -1.0},
        {"scale": 0.0},
        {"softcap": 2.0},
        {"softcap": 50.0, "window": 100},
    ],
    ids=str,
)
@pytest.mark.parametrize("n", [1, 7, 70])
@pytest.mark.parametrize("threads", [1, 3])
def test_masks_and_windows(kernel: str, n: int, more: dict[str, Any], threads: int) -> None:
    check(filled(300, 2, 16), rows(n, 6, 16, seed=9), threads=threads, **more)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 40])
def test_threads_change_nothing_but_rounding(kernel: str, threads: int, n: int) -> None:
    layer = filled(5000, 2, 64)
    check(layer, rows(n, 8, 64, seed=9), threads=threads)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", _core.available_kernels())
def test_any_shape(name: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 400), "length")
    heads = data.draw(st.integers(1, 4), "heads")
    dim = data.draw(st.integers(1, 140), "dim")
    value_dim = data.draw(st.integers(1, 140), "value_dim")
    n = data.draw(st.integers(1, 9), "n")
    group = data.draw(st.integers(1, 5), "group")
    more = {
        "causal": data.draw(st.booleans(), "causal"),
        "query_start": data.draw(st.none() | st.integers(0, 500), "query_start"),
        "window": data.draw(st.none() | st.integers(1, 500), "window"),
        "sinks": data.draw(st.integers(0, 20), "sinks"),
        "softcap": data.draw(st.none() | st.floats(0.5, 100, width=32), "softcap"),
        "threads": data.draw(st.integers(1, 3), "threads"),
    }
    before = _core.current_kernel()
    _core.use_kernel(name)
    try:
        seed = data.draw(st.integers(0, 1000), "seed")
        check(
            filled(length, heads, dim, value_dim, seed=seed),
            rows(n, heads * group, dim, seed=seed + 5),
            sizes=True,
            **more,
        )
    finally:
        _core.use_kernel(before)


@pytest.mark.parametrize("scale", [1e-38, 1e-30, 1e-10, 1e-3, 1e3, 1e10])
def test_huge_and_tiny_numbers(kernel: str, scale: float) -> None:
    # Queries are scaled the other way, so that scores stay where a softmax says something.
    layer = filled(200, 2, 32, scale=scale)
    scores = np.abs(layer.read_keys()).max() or 1
    check(layer, rows(2, 4, 32, seed=9), scale=float(0.5 / scores))


def test_values_near_the_end_of_f32(kernel: str) -> None:
    layer = QuantizedKvLayer(300, 1, 8)
    layer.extend(rows(300, 1, 8), np.full((300, 1, 8), 3e38, np.float32))
    assert np.isfinite(layer.attend(rows(1, 1, 8))).all()
    check(layer, rows(1, 1, 8))


def test_scores_beyond_f32_give_numbers(kernel: str) -> None:
    layer = filled(100, 1, 8, scale=1e30)
    out, lse = layer.attend(rows(2, 1, 8) * np.float32(1e30), return_lse=True)
    assert np.isfinite(out).all()
    assert np.isfinite(lse).all()


@pytest.mark.parametrize(
    ("codec", "largest"),
    [("int8", 3e38), ("int4-rotated", 1e6), ("bf16", 3e38), ("f16", 6e4), ("f32", 3e38)],
)
def test_extremes_of_rows_and_queries(kernel: str, codec: str, largest: float) -> None:
    # Scores may be beyond f32, but the result is an average of values, of which none is below half of the largest.
    signs = np.sign(rows(300, 2, 64)) * np.float32(0.9)
    for key_size, value_size, length in [(largest, 1, 40), (1, largest, 300), (largest, largest, 300), (1e-38, 1, 40)]:
        layer = QuantizedKvLayer(length, 2, 64, key_codec=codec, value_codec=codec)
        values = np.linspace(0.5, 1, length * 128, dtype=np.float32).reshape(length, 2, 64)
        layer.extend(signs[:length] * np.float32(key_size), values * np.float32(value_size))
        stored = layer.read_values()
        # Rotating a query adds its numbers up.
        for size in (1e-38, 1, 1e30, 1e36 if "rotated" in codec else 3e38):
            for n, group in ((1, 1), (1, 4), (9, 2)):
                queries = np.sign(rows(n, 2 * group, 64, seed=n)) * np.float32(size)
                for these in (queries, queries.astype(bfloat16)):
                    out = layer.attend(these, causal=False)
                    assert np.isfinite(out).all(), (key_size, value_size, size, n, group, these.dtype)
                    assert out.min() >= stored.min() * 0.99
                    assert out.max() / 1.01 <= stored.max()


def test_one_key_far_above_all_others(kernel: str) -> None:
    # An attention sink: its value is small, and what the others add must not be lost beside its weight.
    layer = QuantizedKvLayer(3000, 1, 32)
    keys, values = rows(3000, 1, 32), rows(3000, 1, 32, seed=1)
    queries = rows(1, 1, 32, seed=2)
    keys[0] = queries[0] * 3
    values[0] = 1e-4
    layer.extend(keys, values)
    check(layer, queries)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_dtypes_and_strides_of_queries(kernel: str, dtype: Any) -> None:
    layer = filled(100, 2, 16)
    queries = rows(4, 3, 16, seed=9).astype(dtype).swapaxes(0, 1)
    assert not queries.flags.c_contiguous
    for given_queries in (queries, np.concatenate([queries, queries[:, :2]], axis=1)[:, ::-1][:, :6]):
        check(layer, given_queries, precision="exact")
        if dtype is np.float32:
            check(layer, given_queries)
        else:
            check(layer, given_queries, tolerance=TOLERANCE_16_BITS)


@pytest.mark.parametrize("dtype", [np.float16, bfloat16])
@pytest.mark.parametrize("codec", ["int8", "int8-rotated"])
def test_precision_follows_the_dtype_of_queries(kernel: str, codec: str, dtype: Any) -> None:
    for length, dim, group, n in [(700, 128, 1, 1), (700, 64, 4, 2), (300, 80, 8, 1), (600, 128, 8, 3)]:
        layer = QuantizedKvLayer(length, 2, dim, key_codec=codec, value_codec=codec)
        layer.extend(rows(length, 2, dim), rows(length, 2, dim, seed=1))
        queries = rows(n, 2 * group, dim, seed=9).astype(dtype)
        check(layer, queries, precision="exact")
        check(layer, queries, tolerance=TOLERANCE_16_BITS)
        # f32 queries are never computed with less, whatever they were made of.
        check(layer, queries.astype(np.float32))


def test_16_bit_queries_lose_less_than_torch_does(kernel: str) -> None:
    torch = pytest.importorskip("torch")
    layer = filled(2000, 2, 64)
    queries = rows(1, 8, 64, seed=9).astype(bfloat16)
    expected, _ = oracle.attend(layer, queries)
    keys, values = (
        torch.from_numpy(np.ascontiguousarray(x.swapaxes(0, 1)))[None].bfloat16()
        for x in (layer.read_keys(), layer.read_values())
    )
    theirs = torch.from_numpy(np.ascontiguousarray(queries.astype(np.float32).swapaxes(0, 1)))[None].bfloat16()
    out = torch.nn.functional.scaled_dot_product_attention(theirs, keys, values, enable_gqa=True)
    their_error = np.abs(out[0].float().numpy().swapaxes(0, 1) - expected).max()
    assert np.abs(layer.attend(queries) - expected).max() < their_error / 5


def test_one_key_far_above_all_others_and_16_bit_queries(kernel: str) -> None:
    layer = QuantizedKvLayer(3000, 1, 64)
    keys, values = rows(3000, 1, 64), rows(3000, 1, 64, seed=1)
    queries = rows(1, 1, 64, seed=2).astype(bfloat16)
    keys[0] = queries[0].astype(np.float32) * 3
    values[0] = 1e-4
    layer.extend(keys, values)
    check(layer, queries, tolerance=TOLERANCE_16_BITS)


def test_values_of_very_different_sizes_and_many_16_bit_queries(kernel: str) -> None:
    # A sink whose value is small, values that are zeros, and some that are much smaller or larger than the others.
    layer = QuantizedKvLayer(1200, 2, 64)
    keys, values = rows(1200, 2, 64), rows(1200, 2, 64, seed=1)
    queries = rows(21, 8, 64, seed=2).astype(bfloat16)
    keys[0] = queries[:2, 0].astype(np.float32).mean(axis=0) * 3
    values[0] = 1e-4
    values[5:40] = 0
    values[300:900] *= np.float32(2) ** np.arange(-30, 30)[np.arange(600) % 60, None, None]
    queries[3] *= 1e-3
    layer.extend(keys, values)
    check(layer, queries, tolerance=TOLERANCE_16_BITS)
    check(layer, queries, tolerance=TOLERANCE_16_BITS, positions=(0, 300), query_start=279)
    check(layer, queries[:, :2], tolerance=TOLERANCE_16_BITS, softcap=2.0, window=600)


@pytest.mark.parametrize(
    "codecs",
    [
        ("int8", "int8"),
        ("int8-rotated", "int4-rotated"),
        ("int5-rotated", "int4-rotated"),
        ("int4-rotated", "int6-rotated"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, bfloat16])
def test_many_queries_over_each_pair_of_codes(kernel: str, codecs: tuple[str, str], dtype: Any) -> None:
    # More rows of queries than are multiplied at a time, and lengths off every edge.
    for length, dim, value_dim, heads, n, more in [
        (700, 128, 64, 2, 5, {}),
        (257, 64, 128, 3, 33, {"window": 70, "sinks": 4}),
        (320, 256, 128, 1, 70, {"query_start": 100}),
        (600, 128, 128, 2, 6, {"causal": False, "softcap": 5.0, "threads": 3}),
    ]:
        layer = QuantizedKvLayer(length, heads, dim, value_dim, key_codec=codecs[0], value_codec=codecs[1])
        layer.extend(rows(length, heads, dim), rows(length, heads, value_dim, seed=1))
        queries = rows(n, heads * 4, dim, seed=9).astype(dtype)
        check(layer, queries, tolerance=TOLERANCE if dtype is np.float32 else TOLERANCE_16_BITS, **more)


INTEGER_CODECS = ["int8", "int3-rotated", "int4-rotated", "int5-rotated", "int6-rotated"]


@pytest.mark.parametrize("keys", INTEGER_CODECS)
def test_one_and_two_query_heads_over_each_pair_of_codes(kernel: str, keys: str) -> None:
    # Whole spans of 272 positions and a rest; rows of one register, of halves of one, and of more.
    dims = itertools.cycle([(128, 128, 3), (64, 128, 2), (128, 64, 1), (256, 128, 2), (64, 64, 5), (384, 256, 1)])
    for values, (dim, value_dim, heads) in zip(INTEGER_CODECS * 2, dims, strict=False):
        layer = QuantizedKvLayer(600, heads, dim, value_dim, key_codec=keys, value_codec=values)
        layer.extend(rows(600, heads, dim), rows(600, heads, value_dim, seed=1))
        queries = rows(2, heads * 2, dim, seed=9)
        check(layer, queries[:1, :heads])
        check(layer, queries[:, :heads], causal=False, softcap=5.0)
        check(layer, queries[:1].astype(bfloat16), window=580, tolerance=TOLERANCE_16_BITS)
        check(layer, queries[:1, :heads].astype(bfloat16), threads=2, tolerance=TOLERANCE_16_BITS)


@pytest.mark.parametrize(
    "codecs",
    [
        ("int8", "int8"),
        ("int8-rotated", "int4-rotated"),
        ("int5-rotated", "int4-rotated"),
        ("int4-rotated", "int4-rotated"),
        ("int4-rotated", "int5-rotated"),
    ],
)
def test_one_to_four_query_heads_over_the_codes_of_presets(kernel: str, codecs: tuple[str, str]) -> None:
    for dim, value_dim, heads in [(128, 128, 3), (256, 128, 1), (128, 256, 1), (64, 128, 2)]:
        layer = QuantizedKvLayer(600, heads, dim, value_dim, key_codec=codecs[0], value_codec=codecs[1])
        layer.extend(rows(600, heads, dim), rows(600, heads, value_dim, seed=1))
        for group in (1, 2, 3, 4):
            queries = rows(1, heads * group, dim, seed=group)
            check(layer, queries)
            check(layer, queries, window=580, softcap=5.0)
            check(layer, queries.astype(bfloat16), tolerance=TOLERANCE_16_BITS)


PAIRS_IN_PLACE = [
    ("int8", "int8"),
    ("int8-rotated", "int4-rotated"),
    ("int5-rotated", "int4-rotated"),
    ("int4-rotated", "int4-rotated"),
    ("int6-rotated", "int6-rotated"),
    ("int3-rotated", "int3-rotated"),
]


@pytest.mark.parametrize("codecs", PAIRS_IN_PLACE)
def test_ranges_shorter_than_a_span(kernel: str, codecs: tuple[str, str]) -> None:
    # Rows before a range are read with it where there are any, and must count for nothing: their numbers are the
    # largest.
    groups = itertools.cycle([1, 2, 3, 4, 8])
    far = rows(300, 2, 128, seed=3) * np.float32(20)
    for length in [1, 7, 15, 16, 17, 31, 47, 64, 100, 128, 129, 200, 255, 256, 271, 273, 290]:
        near = rows(length, 2, 128, seed=length)
        alone = QuantizedKvLayer(length, 2, 128, key_codec=codecs[0], value_codec=codecs[1])
        alone.extend(near, near[::-1])
        behind = QuantizedKvLayer(300 + length, 2, 128, key_codec=codecs[0], value_codec=codecs[1])
        behind.extend(np.concatenate([far, near]), np.concatenate([far * 50, near[::-1]]))
        queries = rows(1, 2 * next(groups), 128, seed=9)
        check(alone, queries)
        check(alone, queries.astype(bfloat16), tolerance=TOLERANCE_16_BITS)
        check(behind, queries, window=length)
        check(behind, queries, window=length, softcap=5.0)
        check(behind, queries.astype(bfloat16), window=length, tolerance=TOLERANCE_16_BITS)
        if length > 1:
            check(behind, rows(2, 2, 128, seed=8), causal=False, window=length - 1)


def test_precision_is_one_of_two() -> None:
    with pytest.raises(kvmmap.KvmmapError, match="precision"):
        filled(10).attend(rows(1, 2, 16), precision="fast")  # type: ignore[arg-type]


def test_over_any_storage(make_cache: MakeCache) -> None:
    cache = make_cache(2, 600, 2, 16, value_head_dim=24)
    cache.extend(rows(2, 500, 2, 16), rows(2, 500, 2, 24))
    for layer in cache.layers:
        check(layer, rows(3, 4, 16, seed=9))
        out = np.empty((3, 4, 24), np.float32)
        assert layer.attend(rows(3, 4, 16, seed=9), out=out) is out
        check(layer, rows(3, 4, 16, seed=9), window=40, sinks=5)
        check(layer, rows(3, 4, 16, seed=9), query_start=0)
        mask = np.zeros((2, 500), bool)
        mask[0, :256] = mask[1, 256:] = True
        check(layer, rows(3, 4, 16, seed=9), positions=[[0], [1]], keep=mask)
        check(layer, rows(3, 4, 16, seed=9), positions=(5, 5), keep=np.zeros((2, 500), bool))
    cache.truncate(100)
    check(cache.layers[1], rows(3, 4, 16, seed=9))


class TestPositions:
    layer = filled(1000, 2, 16)
    queries = rows(2, 4, 16, seed=9)

    def keep(self, *ranges: tuple[int, int]) -> np.ndarray:
        mask = np.zeros((2, 1000), bool)
        for start, stop in ranges:
            mask[:, start:stop] = True
        return mask

    @pytest.mark.parametrize("positions", [(100, 700), range(100, 700), slice(100, 700)])
    def test_position_ranges(self, kernel: str, positions: Any) -> None:
        check(self.layer, self.queries, positions=positions, keep=self.keep((100, 700)))

    def test_open_slices(self) -> None:
        check(self.layer, self.queries, positions=slice(None), keep=self.keep((0, 1000)))
        check(self.layer, self.queries, positions=slice(900, None), keep=self.keep((900, 1000)))

    def test_blocks(self, kernel: str) -> None:
        check(self.layer, self.queries, positions=[3, 0, 3], keep=self.keep((0, 256), (768, 1000)))
        check(self.layer, self.queries, positions=np.array([1, 2]), keep=self.keep((256, 768)), threads=2)

    def test_blocks_of_each_head(self, kernel: str) -> None:
        mask = np.zeros((2, 1000), bool)
        mask[0, :512] = True
        mask[1, 256:512] = mask[1, 768:] = True
        check(self.layer, self.queries, positions=[[0, 1], [3, 1]], keep=mask)

    def test_nothing_selected(self) -> None:
        for positions in ((5, 5), []):
            out, lse = self.layer.attend(self.queries, positions=positions, return_lse=True)
            assert (out == 0).all()
            assert np.isneginf(lse).all()

    @pytest.mark.parametrize("positions", [(0, 1001), (-1, 5), (6, 5), [4], [-1], slice(0, 2000)])
    def test_positions_that_are_not_stored(self, positions: Any) -> None:
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            self.layer.attend(self.queries, positions=positions)

    @pytest.mark.parametrize("positions", [(1, 2, 3), slice(0, 10, 2), [[0], [1], [2]], range(10, 0, -1)])
    def test_invalid_selections(self, positions: Any) -> None:
        with pytest.raises(kvmmap.ShapeMismatchError):
            self.layer.attend(self.queries, positions=positions)

    def test_blocks_are_whole_numbers(self) -> None:
        with pytest.raises(kvmmap.DtypeError):
            self.layer.attend(self.queries, positions=[0.5])


def test_empty_layer_is_refused(make_cache: MakeCache) -> None:
    with pytest.raises(kvmmap.EmptyCacheError, match="layer 1"):
        make_cache().layers[1].attend(rows(1, 2, 16))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_non_finite_queries_are_refused(bad: float, dtype: Any) -> None:
    queries = rows(3, 4, 16).astype(dtype)
    queries[1, 2, 5] = bad
    with pytest.raises(kvmmap.NonFiniteError, match="query 1, head 2") as caught:
        filled(10).attend(queries)
    assert (caught.value.position, caught.value.head) == (1, 2)


@pytest.mark.parametrize("shape", [(16,), (4, 16), (1, 3, 16), (1, 0, 16), (1, 2, 15), (1, 1, 2, 16)])
def test_shapes_of_queries(shape: tuple[int, ...]) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError, match="num_q_heads"):
        filled(10).attend(np.zeros(shape, np.float32))


def test_no_queries() -> None:
    out, lse = filled(10).attend(np.zeros((0, 4, 16), np.float32), return_lse=True)
    assert out.shape == (0, 4, 16)
    assert lse.shape == (0, 4)


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"window": 0}, kvmmap.PositionOutOfRangeError),
        ({"window": 2.5}, kvmmap.ShapeMismatchError),
        ({"sinks": -1}, kvmmap.PositionOutOfRangeError),
        ({"query_start": -1}, kvmmap.PositionOutOfRangeError),
        ({"softcap": 0.0}, ValueError),
        ({"softcap": np.nan}, ValueError),
        ({"scale": np.inf}, ValueError),
        ({"threads": 0}, ValueError),
        ({"out": np.zeros((1, 2, 15), np.float32)}, kvmmap.ShapeMismatchError),
        ({"out": np.zeros((1, 2, 16))}, kvmmap.DtypeError),
        ({"resident": "never"}, kvmmap.KvmmapError),
    ],
    ids=lambda value: str(sorted(value)) if isinstance(value, dict) else None,
)
def test_invalid_arguments(more: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        filled(10).attend(rows(1, 2, 16), **more)


class TestMerge:
    @pytest.mark.parametrize("cuts", [[500], [1, 2, 999], [64, 128], [0, 1000]])
    def test_merged_parts_equal_the_whole(self, cuts: list[int]) -> None:
        layer, queries = filled(1000), rows(3, 4, 16, seed=9)
        edges = [0, *cuts, 1000]
        parts = [layer.attend(queries, positions=(a, b), return_lse=True) for a, b in itertools.pairwise(edges)]
        out, lse = merge_attention(*zip(*parts, strict=True))
        expected, expected_lse = oracle.attend(layer, queries)
        assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)

    def test_prefix_and_tail_in_caches_of_their_own(self) -> None:
        keys, values, queries = rows(700, 2, 16), rows(700, 2, 16, seed=1), rows(3, 4, 16, seed=2)
        whole, prefix, tail = (QuantizedKvLayer(700, 2, 16) for _ in range(3))
        whole.extend(keys, values)
        prefix.extend(keys[:600], values[:600])
        tail.extend(keys[600:], values[600:])
        parts = [
            prefix.attend(queries, query_start=697, return_lse=True),
            tail.attend(queries, query_start=97, return_lse=True),
        ]
        out, lse = merge_attention(*zip(*parts, strict=True))
        expected, expected_lse = oracle.attend(whole, queries)
        assert np.abs(out - expected).max() <= TOLERANCE * np.abs(expected).max()
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=1e-6)

    def test_parts_without_visible_positions(self) -> None:
        nothing = np.zeros((1, 2, 4), np.float32), np.full((1, 2), -np.inf, np.float32)
        something = rows(1, 2, 4), rows(1, 2)
        out, lse = merge_attention(*zip(nothing, something, nothing, strict=True))
        np.testing.assert_allclose(out, something[0], rtol=1e-6)
        np.testing.assert_allclose(lse, something[1], rtol=1e-6)
        out, lse = merge_attention(*zip(nothing, nothing, strict=True))
        assert (out == 0).all()
        assert np.isneginf(lse).all()

    def test_any_shape_and_strides(self) -> None:
        outputs, lses = rows(3, 5, 2, 4), rows(3, 5, 2, seed=1)
        weights = np.exp(lses.astype(np.float64))
        expected = (weights[..., None] * outputs).sum(0) / weights.sum(0)[..., None]
        for axes in ((0, 1, 2), (1, 0, 2)):
            out, lse = merge_attention(
                [part[:, ::-1].transpose(axes) for part in outputs],
                [part[:, ::-1].transpose(axes[:2]) for part in lses],
            )
            np.testing.assert_allclose(out, expected[:, ::-1].transpose(axes), rtol=1e-6, atol=1e-6)
            np.testing.assert_allclose(lse, np.log(weights.sum(0))[:, ::-1].transpose(axes[:2]), rtol=1e-6, atol=1e-6)
        out, lse = merge_attention(list(outputs[:, 0, 0]), list(lses[:, 0, 0]))
        np.testing.assert_allclose(out, expected[0, 0], rtol=1e-6, atol=1e-6)
        out, lse = merge_attention([outputs[0, :0]] * 2, [lses[0, :0]] * 2)
        assert (out.shape, lse.shape) == ((0, 2, 4), (0, 2))

    def test_nan_is_propagated(self) -> None:
        parts = [rows(1, 2, 4), rows(1, 2, 4, seed=1)]
        for where in (0, 1):
            lses = [rows(1, 2), rows(1, 2, seed=1)]
            lses[where][0, 1] = np.nan
            out, _ = merge_attention(parts, lses)
            assert np.isfinite(out[0, 0]).all()
            assert np.isnan(out[0, 1]).all()

    def test_mismatched_shapes(self) -> None:
        out, lse = rows(1, 2, 4), rows(1, 2)
        for outputs, lses in (([], []), ([out], []), ([out, out[..., :3]], [lse, lse]), ([out], [lse[0]])):
            with pytest.raises(kvmmap.ShapeMismatchError):
                merge_attention(outputs, lses)


def test_while_another_thread_appends() -> None:
    layer = QuantizedKvLayer(20_000, 2, 16)
    layer.push(rows(2, 16), rows(2, 16))
    keys, values = rows(20_000, 2, 16), rows(20_000, 2, 16, seed=1)

    def push() -> None:
        for start in range(1, 20_000, 100):
            layer.extend(keys[start : start + 100][: 20_000 - start], values[start : start + 100][: 20_000 - start])

    thread = threading.Thread(target=push)
    thread.start()
    while thread.is_alive():
        assert np.isfinite(layer.attend(rows(1, 4, 16))).all()
    thread.join()
    assert len(layer) == 20_000
    check(layer, rows(1, 4, 16))


@pytest.mark.parametrize("codec", ["int8", "int4-rotated", "bf16"])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_high_scores(kernel: str, dtype: Any, codec: str) -> None:
    """Of hundreds and thousands: where one is far above the others, the result is its value, whatever its size."""
    for dim, length, n in ((64, 16, 1), (64, 50, 1), (128, 300, 1), (64, 700, 1), (64, 300, 5), (128, 300, 40)):
        layer = QuantizedKvLayer(length, 2, dim, key_codec=codec, value_codec=codec)
        for size in (10, 30):
            layer.truncate(0)
            layer.extend(rows(length, 2, dim) * size, rows(length, 2, dim, seed=1))
            keys, values = layer.read_keys(), layer.read_values()
            for group in (1, 4, 16):
                queries = (rows(n, 2 * group, dim, seed=group) * size).astype(dtype)
                scores = np.einsum("nhd,lhd->nhl", queries.astype(np.float32), keys.repeat(group, axis=1)) / dim**0.5
                scores[np.arange(length) > np.arange(length - n, length)[:, None, None].repeat(2 * group, 1)] = -np.inf
                second, first = np.moveaxis(np.sort(scores)[..., -2:], -1, 0)
                clear = first - second > 10 + 1e-3 * np.abs(first)
                found, lse = layer.attend(queries, return_lse=True)
                expected = values[scores.argmax(-1), np.arange(2 * group) // group]
                assert clear.sum() > clear.size / 4
                np.testing.assert_allclose(found[clear], expected[clear], rtol=0, atol=2e-3 * np.abs(values).max())
                np.testing.assert_allclose(lse[clear], first[clear], rtol=3e-4)
