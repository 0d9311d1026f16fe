"""What a model's config says of its KV cache: the shape of each layer's rows, and which positions a layer sees.

Pure: reads configs, refuses by name what can't be kept as rows of keys and values. Knows no tensors and no files.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, NamedTuple

from transformers.cache_utils import get_layer_types_and_kwargs

from ...codecs.float16 import BF16, F16
from ...errors import UnsupportedModelError
from ...geometry import LayerGeometry
from .dispatch import masks_windows, source_known
from .kinds import LayerKind, has_states, index_geometry

_WINDOWED = ("sliding_attention", "hybrid_sliding")
_CHUNKED = ("chunked_attention",)
_INDEXED = ("indexed_attention", "minimax_m3_sparse")
_STATES_ALONE = ("linear_attention", "conv")
_WITH_STATES = (*_STATES_ALONE, "hybrid", "hybrid_sliding")
_KEPT = ("full_attention", "hybrid", *_WINDOWED, *_CHUNKED, *_INDEXED)

_SHARED = "dummy"
_EMPTY = ("moe", "mlp")
"""Kinds of layers without attention, which transformers takes for shared ones, or (5.20) for such with states."""

_NO_CACHE = "takes no cache of keys and values: it can be run only without a KvmmapCache"
_CODEBOOKS = "feeds one code of each codebook at every position, and not one token"
_REFUSED = {
    "blt": "caches bytes and patches in several transformers of its own, not one row a token",
    "cpmant": "puts positions of its own before the tokens, and attends to them in both directions",
    "diffusion_gemma": "generates blocks of tokens by denoising, attending in both directions",
    "fsmt": "masks nothing in a pass with a cache: what it attends to depends on how the tokens are split into passes",
    "musicgen_decoder": _CODEBOOKS,
    "musicgen_melody_decoder": _CODEBOOKS,
    "openai-gpt": _NO_CACHE,
    "prophetnet": "predicts several tokens at a time, and takes only one token a pass once it has a cache",
    "recurrent_gemma": "keeps a recurrent state in its modules, beside the keys and values of some layers",
    "reformer": _NO_CACHE,
    "xlm": _NO_CACHE,
    "xlnet": _NO_CACHE,
}
"""Models by name that nothing in their configs tells from ordinary ones, and why they can't be kept."""

_MASKED = frozenset(["paligemma", "evolla"])
"""Models whose text part sees ahead by its config, and attends by masks that say what of, or are causal."""

_UNMASKED = frozenset(["moshi", "qwen3_omni_moe_text"])
"""Models that mask no windows, known by name where their source is not loaded, or has masks of other models as well."""


_DECODER = {
    "num_hidden_layers": ("decoder_layers", "num_decoder_layers"),
    "num_attention_heads": ("decoder_attention_heads", "num_decoder_attention_heads"),
}
"""What older configs call numbers of their decoder, where the plain name is for the encoder's."""


def text_config(config: Any) -> Any:
    """Return the config of the part that generates text (itself, for a model that only does that)."""
    found = config.get_text_config(decoder=True)
    own = {
        name: vars(found)[other]
        for name, others in _DECODER.items()
        for other in others
        if vars(found).get(other) not in (None, getattr(found, name, None))
    }
    if own:
        found = copy.deepcopy(found)
        for name, value in own.items():
            setattr(found, name, value)
    return found


def layer_kinds(config: Any) -> list[LayerKind]:
    """Return what each layer of a model keeps.

    Args:
        config: a `PreTrainedConfig`; of a model of several parts, its decoder's counts. Asked again for one with the
            same contents, the result is remembered: configs of single layers are slow to build.

    Raises:
        UnsupportedModelError: the model keeps something else than keys and values for every layer and position.
    """
    for part in (config, config.get_text_config(decoder=True)):
        if part.model_type in _REFUSED:
            raise UnsupportedModelError(f"{part.model_type} {_REFUSED[part.model_type]}", actual=part.model_type)
    # What a model's code says counts as well, once it is loaded.
    key = type(config), repr(config.to_dict()), source_known(text_config(config))
    found = _found.get(key)
    if found is None:
        if len(_found) >= _MOST:
            _found.clear()
        found = _found[key] = tuple(_layer_kinds(config))
    return list(found)


