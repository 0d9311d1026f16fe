"""The compiled codecs: every kernel of this machine against plain numpy, byte for byte; bounds; attention of pairs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import codec_oracle as oracle
from helpers.support import some, sweep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import kvmmap
from kvmmap import _core, codecs

BF16 = ml_dtypes.bfloat16
DTYPES: dict[int, Any] = {0: np.float32, 1: np.float16, 2: BF16}
NAMES = [codec.name for codec in codecs.COMPILED]
ROTATED = [name for name in NAMES if "rotated" in name]
OF_MODELS = (32, 40, 48, 64, 72, 80, 96, 112, 120, 128, 160, 192, 256, 320, 512, 576)  # head_dim, most of them blocks

for_kernels = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=_core.available_kernels(), autouse=True)
def kernel(request: pytest.FixtureRequest) -> Any:
    before = _core.current_kernel()
    _core.use_kernel(request.param)
    yield request.param
    _core.use_kernel(before)


def multiple(name: str) -> int:
    """What head_dim must be a multiple of."""
    return 1 if name not in ROTATED else 2 if name == "int8-rotated" else 8


def some_rows(name: str, n: int, dim: int, seed: int = 0) -> NDArray[np.float32]:
    """Rows of many magnitudes: gaussian ones, zeros, single numbers, tiny ones; as large as the codec takes."""
    rng = np.random.default_rng([seed, dim])
    x = rng.normal(size=(n, dim)) * 10.0 ** rng.integers(-6, 3, size=(n, 1))
    x[::7] = 0
    x[1::7, 1:] = 0
    x[2::7] = x[2::7, :1]
    x[3::7] *= 1e-9
    limit = 400 if name == "fp8-e4m3" else 60_000
    return np.clip(x, -limit, limit).astype(np.float32)


def encode(name: str, x: NDArray[Any], threads: int = 1) -> tuple[int, list[NDArray[Any]]]:
    codec = codecs.by_name(name)
    dim = x.shape[-1]
    arrays = [np.zeros((len(x), 1, *one.shape), one.dtype) for one in codec.arrays(dim)]
    number = next(number for number, dtype in DTYPES.items() if x.dtype == dtype)
    return codec.encode((x.view(np.uint16) if number == 2 else x)[:, None], number, arrays, threads), arrays


def check(name: str, x: NDArray[Any]) -> None:
    """Encode and decode, and compare bytes with the oracle's."""
    codec, dim = codecs.by_name(name), x.shape[-1]
    bad, arrays = encode(name, x)
    assert bad == -1
    codes, scales = oracle.encode(name, x)
    np.testing.assert_array_equal(arrays[0][:, 0].view(np.uint8), codes.view(np.uint8))
    if scales is not None:
        np.testing.assert_array_equal(arrays[1][:, 0].view(np.uint8), scales.view(np.uint8))
    codec.check(arrays, dim)
    want = oracle.decode(name, codes, scales, dim)
    for number, dtype in DTYPES.items():
        out = np.zeros((len(x), 1, dim), np.uint16 if number == 2 else dtype)
        codec.decode(arrays, dim, out, number, 1)
        bits = np.uint32 if number == 0 else np.uint16
        with np.errstate(over="ignore"):
            np.testing.assert_array_equal(out[:, 0].view(bits), want.astype(dtype).view(bits))


@pytest.mark.parametrize("name", some(NAMES, 3))
def test_every_dim(name: str) -> None:
    step = multiple(name)
    for dim in [*range(step, 137 if step == 1 else 513, step), 320, 384, 512, 576, 1000, 1024, 2048, 4096]:
        check(name, some_rows(name, 37 if dim in OF_MODELS else 19, dim))


def test_quotients_near_halves() -> None:
    """Rows whose rotation is exact: 127 scales, and one number at, below or above the middle between two codes."""
    scales = np.arange(129, 256, 6, dtype=np.float64)[:, None, None]
    middle = (np.arange(127) + 0.5)[:, None] * scales + np.array([-1, 0, 1]) * 2.0**-8
    rotated = np.zeros((*middle.shape, 64))
    rotated[..., 0], rotated[..., 1] = 127 * scales, middle
    rotated = rotated.reshape(-1, 64).astype(np.float32)
    x = oracle.rotate_back(rotated)
    np.testing.assert_array_equal(oracle.rotate(x), rotated)
    check("int8-rotated", x)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_sixteen_bit_rows(name: str, dtype: Any) -> None:
    for dim in (8, *OF_MODELS):
        check(name, some_rows(name, 37, dim).astype(dtype))


