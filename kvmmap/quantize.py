"""The row codec: int8 codes with one f32 scale per row. The Python face of the compiled kernels.

A row is the `head_dim` numbers of one head at one position. What lives here: which arrays are taken, their
shapes and dtypes, and errors in words. What does not: files, layers, and the arithmetic, which is `_core`'s.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core
from .arrays import in_plain_memory
from .errors import DtypeError, NonFiniteError, ReadOnlyError, ShapeMismatchError

MIN_SCALE = 2.0**-23
"""The scale of a row of zeros, and the smallest there is."""

_F32 = np.dtype(np.float32)
_F16 = np.dtype(np.float16)
_INT8 = np.dtype(np.int8)
_UINT16 = np.dtype(np.uint16)
_USUAL: dict[str, tuple[np.dtype[Any], int]] = {"float32": (_F32, 0), "float16": (_F16, 1)}  # as _core counts
_NAMES = ("float32", "float16", "bfloat16")
_CPU = 1  # DLPack's kDLCPU

# Below this many numbers a second thread never pays, and one need not ask how many processors there are.
_ONE_THREAD = 1 << 18
_BLOCK = 1 << 17  # numbers that `quantization_error` holds at a time


@functools.cache
def _bf16() -> np.dtype[Any]:
    """bfloat16, which is not numpy's own. Its library is loaded when it is first needed: most programs never do."""
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def _number(dtype: np.dtype[Any]) -> int | None:
    """Return what `_core` calls a dtype of rows, None if it is none."""
    if dtype == _F32:
        return 0
    if dtype == _F16:
        return 1
    return 2 if dtype.kind == "V" and dtype == _bf16() else None


