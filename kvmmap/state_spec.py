"""States of fixed size that layers keep beside their rows: what one is called, its dtype and its shape. Pure.

A recurrent layer overwrites its states at every position, so they hold for one position only. Where checkpoints of
them are stored is not known here.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import DtypeError, ShapeMismatchError
from .row_arrays import bfloat16

STATE_DTYPES = {
    "float32": 1,
    "float16": 2,
    "bfloat16": 3,
    "float64": 4,
    "int8": 5,
    "uint8": 6,
    "int16": 7,
    "int32": 8,
    "int64": 9,
    "bool": 10,
}
"""Names of the dtypes that a state may have, and their numbers in files."""

CHECKPOINT_SLOTS = 4
"""Checkpoints that a cache with states keeps, unless asked otherwise."""

MAX_CHECKPOINT_SLOTS = 4096
MAX_STATES = 65_535
MAX_STATE_DIMS = 8
MAX_NAME_BYTES = 48
MAX_CHECKPOINT_BYTES = 2**46
STATE_ALIGNMENT = 64

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True, slots=True)
class StateSpec:
    """One state tensor of a layer."""

    layer: int
    """Index of the layer that it belongs to."""

    name: str
    """Its name within the layer: letters, digits, "_", "-" and ".", 48 at most."""

    dtype: str
    """"float32", "float16", "bfloat16", "float64", "int8", "uint8", "int16", "int32", "int64" or "bool"."""

    shape: tuple[int, ...]
    """1 to 8 axes, none of them empty."""

    def __post_init__(self) -> None:
        layer = _whole(self.layer, "the layer of a state")
        if not isinstance(self.name, str) or not _NAME.fullmatch(self.name) or len(self.name) > MAX_NAME_BYTES:
            raise ShapeMismatchError(
                f"a state's name must be of letters, digits, '_', '-' and '.', at most {MAX_NAME_BYTES}, not "
                f"{self.name!r}",
                expected=MAX_NAME_BYTES,
                actual=self.name,
                layer=layer,
            )
        name = dtype_name(self.dtype)
        shape = tuple([_whole(size, f"the shape of state {self.name!r}") for size in self.shape])
        if not 1 <= len(shape) <= MAX_STATE_DIMS or min(shape) < 1 or math.prod(shape) > MAX_CHECKPOINT_BYTES // 8:
            raise ShapeMismatchError(
                f"state {self.name!r} of layer {layer} must have 1 to {MAX_STATE_DIMS} axes, none of them empty, not "
                f"{list(shape)}",
                expected=(1, MAX_STATE_DIMS),
                actual=shape,
                layer=layer,
            )
        object.__setattr__(self, "layer", layer)
        object.__setattr__(self, "dtype", name)
        object.__setattr__(self, "shape", shape)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """The dtype as numpy has it; `ml_dtypes.bfloat16` for "bfloat16"."""
        return bfloat16() if self.dtype == "bfloat16" else np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * (2 if self.dtype == "bfloat16" else np.dtype(self.dtype).itemsize)

    def __str__(self) -> str:
        return f"state {self.name!r} of layer {self.layer}"


def dtype_name(dtype: object) -> str:
    """Return the name of a dtype that a state may have: given by name, or as numpy's or torch's dtype.

    Raises:
        DtypeError: a state can't have it.
    """
    text = dtype if isinstance(dtype, str) else str(dtype).removeprefix("torch.")
    if text not in STATE_DTYPES and not isinstance(dtype, str):
        try:
            text = np.dtype(dtype).name  # type: ignore[call-overload]
        except TypeError:
            text = str(dtype)
    if text not in STATE_DTYPES:
        raise DtypeError(
            f"a state's dtype must be one of {', '.join(STATE_DTYPES)}, not {dtype!r}",
            expected=tuple(STATE_DTYPES),
            actual=text,
        )
    return text


def check_states(states: Iterable[StateSpec], num_layers: int) -> tuple[StateSpec, ...]:
    """Return the states of a cache, if they are such.

    Raises:
        ShapeMismatchError: a layer that does not exist, two states of one name, or more than can be stored.
        DtypeError: something else than a `StateSpec`.
    """
    found = tuple(states)
    seen = set()
    for spec in found:
        if not isinstance(spec, StateSpec):
            raise DtypeError(
                f"states must be kvmmap.StateSpec, not {type(spec).__name__}",
                expected="StateSpec",
                actual=type(spec).__name__,
            )
        if not 0 <= spec.layer < num_layers:
            raise ShapeMismatchError(
                f"{spec}: there is no such layer; there are {num_layers}, counted from 0",
                expected=num_layers,
                actual=spec.layer,
                layer=spec.layer,
            )
        if (spec.layer, spec.name) in seen:
            raise ShapeMismatchError(f"{spec} is given twice", actual=spec.name, layer=spec.layer)
        seen.add((spec.layer, spec.name))
    total = sum(spec.nbytes for spec in found)
    if len(found) > MAX_STATES or total > MAX_CHECKPOINT_BYTES:
        raise ShapeMismatchError(
            f"{len(found)} states of {total:,} bytes are more than a cache can keep: {MAX_STATES} of "
            f"{MAX_CHECKPOINT_BYTES:,}",
            expected=(MAX_STATES, MAX_CHECKPOINT_BYTES),
            actual=(len(found), total),
        )
    return found


def check_arrays(arrays: Sequence[NDArray[Any]], specs: Sequence[StateSpec]) -> list[NDArray[Any]]:
    """Return arrays of states, C-contiguous, if they are as the specs say, one for each and in their order.

    Raises:
        ShapeMismatchError, DtypeError: they are not.
    """
    if len(arrays) != len(specs):
        raise ShapeMismatchError(
            f"there must be {len(specs)} states, not {len(arrays)}", expected=len(specs), actual=len(arrays)
        )
    found = []
    for spec, array in zip(specs, arrays, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != spec.numpy_dtype:
            actual = str(getattr(array, "dtype", type(array).__name__))
            raise DtypeError(f"{spec} must be {spec.dtype}, not {actual}", expected=spec.dtype, actual=actual)
        if array.shape != spec.shape:
            raise ShapeMismatchError(
                f"{spec} must be {list(spec.shape)}, not {list(array.shape)}",
                expected=spec.shape,
                actual=array.shape,
                layer=spec.layer,
            )
        found.append(np.ascontiguousarray(array))
    return found


def aligned(size: int) -> int:
    """Return the bytes that a tensor of `size` bytes takes where others follow."""
    return -(-size // STATE_ALIGNMENT) * STATE_ALIGNMENT


def _whole(value: object, name: str) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise ShapeMismatchError(f"{name} must be of whole numbers, not {value!r}", expected="int", actual=value)
