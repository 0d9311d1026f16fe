"""Properties of caches over any shape and input: splits don't matter, and reads equal the codec's result."""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvmmap

dims = st.integers(1, 130)
heads = st.integers(1, 5)
lengths = st.integers(0, 600)


def sample(seed: int, n: int, num_heads: int, dim: int, exponent: int) -> np.ndarray:
    """Rows whose magnitudes differ from one to the next."""
    random = np.random.default_rng(seed)
    rows = random.standard_normal((n, num_heads, dim)) * 10.0 ** random.integers(-3, 4, (n, num_heads, 1))
    return (rows * 10.0**exponent).astype(np.float32)


@pytest.mark.parametrize("in_file", [False, True])
@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=lengths,
    num_heads=heads,
    dim=dims,
    value_dim=dims,
    exponent=st.integers(-25, 25),
    cuts=st.lists(st.floats(0, 1), max_size=5),
)
def test_any_split_of_the_input_gives_the_same_cache(
    in_file: bool, seed: int, n: int, num_heads: int, dim: int, value_dim: int, exponent: int, cuts: list[float]
) -> None:
    keys, values = sample(seed, n, num_heads, dim, exponent), sample(seed + 1, n, num_heads, value_dim, exponent)
    with tempfile.TemporaryDirectory() as folder:
        if in_file:
            cache = kvmmap.create(
                Path(folder) / "a.kvm",
                num_layers=1,
                capacity=n,
                num_kv_heads=num_heads,
                head_dim=dim,
                value_head_dim=value_dim,
            )
        else:
            cache = kvmmap.QuantizedKvCache(1, n, num_heads, dim, value_dim)
        with cache:
            edges = [0, *sorted(int(cut * n) for cut in cuts), n]
            for start, stop in itertools.pairwise(edges):
                cache.extend(keys[None, start:stop], values[None, start:stop])
            layer = cache.layers[0]
            for rows, codes, scales, read in (
                (keys, layer.key_codes, layer.key_scales, layer.read_keys()),
                (values, layer.value_codes, layer.value_scales, layer.read_values()),
            ):
                expected_codes, expected_scales = kvmmap.quantize_rows(rows)
                np.testing.assert_array_equal(codes, expected_codes)
                np.testing.assert_array_equal(scales, expected_scales)
                slack = 1 + 6 * 127 * 2.0**-24  # quotient, product, and the difference here: three roundings
                assert (np.abs(read - rows) <= scales[..., None] / 2 * slack).all()
            cache.flush()
            assert cache.verify().sound


@settings(max_examples=100, deadline=None)
@given(
    layers=st.integers(1, 70),
    capacity=st.integers(0, 2**33),
    num_heads=st.integers(1, 300),
    dim=st.integers(1, 600),
)
def test_sizes_are_what_the_formula_says(layers: int, capacity: int, num_heads: int, dim: int) -> None:
    geometry = kvmmap.CacheGeometry.build(num_layers=layers, capacity=capacity, num_kv_heads=num_heads, head_dim=dim)
    assert geometry.memory_bytes == layers * capacity * num_heads * 2 * (dim + 4)
    assert geometry.fp32_memory_bytes == 2 * layers * capacity * num_heads * dim * 4