def quantize_rows(
    x: Any,
    *,
    codes: NDArray[np.int8] | None = None,
    scales: NDArray[np.float32] | None = None,
    threads: int | None = None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Quantise every row, that is, along the last axis.

    Symmetric absmax quantisation (Dettmers et al., "LLM.int8()", arXiv:2208.07339, section 2) of each row:

        scale = max(max|x| / 127, 2**-23)
        code  = clamp(round_half_away_from_zero(x / scale), -127, 127)

    in IEEE f32, so that every machine gives the same bytes; |x - code * scale| <= scale / 2 up to rounding.

    Args:
        x: [..., head_dim]; f32, f16 or bf16, any strides; numpy, torch or any DLPack exporter on the CPU.
        codes: where to put the codes, int8 of x's shape, C-contiguous; new by default.
        scales: where to put the scales, f32 [...], C-contiguous; new by default.
        threads: at most so many; as many as there are processors to run on by default.

    Returns:
        codes, int8 [..., head_dim], and scales, f32 [...], in C order; the arguments themselves if given.

    Raises:
        NonFiniteError: a NaN or an infinity; names the first such position and head of [n, heads, head_dim],
            and of any other shape the flat row (`actual`). `codes` and `scales` then hold anything.
        ShapeMismatchError: x is a single number; `codes` or `scales` have another shape or have gaps.
        DtypeError: another dtype, or not in the CPU's memory.
        ReadOnlyError: `codes` or `scales` are not writable.
    """
    rows, dtype = as_rows(x)
    if rows.ndim == 0:
        raise ShapeMismatchError(
            "rows must be [..., head_dim], not a single number", expected=("...", "head_dim"), actual=()
        )
    shape = rows.shape
    codes = np.empty(shape, _INT8) if codes is None else _check_out(codes, "codes", shape, _INT8)
    scales = np.empty(shape[:-1], _F32) if scales is None else _check_out(scales, "scales", shape[:-1], _F32)
    bad = _core.quantize_rows(_as_grid(rows), dtype, codes, scales, thread_count(threads, rows.size))
    if bad >= 0:
        raise _non_finite(bad, shape)
    return codes, scales


def dequantize_rows(
    codes: NDArray[np.int8],
    scales: NDArray[np.float32],
    dtype: DTypeLike = "float32",
    out: NDArray[Any] | None = None,
    *,
    threads: int | None = None,
) -> NDArray[Any]:
    """Return code * scale: the product in f32, then rounded to nearest even.

    Args:
        codes: int8 [..., head_dim], any strides.
        scales: f32 [...].
        dtype: "float32", "float16" or "bfloat16" (`ml_dtypes.bfloat16`), or the numpy dtype of one.
        out: where to put them, [..., head_dim] of that dtype, C-contiguous; new by default.
        threads: at most so many; as many as there are processors to run on by default.

    Returns:
        [..., head_dim] in C order; `out` itself if given. In f16, what is beyond 65504 is infinite; in
        f32, only what was quantised from the largest finite number, whose scale is rounded up.

    Raises:
        ShapeMismatchError: scales are not one a row, or `out` has another shape or is not contiguous.
        DtypeError: codes are not int8, scales not f32, or `dtype` or out's is not one of the three.
        ReadOnlyError: `out` is not writable.
    """
    target, number = _target(dtype)
    codes = _quantized(codes, "codes", _INT8)
    scales = _quantized(scales, "scales", _F32)
    shape = codes.shape
    if not shape or scales.shape != shape[:-1]:
        raise ShapeMismatchError(
            f"scales must be one a row: {list(shape[:-1])} for codes {list(shape)}, not {list(scales.shape)}",
            expected=shape[:-1],
            actual=scales.shape,
        )
    out = np.empty(shape, target) if out is None else _check_out(out, "out", shape, target)
    _core.dequantize_rows(codes, scales, shape[-1], _bits(out), number, thread_count(threads, codes.size))
    return out


def quantization_error(original: Any, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> float:
    """Return the mean absolute error of codes * scales against what was quantised; 0.0 of nothing.

    Args:
        original: [..., head_dim], as `quantize_rows` takes it.
        codes: int8 [..., head_dim].
        scales: f32 [...].

    Raises:
        ShapeMismatchError, DtypeError: as `quantize_rows` and `dequantize_rows`, or the shapes differ.
    """
    rows, _ = _as_array(original)
    codes = _quantized(codes, "codes", _INT8)
    scales = _quantized(scales, "scales", _F32)
    if rows.shape != codes.shape or scales.shape != rows.shape[:-1] or not rows.ndim:
        raise ShapeMismatchError(
            f"codes must be shaped like the original, {list(rows.shape)}, and scales be one a row; they are "
            f"{list(codes.shape)} and {list(scales.shape)}",
            expected=rows.shape,
            actual=codes.shape,
        )
    total = 0.0
    for x, c, s in _blocks(rows, codes, scales):
        difference = np.subtract(widened(x), dequantize_rows(c, s, threads=1), dtype=np.float64)
        total += float(np.abs(difference, out=difference).sum())
    return total / rows.size if rows.size else 0.0


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
        if dtype.kind == "V" and dtype is _bf16():
            return x.view(_UINT16), 2
    array, number = _as_array(x)
    if array.ndim and array.shape[-1] > 1 and array.strides[-1] != array.itemsize:
        array = np.ascontiguousarray(array)
    return array, number


def widened(rows: NDArray[Any]) -> NDArray[np.float32]:
    """Return an array of `as_rows` as f32; itself if it is."""
    return rows.view(_bf16()).astype(_F32) if rows.dtype == np.uint16 else rows.astype(_F32, copy=False)


def _as_array(x: Any) -> tuple[NDArray[Any], int]:
    """As `as_rows`, whatever the strides; a copy only of what `in_plain_memory` resolves."""
    x = in_plain_memory(x)
    if isinstance(x, np.ndarray):
        number = _number(x.dtype)
        if number is None:
            raise _wrong_dtype(x.dtype, "x.astype(np.float32)")
        return _bits(np.asarray(x)), number
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


def _bits(array: NDArray[Any]) -> NDArray[Any]:
    """A view that has a buffer: bf16, which is not Python's, as its raw bits."""
    return array.view(_UINT16) if _number(array.dtype) == 2 else array


def _as_grid(rows: NDArray[Any]) -> NDArray[Any]:
    """Rows as [outer, inner, head_dim]: a view where their strides allow, else one contiguous copy."""
    if rows.ndim == 3:
        return rows
    dim = rows.shape[-1]
    if rows.ndim < 3:
        return rows[None, None] if rows.ndim == 1 else rows[:, None]
    lead = [(n, step) for n, step in zip(rows.shape[:-1], rows.strides[:-1], strict=True) if n != 1]
    breaks = [i for i in range(1, len(lead)) if lead[i - 1][1] != lead[i][0] * lead[i][1]]
    split = breaks[0] if breaks else len(lead)
    outer = math.prod(n for n, _ in lead[:split])
    inner = math.prod(n for n, _ in lead[split:])
    if len(breaks) > 1:
        rows = np.ascontiguousarray(rows)
    return rows.reshape(outer, inner, dim)


def _blocks(*arrays: NDArray[Any]) -> Iterator[tuple[NDArray[Any], ...]]:
    """Cut arrays with the same leading axes into views of bounded size, but never within a row."""
    first = arrays[0]
    if first.ndim == 1 or first.size <= _BLOCK:
        yield arrays
    elif len(first) == 1:
        yield from _blocks(*(a[0] for a in arrays))
    else:
        half = len(first) // 2
        yield from _blocks(*(a[:half] for a in arrays))
        yield from _blocks(*(a[half:] for a in arrays))


def thread_count(threads: int | None, numbers: int) -> int:
    """Return how many threads work on so many numbers may take: `threads`, or as many as there are processors."""
    if threads is None:
        if numbers < _ONE_THREAD:
            return 1
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads < 1:
        raise ValueError(f"threads must be at least 1, not {threads}; None takes all processors")
    return threads


def output_array(shape: tuple[int, ...], dtype: Any, out: Any = None) -> NDArray[Any]:
    """Return `out` if it is such an array as `dequantize_rows` fills, or make one.

    Raises:
        ShapeMismatchError, DtypeError, ReadOnlyError: as `dequantize_rows`.
    """
    target, _ = _target(dtype)
    return np.empty(shape, target) if out is None else _check_out(out, "out", shape, target)


def _target(dtype: Any) -> tuple[np.dtype[Any], int]:
    """Return the dtype that is asked for, and its number; the usual ones by the shortest way."""
    return (_USUAL.get(dtype) if type(dtype) is str else None) or _unusual_target(dtype)


def _unusual_target(dtype: Any) -> tuple[np.dtype[Any], int]:
    number = None
    with contextlib.suppress(TypeError):
        dtype = _bf16() if isinstance(dtype, str) and dtype == "bfloat16" else np.dtype(dtype)
        number = _number(dtype)
    if number is None:
        raise DtypeError(
            f'dtype must be "float32", "float16" or "bfloat16", not {dtype!r}',
            expected=_NAMES,
            actual=str(dtype),
        )
    return dtype, number


def _quantized(array: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    if isinstance(array, np.generic):  # the scale of a single row
        array = np.asarray(array)
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        actual = getattr(array, "dtype", type(array).__name__)
        raise DtypeError(
            f"{name} must be a numpy array of {dtype}, not {actual}", expected=str(dtype), actual=str(actual)
        )
    array = in_plain_memory(array, name)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


def _check_out(out: Any, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
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


def _non_finite(row: int, shape: tuple[int, ...]) -> NonFiniteError:
    if len(shape) == 3:
        position, head = divmod(row, shape[1])
        return NonFiniteError(
            f"a NaN or an infinity at position {position}, head {head}",
            position=position,
            head=head,
            actual=row,
        )
    return NonFiniteError(f"a NaN or an infinity in row {row} of {math.prod(shape[:-1])}", actual=row)
