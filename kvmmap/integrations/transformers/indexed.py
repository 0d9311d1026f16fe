"""Layers with index keys, from which a model selects the positions that each query attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ...errors import KvmmapError
from .layer import KvmmapLayer
from .rows import IndexRows, StoredRows
from .shared import SharedLayer


class _Indexed:
    """What transformers and models call index keys of a layer."""

    index: IndexRows
    """Its index keys."""

    appended: Callable[[StoredRows], None]
    """What is called after index keys were appended: some models append them without asking the cache."""

    indexer_position_ids: torch.Tensor | None = None
    """None: positions follow one another."""

    is_indexer_initialized = True
    """Always."""

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append index keys [1, n, index_head_dim], and return all of them, in 16 bits' precision."""
        found = self.index.extended(indexer_key_states)
        self.appended(self.index)
        return found

    update_index = update_indexer
    """The same, with keys [1, 1, n, index_head_dim]: MiniMax M3's name for it."""

    @property
    def indexer_keys(self) -> torch.Tensor:
        """All index keys, read anew at each access, f32 [1, n, index_head_dim]."""
        return torch.cat(self.index.read(torch.float32), -1)[:, 0]


class IndexedLayer(_Indexed, KvmmapLayer):
    """A layer with keys, values and index keys."""


class IndexOnlyLayer(_Indexed, SharedLayer):
    """A layer that has index keys of its own, and another layer's keys and values."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse keys and values: the layer has another one's."""
        raise KvmmapError("the layer shares the keys and values of another one, and keeps index keys alone")
