"""A cache's layers as a model has them, over the stores of rows that its files have: which belongs to which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from transformers.cache_utils import LinearAttentionLayer

from ...cache import QuantizedKvCache
from .cross import CrossLayer
from .indexed import IndexedLayer, IndexOnlyLayer
from .kinds import LayerKind, states_alone, store_numbers
from .layer import KvmmapLayer, Pattern
from .resident import Resident, ResidentLayer
from .rows import IndexRows, PositionRows, StoredRows
from .shared import SharedLayer
from .state_layers import KvmmapHybridLayer, ResidentHybridLayer

ModelLayer: TypeAlias = KvmmapLayer | SharedLayer | LinearAttentionLayer


def made_layers(
    kinds: Sequence[LayerKind],
    saved: QuantizedKvCache | None,
    own: QuantizedKvCache,
    kept: int,
    resident: Resident,
    appended: Callable[[StoredRows], None],
) -> tuple[list[ModelLayer], list[StoredRows], list[Pattern]]:
    """Make the layers of a model.

    Args:
        kinds: what they keep.
        saved: a cache that is only read, if there is one.
        own: the cache that is appended to.
        kept: positions that count of `saved`.
        resident: where keys and values are while a model uses them.
        appended: is called with the store that index keys were appended to.

    Returns:
        The layers; all stores of rows, in the order of the caches' own; and what layers of one kind have in common.
    """
    patterns = {(kind.reach, kind.latent): Pattern(kind.reach, kind.latent) for kind in kinds if kind.geometry}
    layers: list[ModelLayer] = []
    rows: list[StoredRows] = []
    for kind, number in zip(kinds, store_numbers(kinds), strict=True):
        if kind.states and number is None:
            layers.append(LinearAttentionLayer(kind.states))
            continue
        if kind.geometry is None or number is None:
            alone = CrossLayer if kind.crosses else SharedLayer
            layers.append(alone(kind) if kind.index is None else IndexOnlyLayer(kind))
            continue
        kept_rows = None if saved is None else saved.layers[number]
        cls = ResidentLayer if resident == "device" else KvmmapLayer if kind.index is None else IndexedLayer
        if kind.states:
            cls = ResidentHybridLayer if resident == "device" else KvmmapHybridLayer
        made = cls(kind, patterns[kind.reach, kind.latent], kept_rows, own.layers[number], kept)
        layers.append(made)
        rows.append(made)
    indexed = 0
    for layer in layers:
        if isinstance(layer, IndexedLayer | IndexOnlyLayer):
            number = len(own.geometry.layers) - sum(kind.index is not None for kind in kinds) + indexed
            indexed += 1
            layer.index = IndexRows(None if saved is None else saved.layers[number], own.layers[number], kept)
            layer.appended = appended
            rows.append(layer.index)
    if states_alone(kinds):
        last = len(kinds)
        rows.append(PositionRows(None if saved is None else saved.layers[last], own.layers[last], kept))
    return layers, rows, list(patterns.values())