_found: dict[tuple[type, str, bool], tuple[LayerKind, ...]] = {}
_MOST = 256  # configs that are remembered


def _layer_kinds(config: Any) -> list[LayerKind]:
    whole, config = config, text_config(config)
    name = config.model_type
    if _sees_ahead(config) and not config.is_encoder_decoder and whole.model_type not in _MASKED:
        raise UnsupportedModelError(
            f"{name} attends in both directions as configured (is_decoder=False, or use_bidirectional_attention): "
            "keys and values depend on later tokens",
            actual=name,
        )
    if getattr(config, "num_hidden_layers", None) is None:
        raise UnsupportedModelError(f"{name} has no decoder layers of its own to keep keys and values of", actual=name)
    types, arguments = get_layer_types_and_kwargs(config)
    if len(types) < config.num_hidden_layers and getattr(config, "num_kv_shared_layers", None):
        types = types + [_SHARED] * config.num_kv_shared_layers  # transformers before 5.23 leaves them out
    if len(types) != config.num_hidden_layers:
        raise UnsupportedModelError(f"{name} names {len(types)} kinds of layers for {config.num_hidden_layers} layers")
    layers = list(config.per_layer_config)
    kinds = [_kind(config, number, kind, layers[number]) for number, kind in enumerate(types)]
    for number, kind in enumerate(types):
        if kind in _WITH_STATES:
            kinds[number] = replace(kinds[number], states=arguments[number].get("number_of_states", 1))
    if all(kind.geometry is None for kind in kinds) and not has_states(kinds):
        raise UnsupportedModelError(f"{name} keeps nothing of its own: all layers use another model's keys and values")
    return kinds + _repeated(config, kinds)


def _sees_ahead(config: Any) -> bool:
    """True if tokens attend to later ones. GPT-NeoX has is_decoder=False, too, but not what encoders have besides."""
    encoder = getattr(config, "is_decoder", None) is False and hasattr(config, "add_cross_attention")
    return encoder or getattr(config, "use_bidirectional_attention", None) in (True, "all")


def _kind(whole: Any, number: int, kind: str, config: Any) -> LayerKind:
    model = whole.model_type
    if number in (getattr(whole, "cross_attention_layers", None) or ()):
        return LayerKind(geometry=None, window=None, latent=False, crosses=True)
    if kind in (*_STATES_ALONE, *_EMPTY):
        return LayerKind(geometry=None, window=None, latent=False)
    shares = kind == _SHARED
    if shares:  # its mask is that of the layer it shares with
        own = getattr(whole, "layer_types", None)
        kind = own[number] if own is not None else "full_attention"
        if kind in _EMPTY:
            return LayerKind(geometry=None, window=None, latent=False)
    if kind not in _KEPT:
        raise UnsupportedModelError(
            f"{model} has layers of the kind {kind!r}; only layers that keep keys and values for every position can be "
            f"kept: {', '.join(_KEPT)}",
            expected=_KEPT,
            actual=kind,
        )
    if getattr(config, "num_attention_heads", None) is None:
        raise UnsupportedModelError(
            f"{model} has no attention heads: it keeps a recurrent state, and no keys and values by position",
            actual=model,
        )
    window = config.sliding_window if kind in _WINDOWED else None
    if window is not None and (model in _UNMASKED or not masks_windows(config)):
        raise UnsupportedModelError(
            f"{model} drops positions behind its window in a cache and not in its masks: what it attends to depends on "
            "how the tokens are split into passes",
            actual=model,
        )
    sharing = (getattr(whole, "kv_sharing_modes", None) or {number: None})[number]
    return LayerKind(
        geometry=None if shares or sharing == "reuse_but_indexer" else _geometry(whole, number, kind, config),
        window=window,
        latent=getattr(config, "kv_lora_rank", None) is not None,
        chunk=config.attention_chunk_size if kind in _CHUNKED else None,
        index=None if shares or kind not in _INDEXED else _index(whole, number, config),
        valueless=_valueless(whole, number),
    )


