"""Arrays whose memory does not hold their values: each is resolved or refused, by everything that takes arrays."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.testing import assert_array_equal

import kvmmap
from kvmmap.arrays import as_numpy, in_plain_memory
from kvmmap.quantize import as_rows, dequantize_rows, quantization_error, quantize_rows, widened

HEADS, DIM = 2, 4
X = np.arange(1, 3 * HEADS * DIM + 1, dtype=np.float32).reshape(3, HEADS, DIM) / 8
Make = Callable[[np.ndarray], Any]


class Doubled(np.ndarray):
    """Reads as twice what its memory holds."""

    def __getitem__(self, key: Any) -> Any:
        return np.asarray(self)[key] * 2


class Named(np.ndarray):
    """Adds an attribute and leaves reading alone."""

    name = "a"


class Quantity(np.ndarray):
    """Has a unit, as astropy's quantities do."""

    def __array_ufunc__(self, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented


class FailingExporter:
    """Exports f32 on the CPU, and fails when it is asked for its numbers."""

    dtype = "float32"

    def __init__(self, error: Exception, *, device: bool = False) -> None:
        self.error = error
        self.device_fails = device

    def __dlpack__(self, **_: Any) -> Any:
        raise self.error

    def __dlpack_device__(self) -> tuple[int, int]:
        if self.device_fails:
            raise self.error
        return 1, 0


NUMPY: dict[str, tuple[Make, np.ndarray | None]] = {
    "plain": (lambda x: x.copy(), X),
    "masked": (lambda x: np.ma.array(x, mask=x > 0.5), None),
    "masked, hard": (lambda x: np.ma.array(x, mask=x == x.flat[0], hard_mask=True), None),
    "masked, bf16": (lambda x: np.ma.array(x.astype(ml_dtypes.bfloat16), mask=x > 0.5), None),
    "masked, f16": (lambda x: np.ma.masked_less(x.astype(np.float16), 1), None),
    "no mask set": (np.ma.array, X),
    "mask all False": (lambda x: np.ma.array(x, mask=np.zeros(x.shape, bool)), X),
    "redefined reading": (lambda x: x.view(Doubled), None),
    "redefined ufuncs": (lambda x: x.view(Quantity), None),
    "plain subclass": (lambda x: x.view(Named), X),
    "recarray": (lambda x: x.view(np.recarray), X),
    "negative strides": (lambda x: x[::-1][::-1], X),
    "object": (lambda x: x.astype(object), None),
    "big-endian": (lambda x: x.astype(">f4"), None),
    "structured": (lambda x: x.view([("a", "<f4")]), None),
    "raising exporter": (lambda x: FailingExporter(NotImplementedError("no")), None),
    "raising exporter, value": (lambda x: FailingExporter(ValueError("no")), None),
    "raising device": (lambda x: FailingExporter(RuntimeError("no"), device=True), None),
}


def tensors() -> dict[str, tuple[Make, np.ndarray | None]]:
    """Return what a tensor can be besides strided memory, and the values that it has, None where it is refused."""
    torch = pytest.importorskip("torch")
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.masked import masked_tensor

    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls: Any, inner: Any) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError(func)

    class Tripled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {}) * 3

    class Indexed(torch.Tensor):
        def __getitem__(self, key: Any) -> Any:
            return torch.Tensor.__getitem__(self, key) * 2

    class Labelled(torch.Tensor):
        label = "a"

    def t(x: np.ndarray) -> Any:
        return torch.from_numpy(x.copy())

    def fake(x: np.ndarray) -> Any:
        with FakeTensorMode():
            return torch.ones(x.shape)

    def inference(x: np.ndarray) -> Any:
        with torch.inference_mode():
            return t(x) + 0

    return {
        "tensor": (t, X),
        "parameter": (lambda x: torch.nn.Parameter(t(x)), X),
        "buffer": (lambda x: torch.nn.Buffer(t(x)), X),
        "not a leaf": (lambda x: torch.nn.Parameter(t(x)) * 1, X),
        "inference": (inference, X),
        "negated": (lambda x: torch._neg_view(t(x)), -X),
        "negated, a slice": (lambda x: torch._neg_view(t(np.concatenate([x, x])))[: len(x)], -X),
        "negated, transposed": (lambda x: torch._neg_view(t(x.swapaxes(0, -1))).transpose(0, -1), -X),
        "negated, f16": (lambda x: torch._neg_view(t(x).half()), -X),
        "negated, bf16": (lambda x: torch._neg_view(t(x).bfloat16()), -X),
        "imaginary part of a conjugate": (lambda x: torch.complex(t(x), t(x)).conj().imag, -X),
        "real part of a conjugate": (lambda x: torch.complex(t(x), t(x)).conj().real, X),
        "negated twice": (lambda x: torch._neg_view(torch._neg_view(t(x))), X),
        "conjugated": (lambda x: torch.complex(t(x), t(x)).conj(), None),
        "lazily zero": (lambda x: torch._efficientzerotensor(x.shape), 0 * X),
        "expanded": (lambda x: t(x[:1]).expand(x.shape), np.broadcast_to(X[:1], X.shape)),
        "plain subclass, torch": (lambda x: t(x).as_subclass(Labelled), X),
        "redefined functions": (lambda x: t(x).as_subclass(Tripled), None),
        "redefined indexing": (lambda x: t(x).as_subclass(Indexed), None),
        "wrapper subclass": (lambda x: Wrapper(t(x)), None),
        "masked tensor": (lambda x: masked_tensor(t(x), t(x) > 0.5), None),
        "sparse": (lambda x: t(x).to_sparse(), None),
        "sparse rows": (lambda x: t(x.reshape(len(x), -1)).to_sparse_csr(), None),
        "mkldnn": (lambda x: t(x).to_mkldnn(), None),
        "nested": (lambda x: torch.nested.nested_tensor(list(t(x))), None),
        "nested, jagged": (lambda x: torch.nested.nested_tensor(list(t(x)), layout=torch.jagged), None),
        "quantized": (lambda x: torch.quantize_per_tensor(t(x), 0.1, 0, torch.qint8), None),
        "quantized by channel": (
            lambda x: torch.quantize_per_channel(t(x), torch.ones(len(x)), torch.zeros(len(x)), 0, torch.qint8),
            None,
        ),
        "meta": (lambda x: t(x).to("meta"), None),
        "fake": (fake, None),
        "float8": (lambda x: t(x).to(torch.float8_e4m3fn), None),
        "uninitialized": (lambda x: torch.nn.UninitializedParameter(), None),
    }


