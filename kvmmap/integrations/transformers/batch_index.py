"""Layers of a batch with index keys, from which a model selects the positions that each query attends to."""

from __future__ import annotations

from typing import Any, NoReturn

import torch

from ...errors import UnsupportedModelError
from .batch_layer import BatchLayer
from .batch_masks import aligned
from .indexed import IndexedLayer, IndexOnlyLayer


class BatchIndexLayer(BatchLayer):
    """A layer of a batch whose sequences keep index keys."""

    is_indexer_initialized = True
    """Always."""

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        """Append index keys to the sequences that they belong to; padding is left out.

        Args:
            indexer_key_states: [batch, n, index_head_dim].

        Returns:
            All of them, [batch, columns, index_head_dim], with zeros in hidden columns.
        """
        found: list[torch.Tensor] = []
        for number, (cache, fed) in enumerate(zip(self._members.caches, self._members.fed, strict=True)):
            own: Any = cache.layers[self._number]
            if fed:
                found.append(own.update_indexer(indexer_key_states[number : number + 1, -fed:]))
            else:
                found.append(own.indexer_keys.to(indexer_key_states))
        return aligned([keys[:, None] for keys in found], self._members.columns)[:, 0]

    def update_index(self, index_key_states: torch.Tensor) -> NoReturn:
        """Refuse MiniMax M3's blocks of index keys, which begin at a column, and not at a sequence's first token.

        Raises:
            UnsupportedModelError: always.
        """
        self._refuse_batch("selects blocks of columns, whatever is padding in them")

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """Refused, as `update_index`: Qwen4-Exp rotates index keys after the cache, by positions that are not kept."""
        self._refuse_batch("rotates index keys after the cache")

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor) -> None:
        self._refuse_batch("rotates index keys after the cache")

    def _refuse_batch(self, why: str) -> NoReturn:
        raise UnsupportedModelError(
            f"the model {why}, so it can't run with a KvmmapBatch: generate each sequence with its own KvmmapCache"
        )


def keeps_index(layer: Any) -> bool:
    """Whether a sequence's layer keeps index keys."""
    return isinstance(layer, IndexedLayer | IndexOnlyLayer)
