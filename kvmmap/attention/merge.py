"""Partial results of attention, merged by their log-sum-exp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..arrays import as_numpy
from ..errors import DtypeError, ShapeMismatchError

_F32 = np.dtype(np.float32)


def merge_attention(
    outputs: Sequence[NDArray[np.float32]], lses: Sequence[NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Combine attention over disjoint sets of keys into attention over all of them, exactly.

        lse = log(sum_i e^lse_i),   out = sum_i e^(lse_i - lse) * out_i

    (Flash-Decoding; Dao et al. 2023.) The parts may come from different caches, such as a shared prefix and a private
    tail, or from other code that gives its log-sum-exp.

    Args:
        outputs: a part each, f32 [..., value_head_dim], all of one shape.
        lses: the parts' log-sum-exp, f32 [...], natural logarithm; -inf where a part saw nothing.

    Returns:
        out, f32 [..., value_head_dim], and lse, f32 [...]; zeros and -inf where no part saw anything.

    Raises:
        ShapeMismatchError: there are no parts, or their shapes differ.
        DtypeError: a part is no array of real numbers whose values lie in plain memory (a masked array, a functional
            tensor).
    """
    outputs, lses = _parts(outputs, "outputs"), _parts(lses, "lses")
    if not outputs or len(outputs) != len(lses):
        raise ShapeMismatchError(
            f"give at least one output, and as many lses: there are {len(outputs)} and {len(lses)}",
            expected=len(outputs),
            actual=len(lses),
        )
    shape = outputs[0].shape
    if not shape:
        raise ShapeMismatchError(
            "outputs must be [..., value_head_dim], not single numbers", expected=("...",), actual=()
        )
    for output, lse in zip(outputs, lses, strict=True):
        if output.shape != shape or lse.shape != shape[:-1]:
            raise ShapeMismatchError(
                f"all outputs must be {list(shape)} and all lses {list(shape[:-1])}; one pair is "
                f"{list(output.shape)} and {list(lse.shape)}",
                expected=shape,
                actual=output.shape,
            )
    merging = Merging(shape)
    for output, lse in zip(outputs, lses, strict=True):
        merging.add(output, lse)
    result = np.empty(shape, _F32)
    return result, merging.end(result)


def _parts(parts: Sequence[Any], name: str) -> list[NDArray[Any]]:
    try:
        arrays = [as_numpy(part, name) for part in parts]
    except DtypeError:
        raise
    except TypeError:
        raise DtypeError(f"{name} must be a sequence of arrays, not {type(parts).__name__}") from None
    for array in arrays:
        if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
            raise DtypeError(f"{name} must hold real numbers, not {array.dtype}", actual=str(array.dtype))
    return arrays


class Merging:
    """What `merge_attention` does, part by part: as much memory for any number of parts."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._rows = shape[:-1]
        # What lies where in it, `_core` knows; it begins with the largest lse so far.
        self._state = np.zeros((*shape[:-1], 2 + shape[-1]))
        self._state[..., 0] = -np.inf

    def add(self, output: NDArray[np.float32], lse: NDArray[np.float32]) -> None:
        """Take a part in."""
        _core.merge_part(self._state, np.ascontiguousarray(output, _F32), np.ascontiguousarray(lse, _F32))

    def end(self, out: NDArray[np.float32]) -> NDArray[np.float32]:
        """Put what comes of all parts so far into `out`, C-contiguous, and return the lse."""
        lse = np.empty(self._rows, _F32)
        _core.merge_end(self._state, out, lse)
        return lse