def kinds() -> dict[str, tuple[Make, np.ndarray | None]]:
    return NUMPY | tensors()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():  # torch warns that some of these are prototypes
        warnings.simplefilter("ignore")
        yield


def as_f32(x: Any) -> np.ndarray:
    return widened(as_rows(x)[0])


def test_every_kind_of_array_is_read_correctly_or_refused() -> None:
    for name, (make, wanted) in kinds().items():
        array = make(X)
        if wanted is None:
            with pytest.raises(kvmmap.DtypeError) as caught:
                as_rows(array)
            assert "\n" not in str(caught.value), name
        else:
            assert_array_equal(as_f32(array), wanted, err_msg=name)


def test_every_method_accepts_or_refuses_every_kind(tmp_path) -> None:
    """Nothing is stored where it is refused."""

    def layer() -> kvmmap.QuantizedKvLayer:
        return kvmmap.QuantizedKvLayer(16, HEADS, DIM)

    stored = layer()
    stored.extend(X, X)
    path = tmp_path / "c.kvm"
    refusals = (kvmmap.DtypeError, kvmmap.ShapeMismatchError)
    for name, (make, wanted) in kinds().items():
        refused = wanted is None
        for key_side, value_side in ((True, True), (False, True), (True, False)):
            target = layer()
            keys, values = make(X) if key_side else X, make(X) if value_side else X
            if refused:
                with pytest.raises(refusals):
                    target.extend(keys, values)
            else:
                target.extend(keys, values)
            assert len(target) == (0 if refused else len(X)), name
        target = layer()
        one = make(X[0])
        with kvmmap.create(path, num_layers=2, capacity=8, num_kv_heads=HEADS, head_dim=DIM) as cache:
            if refused:
                with pytest.raises(refusals):
                    stored.attend(make(X), causal=False)
                with pytest.raises(refusals):
                    stored.select_blocks(one, 1)
                with pytest.raises(refusals):
                    target.push(one, one)
                with pytest.raises(refusals):
                    cache.push_step([one, one], [one, one])
                with pytest.raises(refusals):
                    cache.extend([make(X)] * 2, [make(X)] * 2)
                with pytest.raises(refusals):
                    cache.extend(make(np.stack([X, X])), make(np.stack([X, X])))
                assert cache.seq_len == len(cache.layers[0]) == len(target) == 0, name
            else:
                want = stored.attend(np.ascontiguousarray(wanted), causal=False)
                assert_array_equal(stored.attend(make(X), causal=False, precision="exact"), want, err_msg=name)
                target.push(one, one)
                cache.push_step([one, one], [one, one])
                cache.extend([make(X)] * 2, [make(X)] * 2)
                whole = make(np.stack([X[:1], X[:1]]))
                cache.extend(whole, whole)
                codes = quantize_rows(wanted)[0]
                first = quantize_rows(widened(as_rows(whole)[0][1]))[0]
                assert_array_equal(cache.layers[1].key_codes[1:4], codes, err_msg=name)
                pushed = quantize_rows(widened(as_rows(one)[0]))[0]
                assert_array_equal(cache.layers[1].value_codes[0], pushed, err_msg=name)
                assert_array_equal(cache.layers[0].key_codes[4:], first, err_msg=name)
                assert_array_equal(target.key_codes[0], pushed, err_msg=name)
        path.unlink()


