"""How the rows of a layer are encoded, keys and values together: by one compiled call, or codec by codec."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from . import _core
from .codecs import COMPILED
from .geometry import LayerGeometry
from .rows import Rows

PairEncode = Callable[[NDArray[Any], int, NDArray[Any], int, Rows, "_core.RecentRings | None", int], int]
"""Encodes as many positions of keys and of values: (keys, dtype's number, values, dtype's number, rows, rings, start).

Keys are [n, num_kv_heads, head_dim] and values [n, num_kv_heads, value_head_dim], as `as_rows` returns them; of one
position also without their first axis. If there are `rings`, they are kept in 16 bits from position `start` on besides.
Returns -1, or the first row of keys that the codec can't hold, or -2 less the first such row of values: then none is
kept.
"""


def pair_encoder(geometry: LayerGeometry) -> PairEncode:
    """Return what encodes the rows of a layer."""
    keys, values = geometry.key_codec, geometry.value_codec
    if keys in COMPILED and values in COMPILED:
        made = _core.PairEncoder(
            keys.id, keys.transform, geometry.head_dim, values.id, values.transform, geometry.value_head_dim
        )
        return made.encode

    def encode(
        key_rows: NDArray[Any],
        key_dtype: int,
        value_rows: NDArray[Any],
        value_dtype: int,
        out: Rows,
        rings: _core.RecentRings | None,
        start: int,
    ) -> int:
        if key_rows.ndim == 2:
            key_rows, value_rows = key_rows[None], value_rows[None]
        bad = keys.encode(key_rows, key_dtype, out.keys, 1)
        if bad >= 0:
            return bad
        bad = values.encode(value_rows, value_dtype, out.values, 1)
        if bad >= 0:
            return -2 - bad
        if rings is not None:
            rings.keep(start, key_rows, key_dtype, value_rows, value_dtype)
        return -1

    return encode
