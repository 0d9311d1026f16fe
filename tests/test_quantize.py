"""The row codec: every kernel of this machine against the plain numpy one, and the Python face."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from helpers import oracle
from helpers.support import sweep
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from kvmmap import _core
from kvmmap.errors import DtypeError, NonFiniteError, ReadOnlyError, ShapeMismatchError
from kvmmap.quantize import MIN_SCALE, as_rows, dequantize_rows, quantization_error, quantize_rows

BF16 = ml_dtypes.bfloat16
DTYPES = [np.float32, np.float16, BF16]
MAX = float(np.finfo(np.float32).max)

# A kernel is chosen once per test, so hypothesis need not choose it again for each example.
for_kernels = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(params=_core.available_kernels(), autouse=True)
def kernel(request):
    before = _core.current_kernel()
    _core.use_kernel(request.param)
    yield request.param
    _core.use_kernel(before)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def check(x, **kwargs):
    """Quantise and compare, bytes and all, with the oracle; dequantise likewise, to every dtype."""
    codes, scales = quantize_rows(x, **kwargs)
    want_codes, want_scales = oracle.quantize(x)
    assert_array_equal(codes, want_codes)
    assert_array_equal(scales.view(np.uint32), want_scales.view(np.uint32))
    check_dequantize(codes, scales)
    return codes, scales


def check_dequantize(codes, scales):
    want = oracle.dequantize(codes, scales)
    assert_array_equal(dequantize_rows(codes, scales).view(np.uint32), want.view(np.uint32))
    with np.errstate(over="ignore"):
        for dtype in (np.float16, BF16):
            got = dequantize_rows(codes, scales, dtype)
            assert got.dtype == dtype
            assert_array_equal(got.view(np.uint16), want.astype(dtype).view(np.uint16))


@st.composite
def arrays(draw):
    """Rows of any length and magnitude in any dtype, cut from a larger array with strides of their own."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dim = draw(st.integers(1, 512))
    lead = draw(st.lists(st.integers(0, 5), min_size=0, max_size=3))
    steps = [draw(st.sampled_from([1, 2, -1, -2])) for _ in lead] + [draw(st.sampled_from([1, 1, 1, -1, 3]))]
    dtype = draw(st.sampled_from(DTYPES))
    magnitude = 10.0 ** draw(st.integers(-30, 30))
    shape = [n * abs(step) for n, step in zip([*lead, dim], steps, strict=True)]
    x = rng.normal(size=shape) * magnitude
    if draw(st.booleans()):  # a few numbers dwarf the rest
        x *= np.where(rng.random(shape) < 0.02, 1000.0, 1.0)
    limit = float(ml_dtypes.finfo(dtype).max)
    x = np.clip(x, -limit, limit).astype(dtype)
    return x[tuple(slice(None, None, step) for step in steps)]


@for_kernels
@given(x=arrays())
def test_any_rows(x):
    codes, scales = check(x)
    assert codes.shape == x.shape
    assert scales.shape == x.shape[:-1]
    assert codes.flags.c_contiguous
    assert scales.flags.c_contiguous
    assert (codes > -128).all()
    wide = x.astype(np.float64)
    error = np.abs(wide - oracle.dequantize(codes, scales).astype(np.float64))
    half = scales.astype(np.float64)[..., None] / 2
    assert (error <= half * (1 + 1e-5) + np.abs(wide) * 1e-6).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_short_dimension(rng, dtype):
    for dim in range(1, 131):
        check(rng.normal(size=(5, dim)).astype(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [192, 255, 256, 257, 384, 511, 512, 513, 1024, 5000])
def test_long_dimensions(rng, dtype, dim):
    check(rng.normal(size=(37, dim)).astype(dtype))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-40, 1e-38, 1e-30, 1e-10, 1.0, 1e10, 1e30, 3e37])
def test_magnitudes(rng, magnitude):
    check((rng.normal(size=(20, 96)) * magnitude).astype(np.float32))


