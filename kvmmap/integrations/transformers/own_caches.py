"""Caches of a class of a model's own, beside transformers': what a cache must be for such a model to take it.

MiniMax refuses any cache that is not its `MiniMaxCache`, and keeps states of linear attention in a list of that. Here a
cache becomes one, whose list is the states of its layers. Knows no files.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from transformers.cache_utils import Cache

from .state_layers import put_state

_OWN = {"minimax": ("transformers.models.minimax.modeling_minimax", "MiniMaxCache")}


class _LinearCaches:
    """What MiniMax asks of a cache, of layers with a recurrent state."""

    layers: list[Any]

    plain: type[Cache]
    """The class that the cache had."""

    def get_linear_cache(self, layer_idx: int) -> torch.Tensor | None:
        """Return a layer's state; None before the first pass."""
        layer = self.layers[layer_idx]
        found: torch.Tensor | None = layer.recurrent_states[0] if layer.is_recurrent_states_initialized[0] else None
        return found

    def set_linear_cache(self, layer_idx: int, linear_cache: torch.Tensor) -> None:
        """Replace a layer's state."""
        put_state(self.layers[layer_idx], "recurrent.0", linear_cache)

    def __len__(self) -> int:
        return len(self.layers)


def become_own(cache: Cache, config: Any) -> None:
    """Make a cache an instance of the class that a model has for its own, if it has one.

    Args:
        cache: any cache of transformers' interface, with `LinearAttentionLayer` where a model keeps states.
        config: of the part of the model that generates text.
    """
    module, name = _OWN.get(getattr(config, "model_type", ""), ("", ""))
    own = getattr(sys.modules.get(module), name, None)
    if own is not None and not isinstance(cache, own):
        cls = type(cache)
        bases = (own,) if issubclass(own, cls) else (cls, own)
        cache.__class__ = type(cls.__name__, (_LinearCaches, *bases), {"__module__": cls.__module__, "plain": cls})


def plain_class(cls: type[Cache]) -> Any:
    """Return the class that a cache had before it became one of a model's own; the same if it has not."""
    return getattr(cls, "plain", cls)
