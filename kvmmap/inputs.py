"""Arguments of callers, checked and brought to one form: one array a layer, rows of the right shape, token ids.

Pure checks; nothing here knows where rows go.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from .arrays import as_numpy, in_plain_memory
from .errors import DtypeError, NonFiniteError, NoRowsError, ShapeMismatchError
from .geometry import LayerGeometry
from .row_arrays import as_rows
from .rows import Rows


class RowPair(NamedTuple):
    """Keys and values of as many positions, [n, num_kv_heads, dim], with their dtype numbers."""

    keys: NDArray[Any]
    key_dtype: int
    values: NDArray[Any]
    value_dtype: int


def where(layer: int | None) -> str:
    """Return " (layer i)", or nothing where there is only one."""
    return "" if layer is None else f" (layer {layer})"


def require_rows(geometry: LayerGeometry, layer: int | None) -> None:
    """Raise NoRowsError for a layer that keeps no keys and values."""
    if not geometry.has_rows:
        raise NoRowsError(
            f"the layer keeps no keys and values{where(layer)}: it has num_kv_heads 0; in push_step and extend give "
            "None for it",
            layer=layer,
        )


def refuse_shapes(pair: RowPair, geometry: LayerGeometry, layer: int | None) -> NoReturn:
    """Raise for rows of `extend` that do not fit a layer, or one another."""
    heads = geometry.num_kv_heads
    for name, rows, dim in (("keys", pair.keys, geometry.head_dim), ("values", pair.values, geometry.value_head_dim)):
        if rows.ndim != 3 or rows.shape[1:] != (heads, dim):
            raise ShapeMismatchError(
                f"{name} must be [n, {heads}, {dim}] (positions, KV heads, head_dim), not "
                f"{list(rows.shape)}{where(layer)}",
                expected=("n", heads, dim),
                actual=rows.shape,
                layer=layer,
            )
    raise ShapeMismatchError(
        f"{len(pair.keys)} positions of keys and {len(pair.values)} of values: give as many of both{where(layer)}",
        expected=len(pair.keys),
        actual=len(pair.values),
        layer=layer,
    )


def check_position_rows(rows: NDArray[Any], name: str, shape: tuple[int, int], layer: int | None) -> NDArray[Any]:
    """Return flat rows of one position as [num_kv_heads, dim]."""
    if rows.shape != (shape[0] * shape[1],):
        raise ShapeMismatchError(
            f"{name} must be [{shape[0]}, {shape[1]}] (KV heads, head_dim) or flat, not {list(rows.shape)}"
            f"{where(layer)}",
            expected=shape,
            actual=rows.shape,
            layer=layer,
        )
    return rows.reshape(shape)


def check_quantized(arrays: Sequence[Any], geometry: LayerGeometry, layer: int | None) -> Rows:
    """Return `extend_quantized`'s arguments as rows, if they are what the codecs make."""
    if len(arrays) != len(geometry.slabs):
        names = ", ".join(slab.name for slab in geometry.slabs)
        raise ShapeMismatchError(
            f"there must be {len(geometry.slabs)} arrays ({names}), not {len(arrays)}{where(layer)}",
            expected=len(geometry.slabs),
            actual=len(arrays),
            layer=layer,
        )
    count = len(arrays[0]) if isinstance(arrays[0], np.ndarray) and arrays[0].ndim else 0
    found = [in_plain_memory(array, slab.name) for array, slab in zip(arrays, geometry.slabs, strict=True)]
    for slab, array in zip(geometry.slabs, found, strict=True):
        if not isinstance(array, np.ndarray) or array.dtype != slab.dtype:
            actual = str(getattr(array, "dtype", type(array).__name__))
            raise DtypeError(
                f"{slab.name} must be a numpy array of {slab.dtype}, not {actual}",
                expected=str(slab.dtype),
                actual=actual,
            )
        if array.shape != (count, *slab.shape):
            raise ShapeMismatchError(
                f"{slab.name} must be {[count, *slab.shape]}, not {list(array.shape)}{where(layer)}",
                expected=(count, *slab.shape),
                actual=array.shape,
                layer=layer,
            )
    rows = Rows.of(geometry, found)
    for part, codec, mine, dim in (
        ("key", geometry.key_codec, rows.keys, geometry.head_dim),
        ("value", geometry.value_codec, rows.values, geometry.value_head_dim),
    ):
        try:
            codec.check(mine, dim)
        except NonFiniteError as error:
            raise NonFiniteError(
                f"{part}_{error}{where(layer)}; nothing was appended", actual=error.actual, layer=layer
            ) from None
    return rows


def per_layer(x: Any) -> Sequence[Any]:
    """Split [num_layers, ...] into one array a layer; a sequence of arrays is that already."""
    if isinstance(x, list | tuple):
        return x
    rows, _ = as_rows(x)
    if rows.ndim != 4:
        raise ShapeMismatchError(
            f"must be [num_layers, n, num_kv_heads, head_dim], or a list of one array a layer, not {list(rows.shape)}",
            expected=("num_layers", "n", "num_kv_heads", "head_dim"),
            actual=rows.shape,
        )
    return [x[number] for number in range(len(rows))]


def one_step(x: Any) -> Sequence[Any]:
    """Split [num_layers, num_kv_heads, head_dim] into one [1, num_kv_heads, head_dim] a layer."""
    if isinstance(x, list | tuple):
        return [None if array is None else _with_position_axis(array) for array in x]
    rows, _ = as_rows(x)
    if rows.ndim != 3:
        raise ShapeMismatchError(
            f"must be [num_layers, num_kv_heads, head_dim], or a list of one array a layer, not {list(rows.shape)}",
            expected=("num_layers", "num_kv_heads", "head_dim"),
            actual=rows.shape,
        )
    return [x[number : number + 1] for number in range(len(rows))]


def _with_position_axis(array: Any) -> Any:
    if type(array) is np.ndarray:
        return array[None]
    array = in_plain_memory(array)
    try:
        return array[None]
    except Exception as error:  # a list, a number, an exporter that can't be indexed
        raise DtypeError(
            f"each layer's rows must be a numpy array or a CPU tensor, not {type(array).__name__}",
            expected="array",
            actual=type(array).__name__,
        ) from error


def check_token_ids(token_ids: Any, count: int | None) -> NDArray[np.int32]:
    ids = as_numpy(token_ids, "token ids")
    if ids.size == 0:
        ids = ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        raise DtypeError(f"token ids must be whole numbers, not {ids.dtype}", expected="int32", actual=str(ids.dtype))
    if ids.ndim != 1 or (count is not None and len(ids) != count):
        wanted = "n" if count is None else count
        raise ShapeMismatchError(
            f"token ids must be [{wanted}], one a position, not {list(ids.shape)}",
            expected=(wanted,),
            actual=ids.shape,
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < 2**31):
        raise ShapeMismatchError(
            f"token ids must lie in [0, 2**31), not from {ids.min()} to {ids.max()}",
            expected=(0, 2**31 - 1),
            actual=(int(ids.min()), int(ids.max())),
        )
    return ids.astype(np.int32)
