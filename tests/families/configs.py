"""Tiny random models of every type that the installed transformers knows, from each type's own config class."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import torch
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from families.patches import PATCHES
from families.sources import START

WHOLE = ("mllama",)
"""Types of which AutoModelForCausalLM makes the text part alone; they are tried with their images."""

VOCABULARY = 96
LARGEST = 12_000_000
TEXT = 80  # ids below are text; those above stand for images and the like

_NAMES: dict[Any, str] = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size codebook_size",
    32: (
        "hidden_size d_model n_embd embed_dim dim embedding_size out_hidden_size emb_dim word_embed_proj_dim "
        "projection_dim text_hidden_size encoder_hidden_size backbone_hidden_size projector_hidden_size "
        "image_text_hidden_size mm_hidden_size vision_output_dim adapter_out_dim language_model_hidden_size "
        "hidden_size_global decoder_hidden_size lru_width output_hidden_size attention_hidden_size "
        "llm_hidden_size output_dim image_size base_channels latent_channels"
    ),
    48: (
        "intermediate_size ffn_dim d_ff d_inner n_inner dim_ff encoder_ffn_dim decoder_ffn_dim ffn_hidden_size "
        "dff mlp_dim shared_intermediate_size block_ff_dim dense_intermediate_size mlp_hidden_size "
        "projector_intermediate_size feed_forward_size"
    ),
    16: (
        "moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size moe_ffn_hidden_size q_lora_rank num_position_embeddings index_n_heads"
    ),
    3: "num_hidden_layers n_layer num_layers n_layers decoder_layers num_decoder_layers",
    2: (
        "encoder_layers depth num_encoder_layers layers num_blocks resampler_depth num_key_value_heads "
        "swa_num_key_value_heads num_kv_heads num_experts_per_tok moe_topk moe_k top_k_experts "
        "num_experts_per_token index_topk_blocks"
    ),
    4: (
        "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads "
        "attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
        "resampler_n_heads qk_rope_head_dim num_experts n_routed_experts num_local_experts "
        "moe_num_experts n_experts num_query_tokens"
    ),
    8: (
        "head_dim swa_head_dim d_kv swa_v_head_dim index_head_dim qk_nope_head_dim resampler_head_dim "
        "global_head_dim patch_size index_topk index_block_size"
    ),
    12: "v_head_dim qk_head_dim sliding_window sliding_window_size attention_chunk_size attention_window_size",
    24: "kv_lora_rank",
    256: "max_position_embeddings n_positions max_seq_len max_target_positions n_ctx",
    1: (
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group first_k_dense_replace "
        "num_dense_layers"
    ),
    0.3: "initializer_range init_std",
    64: "num_embeddings max_source_positions",
    None: "out_indices",
}
"""What fields of configs are in a small model: the value, and the fields that have it."""

_SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}

_NONE_STAYS = frozenset(
    ["sliding_window", "attention_chunk_size", "q_lora_rank", "n_group", "topk_group", "kv_lora_rank", "num_kv_heads"]
)
"""Fields whose default None means that the model has no such thing."""

_PADS = frozenset(["pad_token_id", "decoder_start_token_id"])

_NO_TOKEN = frozenset(
    [
        *(f"{name}_token_id" for name in ("bos", "eos", "sep", "eod", "mask", "cls", "forced_bos", "forced_eos")),
        *("forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens"),
    ]
)
"""Tokens that a small model does without: its random ids may be any."""


_OF_SOURCES = ("encoder_attn.out_proj.weight", "crossattention.output.dense.weight")
"""Weights that are small, lest a decoder says the same of whatever its tokens are."""

_SMALL = {"pp_formulanet": 1e-4, "sequences/speecht5": 0.01, "sequences/speech-encoder-decoder": 0.05}
"""How small they are where an encoder's output is large."""


def types() -> list[str]:
    """Every type that AutoModelForCausalLM or AutoModelForImageTextToText makes."""
    return sorted({kind for table in _tables() for kind in table._model_mapping})


SEQUENCES = "sequences/"
"""What a type's name begins with where its encoder-decoder is meant, and not its decoder alone."""


