"""Arrays that callers pass in: which have their numbers in plain memory, and which do not.

kvmmap reads rows straight from memory. The memory of some arrays does not hold their values: a masked array has a
mask besides, a lazily negated tensor the opposite sign, a sparse one indices. Each is resolved without loss or refused.
What does not live here: dtypes, shapes, and what the numbers are for.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DtypeError

_PLAIN_NUMPY = (np.ndarray, np.memmap, np.matrix, np.recarray)
_NUMPY_READING = (
    "__getitem__",
    "__iter__",
    "__array__",
    "__array_ufunc__",
    "__array_function__",
    "__array_interface__",
    "__dlpack__",
    "tolist",
)
_TORCH_READING = (
    "__torch_dispatch__",
    "__getitem__",
    "__array__",
    "__dlpack__",
    "__dlpack_device__",
    "detach",
    "cpu",
    "numpy",
    "tolist",
)


def in_plain_memory(x: Any, name: str = "rows") -> Any:
    """Return `x`, or an array of the same values whose memory holds them; refuse what has no such array.

    Resolved: masked arrays without a masked entry, lazily negated, conjugated or zero tensors. Anything that is
    neither a numpy array nor a torch tensor is returned as it is.

    Args:
        x: what a caller passed in.
        name: what the error calls it.

    Raises:
        DtypeError: values masked out; a subclass of ndarray or Tensor that redefines how it is read; a sparse,
            nested, quantized, MKL-DNN, fake or functional (`torch.vmap`, `torch.func`) tensor.
    """
    if isinstance(x, np.ndarray):
        return x if type(x) in _PLAIN_NUMPY else _numpy_subclass(x, name)
    torch = sys.modules.get("torch")  # where there is a tensor, it was imported
    tensor = getattr(torch, "Tensor", None)
    if tensor is not None and isinstance(x, tensor):
        return _torch(torch, x, name)
    return x


def as_numpy(x: Any, name: str) -> NDArray[Any]:
    """Return `x` as a numpy array, as `np.asarray` makes it, but never with a mask or a sign lost.

    Args:
        x: an array, a tensor on the CPU, or nested sequences of numbers.
        name: what the error calls it.

    Raises:
        DtypeError: no such array can be made; as `in_plain_memory`.
    """
    plain = in_plain_memory(x, name)
    try:
        return np.asarray(plain)
    except Exception as error:  # __array__ of any class may raise anything
        raise DtypeError(
            f"{name} can't be read as an array ({type(error).__name__}: {str(error).partition(chr(10))[0]}): pass a "
            "numpy array, a CPU tensor or a list of numbers",
            expected="array",
            actual=type(x).__name__,
        ) from error


def _numpy_subclass(x: Any, name: str) -> Any:
    if isinstance(x, np.ma.MaskedArray):
        if np.ma.is_masked(x):
            raise _refused(f"{name} have masked entries: pass x.filled(value)", x)
        return np.ma.getdata(x)
    kind = type(x)
    if any(getattr(kind, part, None) is not getattr(np.ndarray, part, None) for part in _NUMPY_READING):
        raise _refused(
            f"{name} are a {kind.__name__}, a subclass that redefines how an array is read: pass a plain array, "
            "such as np.array(x, subok=False) if that has the right values",
            x,
        )
    return x


def _torch(torch: Any, x: Any, name: str) -> Any:
    kind = type(x)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter and _redefines_reading(torch, kind):
        raise _refused(
            f"{name} are a {kind.__name__}, a subclass of torch.Tensor that redefines how it is read: pass a plain "
            "tensor with its values",
            x,
        )
    if _in_a_transform(torch, x):
        raise _refused(
            f"{name} are inside a torch transform (vmap, grad, jvp, functionalize), where a tensor has no memory of "
            "its own: call kvmmap outside it",
            x,
        )
    if x.is_nested:
        raise _refused(f"{name} are a nested tensor: pass its parts one by one, or x.to_padded_tensor(0.0)", x)
    if x.layout is not torch.strided:
        raise _refused(f"{name} are a tensor of layout {x.layout}, not strided: pass x.to_dense()", x)
    if x.is_quantized:
        raise _refused(f"{name} are a quantized tensor ({x.dtype}): pass x.dequantize()", x)
    if x.is_neg() or x.is_conj():
        x = x.resolve_conj().resolve_neg()
    if x._is_zerotensor():
        x = x.clone()
    return x


def _redefines_reading(torch: Any, kind: Any) -> bool:
    if any(getattr(kind, part, None) is not getattr(torch.Tensor, part, None) for part in _TORCH_READING):
        return True
    function = kind.__torch_function__
    turned_off = torch.nn.Parameter.__torch_function__
    plain = torch.Tensor.__torch_function__.__func__
    return function is not turned_off and getattr(function, "__func__", None) is not plain


def _in_a_transform(torch: Any, x: Any) -> bool:
    return bool(torch._C._functorch.is_functorch_wrapped_tensor(x) or torch._is_functional_tensor(x))


def _refused(message: str, x: Any) -> DtypeError:
    return DtypeError(message, expected="values in plain memory", actual=type(x).__name__)