@for_kernels
@given(data=st.data())
@pytest.mark.parametrize("name", NAMES)
def test_error_bounds(name: str, data: st.DataObject) -> None:
    """What each codec promises of a row, for rows of any kind."""
    dim = multiple(name) * data.draw(st.integers(1, 200 // multiple(name)), "dim")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32), "seed"))
    x = rng.normal(size=(4, dim)) * 10.0 ** data.draw(st.integers(-3, 2), "magnitude")
    if data.draw(st.booleans(), "outliers"):
        x *= np.where(rng.random(x.shape) < 0.05, 30.0, 1.0)
    x = np.clip(x, -400, 400).astype(np.float32)
    bad, arrays = encode(name, x)
    assert bad == -1
    error = (codecs.by_name(name).decoded(arrays, dim)[:, 0] - x).astype(np.float64)
    size = np.abs(x.astype(np.float64))
    if name in ("bf16", "f16") or (name.startswith("fp8") and "scaled" not in name):
        step, least = {"bf16": (2**-8, 0), "f16": (2**-11, 2**-25), "fp8-e4m3": (2**-4, 2**-10)}.get(
            name, (2**-3, 2**-17)
        )
        assert (np.abs(error) <= size * step * (1 + 1e-6) + least).all()
    elif "scaled" in name:
        step, lowest = (2**-4, 2**-10) if "e4m3" in name else (2**-3, 2**-17)
        assert (np.abs(error) <= size * step * (1 + 1e-5) + arrays[1] * lowest * (1 + 1e-5)).all()
    elif name == "int8":
        assert (np.abs(error) <= arrays[1] / 2 * (1 + 1e-5) + size * 1e-6).all()
    elif name == "int8-rotated":
        # A rotation keeps lengths: half a step for each number, over the row.
        limit = np.sqrt(dim) * arrays[1][:, 0].astype(np.float64) / 2
        assert (np.sqrt((error**2).sum(-1)) <= limit * (1 + 1e-3) + np.sqrt((size**2).sum(-1)) * 1e-6).all()
    else:
        # The fitted scale is the one of least squared error: never worse than to store nothing, up to f16's rounding.
        length = np.sqrt((size**2).sum(-1))
        assert (np.sqrt((error**2).sum(-1)) <= length * (1 + 1e-3) + np.sqrt(dim) * 127 * 2**-25).all()
        # Nor worse than with the scale by which the levels were chosen: each number is off by half a gap between
        # levels, or by what it is beyond the last one.
        rotated = np.abs(oracle.rotate(x).astype(np.float64))
        if name == "int6-rotated":
            limit = np.sqrt(dim) * rotated.max(-1) * 2.5 / 127
        else:
            gap, aim = {"int3-rotated": (24.5, 59), "int4-rotated": (15.5, 46.5), "int5-rotated": (11.5, 39)}[name]
            unit = length / np.sqrt(dim) / aim
            beyond = rotated / unit[:, None] - 127
            limit = np.sqrt((np.maximum(gap, beyond) ** 2).sum(-1)) * unit
        rounding = length * 2**-11 + np.sqrt(dim) * 127 * 2**-25
        assert (np.sqrt((error**2).sum(-1)) <= limit * (1 + 1e-4) + rounding * (1 + 1e-3)).all()


@pytest.mark.parametrize(("name", "least", "most"), [
    ("int8-rotated", 0.004, 0.009), ("int6-rotated", 0.017, 0.032), ("int5-rotated", 0.04, 0.055),
    ("int4-rotated", 0.085, 0.105), ("int3-rotated", 0.16, 0.2),
])  # fmt: skip
def test_loss_of_gaussian_rows_is_what_the_tables_are_made_for(name: str, least: float, most: float) -> None:
    x = np.random.default_rng(5).normal(size=(500, 128)).astype(np.float32)
    x[:, 7] *= 20  # one channel that stands out is spread over all by the rotation
    arrays = encode(name, x)[1]
    error = codecs.by_name(name).decoded(arrays, 128)[:, 0] - x
    assert least < np.sqrt((error**2).mean() / (x**2).mean()) < most


@pytest.mark.parametrize("name", NAMES)
def test_zero_rows_are_exact(name: str) -> None:
    for x in (np.zeros((3, 64), np.float32), -np.zeros((3, 64), np.float32)):
        bad, arrays = encode(name, x)
        assert bad == -1
        assert (codecs.by_name(name).decoded(arrays, 64) == 0).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_numbers_that_are_not_finite_are_found(name: str, dtype: Any) -> None:
    for dim in (8, 64, 72, 80, 96, 128, 320):
        for at in (0, dim // 2, dim - 1):
            for value in (np.nan, np.inf, -np.inf):
                x = some_rows("fp8-e4m3", 40, dim).astype(dtype)
                x[29, at] = x[33, at] = value
                assert encode(name, x)[0] == 29
                assert encode(name, x[29:30])[0] == 0


@pytest.mark.parametrize(("name", "largest", "above"), [
    ("f16", 65519.0, 65520.0), ("fp8-e4m3", 464.0, 464.5), ("fp8-e5m2", 61439.0, 61440.0),
    ("bf16", 3.389e38, 3.4e38), ("int4-rotated", 1e6, 1e8), ("int8-rotated", 1e37, 3.4e38),
])  # fmt: skip
def test_numbers_beyond_a_codec_are_refused_and_not_changed(name: str, largest: float, above: float) -> None:
    row = np.full((1, 64), largest, np.float32)
    assert encode(name, row)[0] == -1
    assert encode(name, -row)[0] == -1
    row[0] = above
    assert encode(name, row)[0] == 0
    layer = kvmmap.QuantizedKvLayer(4, 1, 64, value_codec=name)
    with pytest.raises(kvmmap.NonFiniteError, match=r"values hold .* at position 0, head 0"):
        layer.push(np.zeros((1, 64), np.float32), row)
    assert len(layer) == 0


@pytest.mark.parametrize("name", [name for name in NAMES if name in ROTATED or "scaled" in name])
def test_what_is_accepted_is_read_as_numbers(name: str) -> None:
    """Of sizes up to f32's largest: rotating back adds up a block's numbers before it makes the sums smaller."""
    with np.errstate(over="ignore", invalid="ignore"):
        for dim in (8, 64, 80, 128):
            x = np.random.default_rng(dim).normal(size=(36, dim)).astype(np.float32)
            x[::4, 1:] = 0
            x[1::4] = np.sign(x[1::4])
            x /= np.abs(x).max(axis=1, keepdims=True)
            x *= np.logspace(35, np.log10(3.4e38), 36, dtype=np.float32)[:, None]
            for row in x[:, None]:
                codes, scales = oracle.encode(name, row)
                readable = np.isfinite(oracle.decode(name, codes, scales, dim)).all()
                assert encode(name, row)[0] == (-1 if readable else 0)


@pytest.mark.parametrize("name", some(NAMES, 3))
@pytest.mark.parametrize("dim", [128, 80])
def test_threads_and_strides_change_nothing(name: str, dim: int) -> None:
    codec = codecs.by_name(name)
    x = some_rows("fp8-e4m3", 3000 * 3, dim).reshape(3000, 3, dim)
    for rows in (x, x[:, ::-1], x.swapaxes(0, 1), x[::2]):
        found = []
        for threads, source in ((1, np.ascontiguousarray(rows)), (3, rows)):
            arrays = [np.zeros((*rows.shape[:2], *one.shape), one.dtype) for one in codec.arrays(dim)]
            assert codec.encode(source, 0, arrays, threads) == -1
            found.append(arrays)
            out = np.empty(rows.shape, np.float32)
            codec.decode(arrays, dim, out, 0, threads)
            np.testing.assert_array_equal(out, codec.decoded(arrays, dim))
        for one, other in zip(*found, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ROTATED)
def test_dims_that_a_rotation_does_not_take(name: str) -> None:
    for dim in (1, 7, 63, *([] if name == "int8-rotated" else [4, 12, 4104])):
        with pytest.raises(kvmmap.ShapeMismatchError, match="takes rows of a multiple of"):
            kvmmap.QuantizedKvLayer(4, 1, dim, key_codec=name)


def test_the_generator_of_signs_is_split_mix_64() -> None:
    following = oracle.split_mix_64(0)  # the words that the generator is known by
    assert [following(), following()] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]


def test_blocks_of_a_rotation() -> None:
    """A single number is spread evenly over its block, and over nothing else."""
    eye = np.eye(80, dtype=np.float32)
    bad, arrays = encode("int8-rotated", eye)
    assert bad == -1
    codes = arrays[0][:, 0]
    assert (np.abs(codes[:64, :64]) == 127).all()
    assert (codes[:64, 64:] == 0).all()
    assert (np.abs(codes[64:, 64:]) == 127).all()
    assert (codes[64:, :64] == 0).all()


PAIRS = [("int8-rotated", "int8-rotated"), ("int8-rotated", "int4-rotated"), ("int5-rotated", "int4-rotated"),
         ("int4-rotated", "int5-rotated"), ("int6-rotated", "int3-rotated"), ("bf16", "bf16"), ("f16", "int8"),
         ("int8", "fp8-e4m3"), ("fp8-e5m2-scaled", "int4-rotated"), ("int8", "int8-rotated"),
         ("int6-rotated", "int6-rotated"), ("int3-rotated", "int3-rotated"),
         ("int8-rotated", "int6-rotated")]  # fmt: skip


@pytest.mark.parametrize(("keys", "values"), PAIRS)
@pytest.mark.parametrize(("dim", "value_dim"), [(128, 64), (80, 96), *sweep((64, 64), (256, 128), (40, 8))])
def test_attention_of_pairs(keys: str, values: str, dim: int, value_dim: int) -> None:
    from helpers import attention_oracle

    rng = np.random.default_rng([dim, value_dim])
    layer = kvmmap.QuantizedKvLayer(700, 2, dim, value_dim, key_codec=keys, value_codec=values)
    layer.extend(
        rng.normal(size=(700, 2, dim)).astype(np.float32), rng.normal(size=(700, 2, value_dim)).astype(np.float32)
    )
    for n, group, options in (
        (1, 1, {}), (1, 4, {}), (1, 7, {"window": 300}), (5, 2, {}),
        (2, 1, {"query_start": 600, "window": 40, "sinks": 3}), (1, 3, {"causal": False, "softcap": 5.0}),
        (40, 1, {"threads": 3}),
    ):  # fmt: skip
        queries = rng.normal(size=(n, 2 * group, dim)).astype(np.float32)
        out, lse = layer.attend(queries, return_lse=True, **options)
        options.pop("threads", None)
        expected, expected_lse = attention_oracle.attend(layer, queries, **options)
        assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()
        np.testing.assert_allclose(lse, expected_lse, atol=1e-4)


def test_attention_over_blocks_of_each_head() -> None:
    from helpers import attention_oracle

    rng = np.random.default_rng(1)
    for keys, values in PAIRS:
        layer = kvmmap.QuantizedKvLayer(1200, 2, 64, key_codec=keys, value_codec=values)
        layer.extend(*(rng.normal(size=(1200, 2, 64)).astype(np.float32) for _ in range(2)))
        queries = rng.normal(size=(2, 4, 64)).astype(np.float32)
        keep = np.zeros((2, 1200), bool)
        keep[0, :512] = keep[1, 256:512] = keep[1, 1024:] = True
        out = layer.attend(queries, positions=[[0, 1], [1, 4]])
        expected, _ = attention_oracle.attend(layer, queries, keep=keep)
        assert np.abs(out - expected).max() <= 1e-5 * np.abs(expected).max()


def test_arrays_that_a_codec_never_writes_are_refused() -> None:
    bad_bytes = {"fp8-e4m3": 0x7F, "fp8-e5m2": 0xFC, "fp8-e4m3-scaled": 0xFF, "fp8-e5m2-scaled": 0x7D}
    for name in NAMES:
        codec = codecs.by_name(name)
        arrays = encode(name, some_rows("fp8-e4m3", 5, 64))[1]
        codec.check(arrays, 64)
        if name in ("bf16", "f16"):
            arrays[0].view(np.uint16)[2, 0, 3] = {"bf16": 0x7F80, "f16": 0x7C00}[name]  # infinity
        elif name in bad_bytes:
            arrays[0][2, 0, 3] = bad_bytes[name]
        else:
            arrays[1][2, 0] = np.nan
        with pytest.raises(kvmmap.NonFiniteError, match="were not made by this codec"):
            codec.check(arrays, 64)