def encoder_decoders() -> list[str]:
    """Every encoder-decoder that AutoModelForSeq2SeqLM or AutoModelForSpeechSeq2Seq makes, and no other auto class."""
    names = {kind for table in _tables(SEQUENCES) for kind in table._model_mapping}
    others = {kind for table in _tables()[1:] for kind in table._model_mapping}
    made = (kind for kind in names - others if getattr(CONFIG_MAPPING[kind], "is_encoder_decoder", False))
    return [SEQUENCES + kind for kind in sorted(made)]


def _tables(kind: str = "") -> tuple[Any, ...]:
    if kind.startswith(SEQUENCES):
        return modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING
    tables = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return tables[::-1] if kind in WHOLE else tables


def settings(cls: Any, patch: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments that make a small config of a class."""
    patch = dict(patch or {})
    made: dict[str, Any] = {}
    latent = isinstance(getattr(cls, "kv_lora_rank", None), int)  # it has as many KV heads as query heads
    special = iter(range(TEXT, VOCABULARY))
    for field in dataclasses.fields(cls):
        name, default = field.name, field.default
        if name in patch or name in (getattr(cls, "sub_configs", None) or {}):
            continue
        if name in _PADS | _NO_TOKEN:
            made[name] = 0 if name in _PADS or "None" not in str(field.type) else None
        elif name in _SIZES:
            if default is None and name in _NONE_STAYS:
                continue
            size = 4 if name == "num_key_value_heads" and latent else _SIZES[name]
            made[name] = type(default)([size] * len(default)) if isinstance(default, list | tuple) else size
        elif name.endswith(("token_id", "token_index")) and isinstance(default, int):
            made[name] = next(special, TEXT)
    for name in getattr(cls, "sub_configs", None) or {}:
        inner = patch.pop(name, {})
        if inner is None or not isinstance(inner, dict):
            made[name] = inner
            continue
        kind = _kind(cls, name)
        if kind is not None:
            made[name] = settings(kind, inner) | {"model_type": kind.model_type}
    return made | patch


@cache
def _defaults(cls: Any) -> Any:
    try:
        return cls()
    except Exception:  # some configs have no valid defaults
        return None


def _kind(cls: Any, name: str) -> Any:
    """The class of a part of a config, unless it has none by default."""
    default = getattr(_defaults(cls), name, None)
    if default is not None:
        return type(default)
    spec = getattr(cls, "sub_configs_defaults", {}).get(name)
    return None if _defaults(cls) is not None or spec is None else CONFIG_MAPPING[spec.model_type]


def config(kind: str, patch: dict[str, Any] | None = None) -> Any:
    """Return a type's small config, with a patch in place of what `PATCHES` has for it."""
    if patch is None:
        patch = PATCHES.get(kind)
    cls = CONFIG_MAPPING[kind.removeprefix(SEQUENCES)]
    return cls(**settings(cls, patch))


def model(made: Any, kind: str, seed: int = 0, attention: str | None = None) -> Any:
    """Return a random model of a config."""
    plain = kind.removeprefix(SEQUENCES)
    name = next(table._model_mapping[plain] for table in _tables(kind) if plain in table._model_mapping)
    cls = getattr(transformers, name[0] if isinstance(name, tuple) else name)
    text = made.get_text_config(decoder=True)
    if not isinstance(made, cls.config_class) and isinstance(text, cls.config_class):
        made = text
    more = {} if attention is None else {"attn_implementation": attention}
    with torch.device("meta"):
        size = sum(weight.numel() for weight in cls._from_config(made, **more).parameters())
    if size > LARGEST:
        raise RuntimeError(f"{kind} has {size:,} weights, more than {LARGEST:,}: add to PATCHES what makes it smaller")
    torch.manual_seed(seed)
    net = cls._from_config(made, **more).eval().requires_grad_(False)
    for name, weight in net.named_parameters():
        if weight.is_floating_point() and (weight.ndim > 1 or not bool((weight == 1).all())):
            torch.nn.init.normal_(weight, std=_SMALL.get(kind, 0.03) if name.endswith(_OF_SOURCES) else 0.3)
    for part in net.modules():
        if isinstance(part, transformers.PreTrainedModel) and part.can_generate():
            start = {"decoder_start_token_id": START} if part.config.is_encoder_decoder else {}
            part.generation_config = type(part.generation_config)(pad_token_id=0, **start)
    return net
