"""Layers with index keys, from which a model selects the positions that each query attends to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ...errors import KvmmapError, UnsupportedModelError
from .layer import KvmmapLayer
from .rows import IndexRows, StoredRows
from .shared import SharedLayer


class _Indexed:
    """What transformers and models call index keys of a layer."""

    index: IndexRows
    """Its index keys."""

    appended: Callable[[StoredRows], None]
    """What is called after index keys were appended: some models append them without asking the cache."""

    first_shifted: int | None = None
    """The first stored position from which on positions need not follow one another (an image's); None: none is."""

    _positions: torch.Tensor | None = None  # of the positions that this object has seen, as a model gave them

    is_indexer_initialized = True
    """Always."""

    @property
    def indexer_position_ids(self) -> torch.Tensor | None:
        """The positions of all index keys, [3, 1, n], where a model (Qwen4-Exp) rotates these after the cache.

        Raises:
            UnsupportedModelError: images are among them that were stored before this object was opened.
        """
        length = len(self.index)
        if self._positions is not None and self._positions.shape[-1] >= length:
            return self._positions[..., :length]
        if not length:
            return None
        if self.first_shifted is not None and self.first_shifted < length:
            raise UnsupportedModelError(
                f"the model rotates index keys after the cache, and their positions from {self.first_shifted} on, "
                f"where an image is, are not stored: truncate({self.first_shifted}), and feed the rest again",
                expected=self.first_shifted,
                actual=length,
            )
        return torch.arange(length).expand(3, 1, length)

    @indexer_position_ids.setter
    def indexer_position_ids(self, positions: torch.Tensor) -> None:
        self._positions = positions

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
