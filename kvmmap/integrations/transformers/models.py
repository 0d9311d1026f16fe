"""What a model's config says of its KV cache: the shape of each layer's rows, and which positions a layer sees.

Pure: reads configs, refuses by name what can't be kept as rows of keys and values. Knows no tensors and no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.cache_utils import get_layer_types_and_kwargs

from ...errors import UnsupportedModelError
from ...geometry import LayerGeometry

_WINDOWED = ("sliding_attention",)
_FULL = ("full_attention",)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """One layer of a model, as its cache sees it."""

    geometry: LayerGeometry
    """The shape of its rows."""

    window: int | None
    """Positions that a query sees, its own among them; None: all."""

    latent: bool
    """True if what is cached is expanded into keys and values afterwards (MLA), so it can't be attended over as is."""


def text_config(config: Any) -> Any:
    """Return the config of the part that generates text (itself, for a model that only does that)."""
    return config.get_text_config(decoder=True)


def layer_kinds(config: Any) -> list[LayerKind]:
    """Return what each layer of a model keeps.

    Args:
        config: a `PreTrainedConfig`; of a model of several parts, its decoder's counts.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values for every layer and position.
    """
    config = text_config(config)
    name = config.model_type
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{name} is an encoder-decoder: its cross-attention cache belongs to one input and is not kept here"
        )
    types, _ = get_layer_types_and_kwargs(config)
    if len(types) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{name} names {len(types)} kinds of layers for {config.num_hidden_layers} layers")
    return [_kind(name, kind, layer) for kind, layer in zip(types, config.per_layer_config, strict=True)]


def _kind(model: str, kind: str, config: Any) -> LayerKind:
    if kind not in _FULL + _WINDOWED:
        raise UnsupportedModelError(
            f"{model} has layers of the kind {kind!r}; only layers that keep keys and values for every position can be "
            f"kept: {', '.join(_FULL + _WINDOWED)}",
            expected=_FULL + _WINDOWED,
            actual=kind,
        )
    window = config.sliding_window if kind in _WINDOWED else None
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        # Multi-head latent attention: transformers caches the compressed latent in the keys' place, and the rotated
        # key part that all heads share in the values'.
        geometry = LayerGeometry(1, latent, config.qk_rope_head_dim)
    else:
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        geometry = LayerGeometry(heads, dim, getattr(config, "v_head_dim", None) or dim)
    return LayerKind(geometry=geometry, window=window, latent=latent is not None)


def max_positions(config: Any) -> int | None:
    """Return how many positions a model is made for, if its config says so."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
