"""Queries as callers give them, checked: the one place that does."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import NonFiniteError, ShapeMismatchError
from ..geometry import LayerGeometry
from ..row_arrays import as_rows, widened


def check_queries(queries: Any, geometry: LayerGeometry) -> tuple[NDArray[Any], int]:
    """Return queries as the kernels take them, [n, num_q_heads, head_dim], with their dtype's number.

    Raises:
        DtypeError, ShapeMismatchError: they are not such numbers.
    """
    rows, dtype = as_rows(queries)
    shape = rows.shape
    if len(shape) != 3 or shape[2] != geometry.head_dim or not shape[1] or shape[1] % geometry.num_kv_heads:
        raise _wrong_shape("queries", ("n",), rows, geometry)
    return rows, dtype


def check_query(query: Any, geometry: LayerGeometry, layer: int) -> NDArray[np.float32]:
    """Return one position's queries, f32 [num_q_heads, head_dim].

    Raises:
        DtypeError, ShapeMismatchError, NonFiniteError: they are not such numbers.
    """
    rows, _ = as_rows(query)
    shape = rows.shape
    if len(shape) != 2 or shape[1] != geometry.head_dim or not shape[0] or shape[0] % geometry.num_kv_heads:
        raise _wrong_shape("query", (), rows, geometry)
    wide = widened(rows)
    finite = np.isfinite(wide).all(axis=1)
    if not finite.all():
        head = int(np.argmin(finite))
        raise NonFiniteError(f"the query holds a NaN or an infinity at head {head}", head=head, layer=layer)
    return wide


def _wrong_shape(name: str, lead: tuple[str, ...], rows: NDArray[Any], geometry: LayerGeometry) -> ShapeMismatchError:
    heads, dim = geometry.num_kv_heads, geometry.head_dim
    wanted = ", ".join([*lead, "num_q_heads", str(dim)])
    return ShapeMismatchError(
        f"{name} must be [{wanted}] with num_q_heads a multiple of the {heads} KV heads, not {list(rows.shape)}",
        expected=(*lead, f"k * {heads}", dim),
        actual=rows.shape,
    )