@pytest.mark.parametrize("dtype", DTYPES)
def test_denormals(rng, dtype):
    bits = np.uint32 if dtype == np.float32 else np.uint16
    smallest = np.finfo(np.float32).smallest_normal if dtype != np.float16 else np.finfo(dtype).smallest_normal
    top = int(np.array(smallest, dtype).view(bits))
    check(rng.integers(0, top, size=(30, 70)).astype(bits).view(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros(dtype):
    x = np.zeros((3, 20), dtype)
    x[1] = -x[1]
    codes, scales = check(x)
    assert not codes.any()
    assert (scales == MIN_SCALE).all()


def test_scale_has_a_lower_bound():
    x = np.full((1, 8), 100 * MIN_SCALE, np.float32)
    codes, scales = check(x)
    assert (codes == 100).all()
    assert scales[0] == MIN_SCALE


@pytest.mark.parametrize("power", [-20, -3, 0, 5, 60])
def test_ties_round_away_from_zero(power):
    # absmax 127 * 2^p makes the scale 2^p, so every (k + 1/2) * 2^p is an exact tie, in 16 bits too.
    halves = np.arange(-126.5, 127.0)
    want = np.sign(halves) * (np.abs(halves) + 0.5)
    scale = 2.0**power
    row = np.concatenate([halves, [127.0]]) * scale
    for dtype in DTYPES:
        with np.errstate(over="ignore"):
            x = row.astype(dtype)
        if not (x.astype(np.float64) == row).all():
            continue
        codes, scales = check(x)
        assert scales == scale
        assert_array_equal(codes[:-1], want)
    for toward in (-np.inf, np.inf):  # and the neighbours of each tie
        check(np.nextafter(row.astype(np.float32), np.float32(toward)))


def test_near_ties_at_any_scale(rng):
    scales = rng.uniform(0.5, 2.0, 200).astype(np.float32)
    halves = rng.integers(0, 127, (200, 64)) + np.float32(0.5)
    x = halves.astype(np.float32) * scales[:, None]
    x = (x.view(np.int32) + rng.integers(-2, 3, x.shape, dtype=np.int32)).view(np.float32)
    x[:, 5] = 127 * scales
    check(x * rng.choice(np.float32([-1, 1]), x.shape))


def test_quotients_between_a_whole_number_and_its_neighbour():
    """Kernels divide by corrected products, which can err only where a quotient is near to the middle of two floats.

    Codes depend on it only beside a half: all pairs of numbers whose quotient is within 16 times the error that these
    products may have, as far as f32 has a row with this scale.
    """
    rows = []
    for twice in range(1, 254, 2):
        for side in (-1, 1):
            bits = twice.bit_length() - (side < 0 and twice == 1)
            middle = (twice << (25 - bits)) + side  # the float beside `twice` is twice as far away
            for shift in (24, 25):
                off = np.arange(-64, 65)
                divisor = -off * pow(middle, -1, 1 << shift) % (1 << shift)
                number = (divisor * middle + off) >> shift
                fits = (divisor >> 23 == 1) & (number >> 23 == 1)
                scale = np.float32(divisor[fits]) * np.float32(2**-10)
                x = np.ldexp(np.float64(number[fits]), shift - 25 + bits - 11).astype(np.float32)
                top = (127 * scale.astype(np.float64)).astype(np.float32)
                reached = (top / np.float32(127) == scale) & (x <= top)
                rows.append(np.stack([top, x, -x, np.zeros_like(x)], axis=-1)[reached])
    x = np.concatenate(rows)
    assert len(x) > 2000
    near = np.abs(2 * x[:, 1].astype(np.float64) / oracle.quantize(x)[1] % 2 - 1)
    assert near.max() < 1e-4
    check(x)
    check(np.tile(x, 24))


@pytest.mark.parametrize("dtype", [np.float16, BF16])
def test_every_half_precision_number(dtype):
    x = np.arange(2**16, dtype=np.uint16).view(dtype)
    x = x[np.isfinite(x.astype(np.float32))]
    check(x.reshape(-1, 62 if dtype == np.float16 else 255))
    check(x[:, None])


def test_largest_numbers():
    # 127 * fl(MAX / 127) overflows, for this one absmax only; the codec's definition accepts that.
    codes, scales = check(np.float32([[MAX, -MAX, MAX / 2]]))
    assert_array_equal(dequantize_rows(codes, scales)[0, :2], [np.inf, -np.inf])
    below = np.nextafter(np.float32(MAX), np.float32(0))
    codes, scales = check(np.float32([[below, -below, MAX / 2]]))
    assert np.isfinite(dequantize_rows(codes, scales)).all()


def test_dequantize_any_codes_and_scales(rng):
    for dim in (*range(1, 40), 64, 80, 100, 128, 300):
        codes = rng.integers(-128, 128, (9, dim)).astype(np.int8)
        scales = (2.0 ** rng.uniform(-40, 20, 9)).astype(np.float32)
        check_dequantize(codes, scales)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(rng, dtype):
    x = rng.normal(size=(6, 5, 4, 48)).astype(dtype)
    views = [
        x.transpose(1, 0, 2, 3), x.transpose(2, 1, 0, 3), x.transpose(3, 1, 0, 2),
        x[::-1], x[:, ::-2], x[..., ::-1], x[:, :, 1], x[:, :, ::2, 3:40], x[2, 1, 3], x[2, :, 1, ::2],
        np.broadcast_to(x[0, 0, 0], (3, 7, 48)), x[:0], x[:, :, :, :1], x[:, :, None, ::3], x[:, :1, ::2],
    ]  # fmt: skip
    for view in views:
        check(view)


def test_unaligned_rows(rng):
    raw = rng.normal(size=(11, 33)).astype(np.float32)
    records = np.zeros(11, np.dtype([("pad", "u1"), ("row", "f4", 33)]))
    records["row"] = raw
    assert not records["row"].flags.aligned
    check(records["row"])


@pytest.mark.parametrize("threads", [None, 3, *sweep(1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(rng, dtype, threads):
    x = rng.normal(size=(3001, 7, 100)).astype(dtype)
    codes, scales = quantize_rows(x, threads=threads)
    want_codes, want_scales = oracle.quantize(x)
    assert_array_equal(codes, want_codes)
    assert_array_equal(scales, want_scales)
    got = dequantize_rows(codes, scales, dtype, threads=threads)
    assert_array_equal(got, oracle.dequantize(codes, scales).astype(dtype))
    swapped = x.transpose(1, 0, 2)
    assert_array_equal(quantize_rows(swapped, threads=threads)[0], codes.transpose(1, 0, 2))


@pytest.mark.parametrize("misplaced", [0, 1])
def test_codes_that_no_cache_holds(rng, misplaced):
    """From 16 MiB of codes on, they are written past the caches: in parts, whatever their alignment."""
    dim = 100
    some = rng.normal(size=(61, dim)).astype(np.float32)
    some_codes, some_scales = quantize_rows(some)
    repeats = (16 << 20) // some.size + 1
    x = np.tile(some, (repeats, 1))
    room = np.empty(x.size + misplaced + 1, np.int8)
    room[[0, -1]] = 99
    codes = room[misplaced : misplaced + x.size].reshape(x.shape)
    for threads in (1, 3):
        codes[:] = 99
        _, scales = quantize_rows(x, codes=codes, threads=threads)
        assert (codes.reshape(repeats, 61, dim) == some_codes).all()
        assert (scales.reshape(repeats, 61) == some_scales).all()
        assert room[-1] == 99
        assert not misplaced or room[0] == 99
    x[-2, 7] = np.nan
    with pytest.raises(NonFiniteError) as caught:
        quantize_rows(x, codes=codes)
    assert caught.value.actual == len(x) - 2


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_anywhere(rng, dtype, value):
    for dim in (1, 7, 16, 33, 64, 100):
        x = rng.normal(size=(3, 2, dim)).astype(dtype)
        for i in range(dim):
            bad = x.copy()
            bad[1, 1, i] = value
            with pytest.raises(NonFiniteError) as caught:
                quantize_rows(bad)
            assert (caught.value.position, caught.value.head) == (1, 1)


def test_not_finite_names_position_and_head():
    x = np.zeros((4, 3, 8), np.float32)
    x[2, 1, 5] = np.nan
    with pytest.raises(NonFiniteError, match="position 2, head 1") as caught:
        quantize_rows(x)
    assert caught.value.actual == 7
    with pytest.raises(NonFiniteError, match="row 7 of 12") as caught:
        quantize_rows(x.reshape(12, 8))
    assert caught.value.position is None
    with pytest.raises(NonFiniteError, match="row 7 of 12"):
        quantize_rows(x.reshape(2, 2, 3, 8))
    with pytest.raises(NonFiniteError, match="row 0 of 1"):
        quantize_rows(x[2, 1])


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_first_of_several_bad_rows(rng, threads):
    x = rng.normal(size=(4000, 4, 64)).astype(np.float32)
    for first in (3999, 2500, 1999, 17):
        x[first, 2, 63] = np.inf
        with pytest.raises(NonFiniteError) as caught:
            quantize_rows(x, threads=threads)
        assert (caught.value.position, caught.value.head) == (first, 2)
        with pytest.raises(NonFiniteError) as caught:
            quantize_rows(x.transpose(1, 0, 2), threads=threads)
        assert (caught.value.position, caught.value.head) == (2, first)


def test_outputs_given(rng):
    x = rng.normal(size=(3, 2, 24)).astype(np.float32)
    codes, scales = np.empty(x.shape, np.int8), np.empty((3, 2), np.float32)
    got = quantize_rows(x, codes=codes, scales=scales)
    assert got[0] is codes
    assert got[1] is scales
    check_dequantize(codes, scales)
    for dtype in DTYPES:
        out = np.empty(x.shape, dtype)
        assert dequantize_rows(codes, scales, dtype, out) is out
        assert_array_equal(out, dequantize_rows(codes, scales, dtype))


def test_outputs_refused(rng):
    x = rng.normal(size=(3, 2, 24)).astype(np.float32)
    codes, scales = quantize_rows(x)
    with pytest.raises(ShapeMismatchError, match=r"out must be \[3, 2, 24\], not \[3, 2, 25\]") as caught:
        dequantize_rows(codes, scales, out=np.empty((3, 2, 25), np.float32))
    assert caught.value.expected == (3, 2, 24)
    assert caught.value.actual == (3, 2, 25)
    with pytest.raises(DtypeError, match="out must be a numpy array of float32, not float16"):
        dequantize_rows(codes, scales, out=np.empty(x.shape, np.float16))
    with pytest.raises(DtypeError, match="out must be a numpy array of bfloat16, not list"):
        dequantize_rows(codes, scales, "bfloat16", out=[])
    with pytest.raises(ShapeMismatchError, match="out must be C-contiguous"):
        dequantize_rows(codes, scales, out=np.empty((24, 2, 3), np.float32).T)
    frozen = np.empty(x.shape, np.float32)
    frozen.flags.writeable = False
    with pytest.raises(ReadOnlyError, match="out is read-only"):
        dequantize_rows(codes, scales, out=frozen)
    with pytest.raises(ShapeMismatchError, match="codes must be"):
        quantize_rows(x, codes=np.empty((3, 48), np.int8))
    with pytest.raises(DtypeError, match="scales must be a numpy array of float32"):
        quantize_rows(x, scales=np.empty((3, 2)))


def test_dtype_names(rng):
    codes, scales = quantize_rows(rng.normal(size=(2, 8)).astype(np.float32))
    names = [("float32", np.float32), ("float16", np.float16), ("bfloat16", BF16)]
    for name, dtype in names:
        for spelling in (name, dtype, np.dtype(dtype)):
            assert dequantize_rows(codes, scales, spelling).dtype == dtype
    for wrong in ("float64", "int8", "no such", object(), np.float64):
        with pytest.raises(DtypeError, match='"float32", "float16" or "bfloat16"'):
            dequantize_rows(codes, scales, wrong)


def test_quantized_refused(rng):
    codes, scales = quantize_rows(rng.normal(size=(2, 8)).astype(np.float32))
    with pytest.raises(DtypeError, match="codes must be a numpy array of int8, not uint8"):
        dequantize_rows(codes.view(np.uint8), scales)
    with pytest.raises(DtypeError, match="scales must be a numpy array of float32, not float64"):
        dequantize_rows(codes, scales.astype(np.float64))
    with pytest.raises(ShapeMismatchError, match=r"scales must be one a row: \[2\] for codes \[2, 8\], not \[3\]"):
        dequantize_rows(codes, np.ones(3, np.float32))
    with pytest.raises(ShapeMismatchError, match="one a row"):
        dequantize_rows(np.array(3, np.int8), np.float32(1))


def test_single_row_and_strided_codes(rng):
    codes, scales = quantize_rows(rng.normal(size=(6, 8)).astype(np.float32))
    whole = dequantize_rows(codes, scales)
    assert_array_equal(dequantize_rows(codes[2], scales[2]), whole[2])
    assert_array_equal(dequantize_rows(codes[::-2], scales[::-2]), whole[::-2])
    one, scale = quantize_rows(np.arange(8, dtype=np.float32))
    assert one.shape == (8,)
    assert scale.shape == ()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 4), (0, 2, 4), (2, 3, 0)])
def test_empty(shape):
    codes, scales = quantize_rows(np.empty(shape, np.float32))
    assert codes.shape == shape
    assert (scales == MIN_SCALE).all()
    assert dequantize_rows(codes, scales).shape == shape
    assert quantization_error(np.empty(shape, np.float32), codes, scales) == 0.0


def test_inputs_refused():
    for dtype in (np.float64, np.int32, np.int8, bool, np.dtype(">f4")):
        with pytest.raises(DtypeError, match=r"pass x.astype\(np.float32\)") as caught:
            quantize_rows(np.zeros((2, 4), dtype))
        assert str(np.dtype(dtype)) == caught.value.actual
        assert isinstance(caught.value, TypeError)
    with pytest.raises(DtypeError, match=r"not list: convert with np\.asarray"):
        quantize_rows([[1.0, 2.0]])
    with pytest.raises(ShapeMismatchError, match="not a single number"):
        quantize_rows(np.array(1, np.float32))
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        quantize_rows(np.zeros((2, 4), np.float32), threads=0)


class Exporter:
    """What a framework we don't know hands over."""

    def __init__(self, array, device=(1, 0)):
        self.array = array
        self.dtype = array.dtype
        self.on = device

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.on


def test_dlpack(rng):
    x = rng.normal(size=(4, 3, 20)).astype(np.float32)
    for array in (x, x.astype(np.float16), x[:, ::-1], x.transpose(2, 0, 1), x[:0]):
        codes, scales = quantize_rows(Exporter(array))
        want_codes, want_scales = oracle.quantize(array)
        assert_array_equal(codes, want_codes)
        assert_array_equal(scales, want_scales)
    with pytest.raises(DtypeError, match=r"not float64: pass x\.astype"):
        quantize_rows(Exporter(x.astype(np.float64)))
    with pytest.raises(DtypeError, match=r"another device: pass x.cpu\(\)"):
        quantize_rows(Exporter(x, device=(2, 0)))


def test_torch(rng):
    torch = pytest.importorskip("torch")
    x = rng.normal(size=(5, 3, 40)).astype(np.float32)
    for dtype, same in ((torch.float32, np.float32), (torch.float16, np.float16), (torch.bfloat16, BF16)):
        tensor = torch.from_numpy(x).to(dtype)
        for view, array in (
            (tensor, x),
            (tensor.transpose(0, 1), x.transpose(1, 0, 2)),
            (tensor.permute(2, 1, 0), x.T),
        ):
            codes, scales = quantize_rows(view)
            want_codes, want_scales = oracle.quantize(array.astype(same))
            assert_array_equal(codes, want_codes)
            assert_array_equal(scales, want_scales)
            assert quantization_error(view, codes, scales) < 0.02
    assert_array_equal(quantize_rows(torch.from_numpy(x).requires_grad_())[0], quantize_rows(x)[0])
    with pytest.raises(DtypeError, match=r"not torch.float64: pass x.float\(\)"):
        quantize_rows(torch.from_numpy(x).double())
    with pytest.raises(DtypeError, match=r"on meta: pass x.cpu\(\)"):
        quantize_rows(torch.empty(2, 4, device="meta"))


def test_as_rows_copies_only_what_it_must(rng):
    x = rng.normal(size=(4, 3, 8)).astype(np.float32)
    assert as_rows(x)[0] is x
    for array, number in (
        (x.astype(np.float16), 1),
        (x.astype(BF16), 2),
        (x[:, ::2], 0),
        (x.swapaxes(0, 1), 0),
    ):
        rows, dtype = as_rows(array)
        assert dtype == number
        assert np.shares_memory(rows, array)
        assert rows.shape == array.shape
    rows, _ = as_rows(x.T)
    assert rows.strides[-1] == 4
    assert_array_equal(rows, x.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantization_error(rng, dtype):
    for shape in ((40, 3, 16), (5, 7), (9,), (1, 3000, 100), (700, 500), (2, 2, 100, 1000)):
        x = rng.normal(size=shape).astype(dtype)
        codes, scales = quantize_rows(x)
        want = np.abs(x.astype(np.float64) - oracle.dequantize(codes, scales)).mean()
        got = quantization_error(x, codes, scales)
        assert type(got) is float
        assert got == pytest.approx(want, rel=1e-12)
        reverse = (slice(None, None, -1),) * len(shape)
        assert quantization_error(x[reverse], codes[reverse], scales[reverse[1:]]) == pytest.approx(want)
    with pytest.raises(ShapeMismatchError, match="codes must be shaped like the original"):
        quantization_error(x, codes[:1], scales[:1])


def test_kernels_can_be_chosen(kernel):
    assert _core.current_kernel() == kernel
    with pytest.raises(ValueError, match="available_kernels"):
        _core.use_kernel("no such kernel")