def test_inside_a_transform(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    from torch._functorch.eager_transforms import functionalize

    layer = kvmmap.QuantizedKvLayer(16, HEADS, DIM)
    refused = []

    def store(x: Any) -> Any:
        with pytest.raises(kvmmap.DtypeError, match="inside a torch transform"):
            layer.extend(x, x)
        refused.append(x)
        return x.sum()

    t = torch.from_numpy(X.copy())
    torch.vmap(store)(torch.stack([t, t]))
    torch.vmap(torch.vmap(store))(torch.stack([t, t])[None])
    torch.func.grad(store)(t)
    torch.func.jvp(store, (t,), (t,))
    functionalize(store)(t)
    torch.func.jacrev(store)(t)
    assert len(refused) == 6
    assert len(layer) == 0
    with torch.autograd.forward_ad.dual_level():  # the primal values are in plain memory
        dual = torch.autograd.forward_ad.make_dual(t, t)
        assert_array_equal(as_f32(dual), X)


def test_quantized_rows_ids_blocks_and_parts_likewise() -> None:
    codes, scales = quantize_rows(X)
    layer = kvmmap.QuantizedKvLayer(16, HEADS, DIM)
    hidden = np.zeros(codes.shape, bool)
    hidden[1] = True
    masked_codes, masked_scales = np.ma.array(codes, mask=hidden), np.ma.array(scales, mask=hidden[..., 0])
    for given in (
        (masked_codes, scales, codes, scales),
        (codes, masked_scales, codes, scales),
        (codes, scales, masked_codes, scales),
        (codes, scales, codes, masked_scales),
    ):
        with pytest.raises(kvmmap.DtypeError, match="masked entries"):
            layer.extend_quantized(*given)
    assert len(layer) == 0
    layer.extend_quantized(np.ma.array(codes), scales, codes, np.ma.array(scales))
    assert_array_equal(layer.key_codes, codes)
    with pytest.raises(kvmmap.DtypeError, match="codes have masked entries"):
        dequantize_rows(masked_codes, scales)
    with pytest.raises(kvmmap.DtypeError, match="rows have masked entries"):
        quantization_error(np.ma.array(X, mask=hidden), codes, scales)
    with pytest.raises(kvmmap.DtypeError, match="would hide what is written"):
        dequantize_rows(codes, scales, out=np.ma.zeros(X.shape, np.float32))
    with pytest.raises(kvmmap.DtypeError, match="blocks have masked entries"):
        layer.attend(X, positions=np.ma.array([0, 0], mask=[False, True]))
    part, lse = layer.attend(X, causal=False, return_lse=True)
    with pytest.raises(kvmmap.DtypeError, match="outputs have masked entries"):
        kvmmap.merge_attention([part, np.ma.array(part, mask=part > 0)], [lse, lse])
    with pytest.raises(kvmmap.DtypeError, match="lses have masked entries"):
        kvmmap.merge_attention([part, part], [lse, np.ma.array(lse, mask=lse > -9)])


def test_token_ids_of_every_kind(tmp_path) -> None:
    torch = pytest.importorskip("torch")
    ids = torch.arange(3)
    good = [ids, ids.int(), [0, 1, 2], (0, 1, 2), range(3), np.ma.array([0, 1, 2]), ids.requires_grad_(False)]
    bad = [
        np.ma.array([0, 1, 2], mask=[False, False, True]),
        torch.vmap,
        ids.to("meta"),
        ids.to_sparse(),
        ids.bfloat16(),
        ids.float().requires_grad_(),
        torch.nested.nested_tensor([ids, ids]),
        [[0], [1, 2]],
        "012",
        {0, 1, 2},
        [0, None, 2],
        np.array([0, 1, 2]).view(Doubled),
    ]
    path = tmp_path / "c.kvm"
    with kvmmap.create(path, num_layers=1, capacity=64, num_kv_heads=HEADS, head_dim=DIM) as cache:
        for given in good:
            cache.extend([X], [X], token_ids=given)
        before = cache.seq_len
        assert_array_equal(cache.token_ids, np.tile([0, 1, 2], len(good)))
        for given in bad:
            with pytest.raises((kvmmap.DtypeError, kvmmap.ShapeMismatchError)):
                cache.extend([X], [X], token_ids=given)
            with pytest.raises((kvmmap.DtypeError, kvmmap.ShapeMismatchError)):
                cache.push_token_ids(given)
        assert cache.seq_len == before
        assert cache.token_len == before
        for step in ([[1.0]], [3], [{}], [None], ["a"]):
            with pytest.raises((kvmmap.DtypeError, kvmmap.ShapeMismatchError)):
                cache.push_step(step, step)


def test_plain_arrays_are_not_copied() -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.from_numpy(X)
    assert in_plain_memory(X) is X
    assert in_plain_memory(tensor) is tensor
    assert np.shares_memory(as_rows(tensor)[0], X)
    assert np.shares_memory(as_numpy(tensor, "rows"), X)
    assert np.shares_memory(as_rows(np.ma.array(X))[0], X)
    some = object()
    assert in_plain_memory(some) is some


def test_a_device_that_is_not_the_cpus_is_named_first() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(kvmmap.DtypeError, match=r"on meta: pass x\.cpu\(\)"):
        as_rows(torch.empty(2, device="meta"))
