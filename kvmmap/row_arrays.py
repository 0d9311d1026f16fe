"""Arrays of rows: which dtypes are taken and given, and how rows come out of any array.

Dtypes of rows are numbered, as the compiled core counts them: 0 for f32, 1 for f16, 2 for bf16, whose array is its raw
bits, uint16. What does not live here: what rows are encoded to, and which arrays have their numbers in plain memory
(`arrays`).
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _core
from .arrays import in_plain_memory
from .errors import DtypeError, ReadOnlyError, ShapeMismatchError

_F32 = np.dtype(np.float32)
_F16 = np.dtype(np.float16)
_UINT16 = np.dtype(np.uint16)
_USUAL: dict[str, tuple[np.dtype[Any], int]] = {"float32": (_F32, 0), "float16": (_F16, 1)}
_NAMES = ("float32", "float16", "bfloat16")
_CPU = 1  # DLPack's kDLCPU


@functools.cache
def bfloat16() -> np.dtype[Any]:
    """bfloat16, which is not numpy's own. Its library is loaded when it is first needed: most programs never do."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def dtype_number(dtype: np.dtype[Any]) -> int | None:
    """Return what `_core` calls a dtype of rows, None if it is none."""
    if dtype == _F32:
        return 0
    if dtype == _F16:
        return 1
    return 2 if dtype.kind == "V" and dtype == bfloat16() else None


def as_rows(x: Any) -> tuple[NDArray[Any], int]:
    """Return (x as an array whose last axis is contiguous, dtype number), as `_core.quantize_rows` wants it.

    Numbers: 0 for f32, 1 for f16, 2 for bf16, whose array is the raw bits, uint16. Copies only an array whose
    last axis has strides. A push of one position calls this twice, so usual arrays take the shortest way.

    Raises:
        DtypeError: another dtype, or not in the CPU's memory.
    """
    if type(x) is np.ndarray and x.flags.c_contiguous:
        dtype = x.dtype
        if dtype is _F32:
            return x, 0
        if dtype is _F16:
            return x, 1
        if dtype.kind == "V" and dtype is bfloat16():
            return x.view(_UINT16), 2
    array, number = as_array(x)
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array)
    return array, number


def widened(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return an array of `as_rows` as f32; itself if it is."""
    return rows.view(bfloat16()).astype(_F32) if rows.dtype == np.uint16 else rows.astype(_F32, copy=False)


def as_array(x: Any) -> tuple[NDArray[Any], int]:
    """As `as_rows`, whatever the strides; a copy only of what `in_plain_memory` resolves."""
    x = in_plain_memory(x)
    if isinstance(x, np.ndarray):
        number = dtype_number(x.dtype)
        if number is None:
            raise _wrong_dtype(x.dtype, "x.astype(np.float32)")
        return as_bits(np.asarray(x)), number
    if not hasattr(x, "__dlpack__"):
        raise DtypeError(
            f"rows must be a numpy array or a CPU tensor (anything with __dlpack__), not {type(x).__name__}: "
            "convert with np.asarray(x, dtype=np.float32)",
            expected="array",
            actual=type(x).__name__,
        )
    device = getattr(x, "device", None)
    if getattr(device, "type", "cpu") != "cpu" or _dlpack_device(x) != _CPU:
        where = device if device is not None else "another device"
        raise DtypeError(
            f"rows must be in the CPU's memory, and this tensor is on {where}: pass x.cpu()",
            expected="cpu",
            actual=str(where),
        )
    if getattr(x, "requires_grad", False):
        x = x.detach()
    try:
        array, number = _core.import_dlpack(x)
    except Exception as error:  # an exporter may raise anything
        dtype = getattr(x, "dtype", type(x).__name__)
        if str(dtype).rpartition(".")[2] in _NAMES:
            raise DtypeError(
                f"rows can't be read from this {type(x).__name__} ({type(error).__name__}: {error}): pass a plain "
                "numpy array or CPU tensor",
                expected="array",
                actual=type(x).__name__,
            ) from error
        raise _wrong_dtype(dtype, "x.float()" if hasattr(x, "float") else "x.astype(np.float32)") from None
    return array.view(_F32) if number == 0 else array.view(_F16) if number == 1 else array, number


def _dlpack_device(x: Any) -> int:
    """Return DLPack's number of the device that an exporter is on."""
    try:
        return int(x.__dlpack_device__()[0])
    except Exception as error:  # an exporter may raise anything
        raise DtypeError(
            f"rows can't be read from this {type(x).__name__}: its __dlpack_device__ raised "
            f"{type(error).__name__}: {error}",
            expected="cpu",
            actual=type(x).__name__,
        ) from error


def as_bits(array: NDArray[Any]) -> NDArray[Any]:
    """A view that has a buffer: bf16, which is not Python's, as its raw bits."""
    return array.view(_UINT16) if dtype_number(array.dtype) == 2 else array


def output_array(shape: tuple[int, ...], dtype: Any, out: Any = None) -> NDArray[Any]:
    """Return `out` if it is such an array as `dequantize_rows` fills, or make one.

    Raises:
        ShapeMismatchError, DtypeError, ReadOnlyError: as `dequantize_rows`.
    """
    target, _ = target_dtype(dtype)
    return np.empty(shape, target) if out is None else check_out(out, "out", shape, target)


def target_dtype(dtype: Any) -> tuple[np.dtype[Any], int]:
    """Return the dtype that is asked for, and its number; the usual ones by the shortest way."""
    return (_USUAL.get(dtype) if type(dtype) is str else None) or _unusual_target(dtype)


def _unusual_target(dtype: Any) -> tuple[np.dtype[Any], int]:
    number = None
    with contextlib.suppress(TypeError):
        dtype = bfloat16() if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)
        number = dtype_number(dtype)
    if number is None:
        raise DtypeError(
            f'dtype must be "float32", "float16" or "bfloat16", not {dtype!r}',
            expected=_NAMES,
            actual=str(dtype),
        )
    return dtype, number


def check_out(out: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if not isinstance(out, np.ndarray) or out.dtype != dtype:
        actual = getattr(out, "dtype", type(out).__name__)
        raise DtypeError(
            f"{name} must be a numpy array of {dtype}, not {actual}", expected=str(dtype), actual=str(actual)
        )
    if out.shape != shape:
        raise ShapeMismatchError(
            f"{name} must be {list(shape)}, not {list(out.shape)}", expected=shape, actual=out.shape
        )
    if not out.flags.c_contiguous:
        raise ShapeMismatchError(
            f"{name} must be C-contiguous: pass np.empty({shape}, dtype) or a slice of its leading axis",
            expected="C-contiguous",
            actual=out.strides,
        )
    if isinstance(out, np.ma.MaskedArray):
        raise DtypeError(
            f"{name} is a masked array, whose mask would hide what is written: pass {name}.data",
            expected="ndarray",
            actual=type(out).__name__,
        )
    if not out.flags.writeable:
        raise ReadOnlyError(f"{name} is read-only: pass an array that may be written")
    return out


def _wrong_dtype(actual: Any, remedy: str) -> DtypeError:
    return DtypeError(
        f"rows must be float32, float16 or bfloat16, not {actual}: pass {remedy}",
        expected=_NAMES,
        actual=str(actual),
    )
