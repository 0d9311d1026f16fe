"""Cross-attention in a model's cache: rows of the source, which are computed again by whoever opens the cache.

They follow from the source alone, so they are not stored; the rows of the decoder's tokens are (`sourced`). Knows no
files.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Self

import torch
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache

from .kinds import LayerKind
from .shared import SharedLayer


class CrossLayer(SharedLayer):
    """A layer that attends to a source alone, on transformers' interface of cache layers; it has the source's rows."""

    keys: Any
    values: Any

    def __init__(self, kind: LayerKind) -> None:
        super().__init__(kind)
        self.is_initialized = False

    def __repr__(self) -> str:
        return f"<CrossLayer: {'rows of the source' if self.is_initialized else 'empty'}>"

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keep the rows of the source in place of those that were there, and return them."""
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states

    def clear(self) -> None:
        """Forget the rows of the source."""
        self.keys = self.values = None
        self.is_initialized = False


_OVERRIDDEN: dict[str, Any] = {
    name: vars(Cache)[name] for name in vars(EncoderDecoderCache) if name in vars(Cache) and not name.startswith("__")
}
"""What an EncoderDecoderCache asks its self-attention part; here that part is the cache itself, so `Cache`'s hold."""


class _EncoderDecoder(EncoderDecoderCache):
    """An `EncoderDecoderCache` whose self-attention part is the cache itself."""

    __init__ = Cache.__init__
    __len__ = Cache.__len__
    locals().update(_OVERRIDDEN)

    @property
    def self_attention_cache(self) -> Self:  # type: ignore[override]
        """The cache itself."""
        return self


@cache
def _with_cross_attention(cls: Any) -> Any:
    return type(cls.__name__, (cls, _EncoderDecoder), {"__module__": cls.__module__, "plain": cls})


def become_encoder_decoder(found: Cache) -> None:
    """Make a cache an `EncoderDecoderCache` of its own rows, without rows of a source yet."""
    if not isinstance(found, _EncoderDecoder):
        cls: Any = type(found)
        found.__class__ = _with_cross_attention(cls)
    clear_cross_attention(found)


def clear_cross_attention(found: Any) -> None:
    """Have a cache forget the rows of its source: the next pass computes them."""
    if isinstance(found, _EncoderDecoder):
        found.cross_attention_cache, found.is_updated = DynamicCache(), {}
    for layer in found.layers:
        if isinstance(layer, CrossLayer):
            layer.clear()