def _valueless(whole: Any, number: int) -> bool:
    """Whether a layer's latents have no rotated part, which transformers caches in the place of values."""
    if whole.model_type == "mistral_large4_text":
        return not whole.no_rope_layers[number]
    return getattr(whole, "kv_lora_rank", None) is not None and whole.qk_rope_head_dim == 0


def _geometry(whole: Any, number: int, kind: str, config: Any) -> LayerGeometry:
    """The shape of a layer's rows."""
    latent = getattr(config, "kv_lora_rank", None)
    if latent is not None:
        # Multi-head latent attention: transformers caches the compressed latent in the keys' place, and the rotated
        # key part that all heads share in the values'.
        return LayerGeometry(1, latent, 1 if _valueless(whole, number) else config.qk_rope_head_dim)
    dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    dim = dim or config.hidden_size // config.num_attention_heads
    return LayerGeometry(_kv_heads(whole.model_type, kind, config), dim, getattr(config, "v_head_dim", None) or dim)


def _index(whole: Any, number: int, config: Any) -> LayerGeometry | None:
    """The shape of a layer's index keys; None if it uses the selection of an earlier layer."""
    kinds = getattr(whole, "indexer_types", None)
    if kinds is not None and kinds[number] == "shared":
        return None
    half = str(getattr(config, "dtype", None)).removeprefix("torch.") == "float16"
    dim = getattr(config, "index_head_dim", None) or config.indexer_head_dim  # Qwen4-Exp's name for it
    if getattr(config, "index_kpool", None) is not None:
        dim = 2 * dim + 1  # GLM 5 Next keeps gates beside its keys, and whether a position is padding
    return index_geometry(dim, F16 if half else BF16)


def _repeated(config: Any, kinds: list[LayerKind]) -> list[LayerKind]:
    """The layers that a model with loops (Dory) adds to its cache: its looped ones once more for each further loop."""
    loops = getattr(config, "n_recurrent_loops", 1)
    if loops == 1:
        return []
    if config.recurrent_kv_cache_mode != "per_loop":
        raise UnsupportedModelError(
            f"{config.model_type} reads a cache's tensors itself with recurrent_kv_cache_mode="
            f"{config.recurrent_kv_cache_mode!r}: a KvmmapCache has none",
            expected="per_loop",
            actual=config.recurrent_kv_cache_mode,
        )
    first = config.n_input_layers
    return kinds[first : first + config.n_recurrent_layers] * (loops - 1)


def _kv_heads(model: str, kind: str, config: Any) -> int:
    """KV heads of a layer as its code makes them, where the config does not say it in so many words."""
    heads: int = config.num_attention_heads
    if getattr(config, "new_decoder_architecture", None):
        return heads  # Falcon 40B: each query head gets a copy of its KV head before the cache
    if getattr(config, "multi_query", None):
        return 1
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_kv_heads", None) or heads
    return 2 * heads if model == "mimo_v2_flash" and kind in _WINDOWED else heads


_PADDED_POSITIONS = frozenset(
    {"camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "xmod"}
)
"""Models that begin at the position after their padding's where no positions are given; `generate` gives others."""


class Counting(NamedTuple):
    """How a model counts positions."""

    first: int
    """The position of the first token: 0 in almost all."""

    alike: bool
    """True if a model that is given no positions counts as `generate` does."""


def counting(config: Any) -> Counting:
    """Return how a model counts positions."""
    kind = getattr(config, "model_type", None)
    return Counting(1 if kind == "paligemma" else 0, kind not in _PADDED_POSITIONS)


def max_positions(config: Any) -> int | None:
    """Return how many positions a model is made for, if its config says so."""
    found = getattr(text_config(config), "max_position_embeddings", None)
    return found if isinstance(found, int) else None
