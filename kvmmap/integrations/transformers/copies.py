"""Caches in memory as plain data, to be copied and pickled, and back.

Knows no files: those are copied by the cache itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...cache import QuantizedKvCache
from .kinds import LayerKind
from .opening import record_known, spread_like


def in_memory(cache: QuantizedKvCache) -> dict[str, Any]:
    """Return all that a cache in memory holds; arrays are copies."""
    length = cache.seq_len
    return {
        "shapes": spread_like(cache, cache.capacity) | {"metadata": cache.metadata, "model": cache.model},
        "rows": [[array.copy() for array in layer.read_quantized(0, length)] for layer in cache.layers],
        "recent": [layer.recent_rows() for layer in cache.layers],
        "token_ids": cache.token_ids[:length],
        "checkpoints": [(*one, list(cache.read_states(one.position).values())) for one in cache.checkpoints],
    }


def rebuilt(
    kind: Any, held: dict[str, Any], kinds: Sequence[LayerKind], told: NDArray[np.int32], model: Any = None
) -> Any:
    """Return a cache of a class that holds what `in_memory` has returned.

    Args:
        kind: the class, `KvmmapCache` or one that is derived from it.
        held: what the cache holds.
        kinds: its layers.
        told: token ids that only the cache object knew.
        model: the model that the copied cache was opened with; None in another process.
    """
    own = QuantizedKvCache(**held["shapes"])
    for layer, rows in zip(own.layers, held["rows"], strict=True):
        if layer.geometry.has_rows:
            layer.extend_quantized(*rows)
    for store, kept in zip(own.storage.layers, held["recent"], strict=True):
        if kept is not None:
            store.take_recent(kept, 0, store.length)
    for position, pinned, states in held["checkpoints"]:
        own.storage.checkpoints.write(position, states)
        own.storage.checkpoints.name_staged(pin=pinned)
    record_known(own, held["token_ids"])
    made = kind._of(None, own, kinds, model)
    made.record_token_ids(told) if len(told) else None
    return made
