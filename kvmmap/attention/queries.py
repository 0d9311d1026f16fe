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
    return _check(queries, geometry, "queries", ("n",))


def check_query(query: Any, geometry: LayerGeometry, layer: int) -> NDArray[np.float32]:
    """Return one position's queries, f32 [num_q_heads, head_dim].

    Raises:
        DtypeError, ShapeMismatchError, NonFiniteError: they are not such numbers.
    """
    rows, _ = _check(query, geometry, "query", ())
    wide = widened(rows)
    finite = np.isfinite(wide).all(axis=1)
    if not finite.all():
        head = int(np.argmin(finite))
        raise NonFiniteError(f"the query holds a NaN or an infinity at head {head}", head=head, layer=layer)
    return wide


def _check(queries: Any, geometry: LayerGeometry, name: str, lead: tuple[str, ...]) -> tuple[NDArray[Any], int]:
    rows, dtype = as_rows(queries)
    heads, dim, axes = geometry.num_kv_heads, geometry.head_dim, len(lead)
    if rows.ndim != axes + 2 or rows.shape[-1] != dim or rows.shape[axes] == 0 or rows.shape[axes] % heads:
        wanted = ", ".join([*lead, "num_q_heads", str(dim)])
        raise ShapeMismatchError(
            f"{name} must be [{wanted}] with num_q_heads a multiple of the {heads} KV heads, not {list(rows.shape)}",
            expected=(*lead, f"k * {heads}", dim),
            actual=rows.shape,
        )
    return rows, dtype
