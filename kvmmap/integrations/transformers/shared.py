"""Layers that keep no keys and values of their own: they use those of another layer."""

from __future__ import annotations

from typing import Any

from transformers import cache_utils

from ...errors import KvmmapError
from .kinds import LayerKind

# transformers leaves layers of this class out where it asks all others; it exists since 5.23.
_Base: Any = getattr(cache_utils, "DummyLayer", cache_utils.CacheLayerMixin)


class SharedLayer(_Base):  # type: ignore[misc]
    """A layer that shares another one's keys and values, on transformers' own interface of cache layers."""

    is_compileable = False
    """No: its cache is no part of a compiled graph."""

    is_croppable = True
    """Yes, by its cache."""

    supports_early_init = False
    """No: there is nothing to initialise."""

    def __init__(self, kind: LayerKind) -> None:
        self.kind = kind
        """What the model's config says of the layer."""
        self.is_sliding = kind.reach is not None
        """True if the model sees a window or a chunk."""
        self.is_initialized = True
        """Always."""
        self.keys = None
        """None: it has none of its own."""
        self.values = None
        """None."""

    def __repr__(self) -> str:
        return "<SharedLayer: the keys and values of another layer>"

    def lazy_initialization(self, key_states: Any, value_states: Any) -> None:
        """Nothing to do."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse keys and values: the layer has another one's."""
        raise KvmmapError("the layer shares the keys and values of another one, and keeps none of its own")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Sizes of masks are the cache's business."""
        raise KvmmapError("the layer shares the keys and values of another one: ask the cache")

    def get_seq_length(self) -> int:
        """None."""
        return 0

    def get_max_length(self) -> int:
        """-1: no limit of its own."""
        return -1

    def offload(self) -> None:
        """Nothing to do."""

    def prefetch(self) -> None:
        """Nothing to do."""

    def reset(self) -> None:
        """Nothing to do."""

    def crop(self, tokens_to_remove: int) -> None:
        """Nothing to do."""

    def reorder_cache(self, beam_idx: Any) -> None:
        """Nothing to do."""
