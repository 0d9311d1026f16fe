"""int8 quantisation of arrays of any shape: `quantize_rows`, `dequantize_rows` and `quantization_error`.

A row is the `head_dim` numbers of one head at one position. What lives here: which arrays are taken, their
shapes and dtypes, and errors in words. What does not: files, layers, and the arithmetic, which is `_core`'s.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from . import _core
from .arrays import in_plain_memory
from .codecs.int8 import MIN_SCALE
from .errors import DtypeError, NonFiniteError, ShapeMismatchError
from .row_arrays import as_array, as_bits, as_rows, check_out, target_dtype, widened
from .threads import thread_count

__all__ = ["MIN_SCALE", "as_rows", "dequantize_rows", "quantization_error", "quantize_rows", "widened"]

_F32 = np.dtype(np.float32)
_INT8 = np.dtype(np.int8)

_BLOCK = 1 << 17  # numbers that `quantization_error` holds at a time


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
        threads: at most so many; by default those of KVMMAP_NUM_THREADS, or all processors.

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
    codes = np.empty(shape, _INT8) if codes is None else check_out(codes, "codes", shape, _INT8)
    scales = np.empty(shape[:-1], _F32) if scales is None else check_out(scales, "scales", shape[:-1], _F32)
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
        threads: at most so many; by default those of KVMMAP_NUM_THREADS, or all processors.

    Returns:
        [..., head_dim] in C order; `out` itself if given. In f16, what is beyond 65504 is infinite; in
        f32, only what was quantised from the largest finite number, whose scale is rounded up.

    Raises:
        ShapeMismatchError: scales are not one a row, or `out` has another shape or is not contiguous.
        DtypeError: codes are not int8, scales not f32, or `dtype` or out's is not one of the three.
        ReadOnlyError: `out` is not writable.
    """
    target, number = target_dtype(dtype)
    codes = _quantized(codes, "codes", _INT8)
    scales = _quantized(scales, "scales", _F32)
    shape = codes.shape
    if not shape or scales.shape != shape[:-1]:
        raise ShapeMismatchError(
            f"scales must be one a row: {list(shape[:-1])} for codes {list(shape)}, not {list(scales.shape)}",
            expected=shape[:-1],
            actual=scales.shape,
        )
    out = np.empty(shape, target) if out is None else check_out(out, "out", shape, target)
    _core.dequantize_rows(codes, scales, shape[-1], as_bits(out), number, thread_count(threads, codes.size))
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
    rows, _ = as_array(original)
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


def _quantized(array: Any, name: str, dtype: np.dtype[Any]) -> NDArray[Any]:
    if type(array) is np.ndarray and array.dtype is dtype and array.flags.c_contiguous:
        return array
    if isinstance(array, np.generic):  # the scale of a single row
        array = np.asarray(array)
    if not isinstance(array, np.ndarray) or array.dtype != dtype:
        actual = getattr(array, "dtype", type(array).__name__)
        raise DtypeError(
            f"{name} must be a numpy array of {dtype}, not {actual}", expected=str(dtype), actual=str(actual)
        )
    array = in_plain_memory(array, name)
    return array if array.flags.c_contiguous else np.ascontiguousarray(array)


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
