"""A cache's layers as a model has them, over the stores of rows that its files have: which belongs to which."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from ...cache import QuantizedKvCache
from .indexed import IndexedLayer, IndexOnlyLayer
from .kinds import LayerKind
from .layer import KvmmapLayer, Pattern
from .resident import Resident, ResidentLayer
from .rows import IndexRows, StoredRows
from .shared import SharedLayer

ModelLayer: TypeAlias = KvmmapLayer | SharedLayer


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
    for kind in kinds:
        if kind.geometry is None:
            layers.append(SharedLayer(kind) if kind.index is None else IndexOnlyLayer(kind))
            continue
        number = len(rows)
        kept_rows = None if saved is None else saved.layers[number]
        cls = ResidentLayer if resident == "device" else KvmmapLayer if kind.index is None else IndexedLayer
        made = cls(kind, patterns[kind.reach, kind.latent], kept_rows, own.layers[number], kept)
        layers.append(made)
        rows.append(made)
    for layer in layers:
        if isinstance(layer, IndexedLayer | IndexOnlyLayer):
            number = len(rows)
            layer.index = IndexRows(None if saved is None else saved.layers[number], own.layers[number], kept)
            layer.appended = appended
            rows.append(layer.index)
    return layers, rows, list(patterns.values())
