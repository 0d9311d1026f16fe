"""What small configs need beyond the rules of `configs`, by type: arguments that must fit one another."""

from __future__ import annotations

from typing import Any

import torch

_MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 2]}}
_MHA = {"num_key_value_heads": 4}
_MLA = {**_MHA, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
_DECODER = {"is_decoder": True}
_BART = {"encoder_layers": 3}
_CROSSED = {"decoder": {"is_decoder": True, "add_cross_attention": True}}
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_MOSTLY_FULL = ["full_attention", "linear_attention", "full_attention"]
_LINEAR = ["linear_attention", "linear_attention", "full_attention"]

_CHUNKED = {
    "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    "no_rope_layers": [1, 0, 1],
}
_SHARED = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}
_SPARSE = ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"]

_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
    "ple_layer_ids": [1],
    "eos_token_id": 95,
    "ngram_vocab_size_base": 96,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 1,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "hc_lowrank": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}

_LIKE_BART = (
    *("bart", "blenderbot", "blenderbot-small", "fsmt", "led", "m2m_100", "marian", "mbart", "mvp", "nllb-moe"),
    *("pegasus", "pegasus_x", "plbart", "seamless_m4t", "seamless_m4t_v2", "speech_to_text", "speecht5"),
)

PATCHES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roc_bert",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        ),
        _DECODER,
    ),
    "xmod": {**_DECODER, "default_language": "en_XX"},
    **dict.fromkeys(
        (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "whisper",
        ),
        _BART,
    ),
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "dots3_note_text": {**_MHA, "per_layer_config": {}, "head_dim": 12, "swa_head_dim": 12},
    "longcat_flash": {**_MHA, "head_dim": 4},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}
    },
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "chameleon": {"vocabulary_map": {"<image>": 80}},
    "emu3": {"vocabulary_map": {"<image>": 80}},
    **{
        kind: {"text_config": _MROPE}
        for kind in (
            "cosmos3_edge",
            "glm46v",
            "glm4v",
            "glm_ocr",
            "glmga",
            "glm4v_moe",
            "paddleocr_vl",
            "qwen2_5_omni_thinker",
            "qwen2_5_vl",
            "qwen2_vl",
        )
    },
    **{
        kind: {"text_config": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}}}
        for kind in ("glm4v_moe",)
    },
    "hunyuan_vl": {"text_config": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 1, 1]}}},
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "layer_types": _MIXED},
    "hy_v4_vl": {"text_config": {"rope_parameters": _MROPE["rope_parameters"] | {"mrope_section": [1, 1, 0]}}},
    "apertus1p5": {
        "text_config": {"image_token_offset": 80, "audio_token_offset": 84},
        "vision_config": {"codebook_size": 4},
        "audio_config": {"codebook_size": 4, "codebook_dim": 32},
        "image_token_offset": 80,
        "audio_token_offset": 84,
    },
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "dbrx": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 32},
    },
    "bamba": {"mamba_n_heads": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 3},
    "falcon_h1": {
        "mamba_n_heads": 8,
        "mamba_d_ssm": 64,
        "mamba_d_state": 16,
        **dict.fromkeys(("attention_in_multiplier", "attention_out_multiplier", "key_multiplier"), 1.0),
    },
    **{kind: {"layer_types": _LINEAR} for kind in ("kimi_linear", "bailing_hybrid", "olmo_hybrid")},
    "qwen3_5_text": {"layer_types": _LINEAR},
    "qwen3_5": {"text_config": {"layer_types": _LINEAR}},
    "qwen3_5_moe_text": {"layer_types": _MOSTLY_FULL},
    "qwen3_5_moe": {"text_config": {"layer_types": _MOSTLY_FULL}},
    **{kind: {"text_config": {"layer_types": _LINEAR}} for kind in ("minicpm_ocr", "minicpmv4_6", "minicpmv4_7")},
    "qwen3_next": {"layer_types": _MOSTLY_FULL},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_state": 8, "layer_types": ["mamba", "attention", "mamba"]},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention", "conv"]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", "sparse", "sparse"], "layer_types": ["full_attention"] * 3}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4, "window_size": 12},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "molmo2": {"vision_config": {"image_size": [32, 32]}, "adapter_config": {"vision_feature_layer": [2, 1]}},
    "moshi": {"audio_encoder_config": {"codebook_size": 64}},
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 4,
            "patch_sizes": [16, 6, 5, 4],
            "hidden_sizes": [8, 8, 8, 8],
            "depths": [1, 1, 1, 1],
        }
    },
    "step3p7": {
        "text_config": {
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        }
    },
    "zamba2": {"layer_types": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]},
    "glm_moe_dsa": {"indexer_types": ["full", "shared", "full"]},
    "hy_v4": {"indexer_types": ["full", "shared", "full"]},
    "mistral_large4": {
        "text_config": {
            **_MHA,
            "num_hidden_layers": 4,
            "indexer_types": ["full", "shared", "full", "shared"],
            "kv_source_layers": [0, 1, 0, 1],
            "no_rope_layers": [1, 0, 1, 0],
        }
    },
    "llama4": {"text_config": _CHUNKED},
    "llama4_text": _CHUNKED,
    "minimax_m3_vl": {"text_config": {"layer_types": _SPARSE, "index_n_heads": 2}},
    "minimax_m3_vl_text": {"layer_types": _SPARSE, "index_n_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "granite4_vision": {
        "downsample_rate": "1/2",
        "vision_config": {"hidden_size": 64},
        "deepstack_layer_map": [[0, 0]],
        "spatial_target_layers": [1],
        "qformer_config": {"num_attention_heads": 4, "hidden_size": 32},
    },
    "gemma4": {"text_config": {"hidden_size_per_layer_input": 8, **_SHARED}},
    "gemma4_text": _SHARED,
    "gemma4_unified_text": _SHARED,
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "prophetnet": {"num_encoder_layers": 3},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "layer_types": _MIXED}
    },
    "gemma4_unified_assistant": {"text_config": {"layer_types": _MIXED}},
    "gemma3n_text": {**_SHARED, "activation_sparsity_pattern": [0.0] * 4},
    "roc_bert": {
        **_DECODER,
        "pronunciation_vocab_size": 8,
        "shape_vocab_size": 8,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "reformer": {**_DECODER, "axial_pos_embds": False, "attn_layers": ["local", "local"], "attention_head_size": 8},
    "zamba": {
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "blip-2": {"image_token_index": 90},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "kosmos-2": {"latent_query_num": 4},
    "glm5_next": {
        "text_config": {
            **_MHA,
            "index_kpool": 4,
            "linear_head_dim": 8,
            "linear_num_heads": 4,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
            "layer_types": _LINEAR,
        }
    },
    "dots3_note": {
        "text_config": {**_MHA, "per_layer_config": {}, "head_dim": 12, "swa_head_dim": 12},
        "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32},
        "audio_config": {"adapter_input_size": 32},
    },
    "ernie4_5_vl_moe": {
        "text_config": {"moe_intermediate_size": [16, 16], "moe_num_experts": 4, "num_hidden_layers": 3, **_MROPE}
    },
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "evolla": {"aligner_num_add_layers": 1},
    "idefics": {"cross_layer_interval": 1},
    "blip": {"text_config": {"bos_token_id": 1, "sep_token_id": 2}},
    "vision-encoder-decoder": _CROSSED,
    "sequences/encoder-decoder": _CROSSED,
    "sequences/speech-encoder-decoder": _CROSSED,
    "sequences/bigbird_pegasus": {**_BART, "attention_type": "original_full"},
    "sequences/whisper": {**_BART, "num_mel_bins": 32, "max_source_positions": 64},
    **dict.fromkeys((f"sequences/{kind}" for kind in _LIKE_BART), _BART),
    "florence2": {"text_config": {"encoder_layers": 3}},
    "pp_formulanet": {"text_config": {"encoder_layers": 3}},
    "mllama": {
        "text_config": {"cross_attention_layers": [1]},
        "vision_config": {"num_global_layers": 2, "intermediate_layers_indices": [0, 2], "vision_output_dim": 96},
    },
    "hrm_text": {"H_cycles": 1, "L_cycles": 2, "num_hidden_layers": 1},
    "qwen2_5_omni_thinker": {"text_config": _MROPE, "vision_start_token_id": 94},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 94},
}

WITH_IMAGE = ("blip-2", "instructblip", "instructblipvideo")
"""Models that generate from an image only, and hand embeddings to their text part: prompt lookup is refused."""

PREFIXED = ("paligemma", "kosmos-2", *WITH_IMAGE)
"""Models of whose prompts no part is reused: they attend to it in both directions, or have an image in it unnamed."""


def inputs_besides(kind: str, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what a type's `generate` needs beside token ids."""
    if kind == "paligemma":
        return {"token_type_ids": torch.zeros_like(ids)}
    pixels = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    if kind == "kosmos-2":
        marks = torch.zeros_like(ids)
        marks[:, 1:5] = 1
        return {"pixel_values": pixels, "image_embeds_position_mask": marks}
    if kind == "blip-2":
        return {"pixel_values": pixels}
    if kind in WITH_IMAGE:
        pixels = pixels if kind == "instructblip" else pixels[:, None]
        return {"pixel_values": pixels, "qformer_input_ids": torch.arange(1, 6)[None]}
    return {}


def with_image(config: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return a prompt with the placeholders of an image at its start, if its type generates from an image only."""
    if config.model_type not in WITH_IMAGE:
        return ids
    placeholder = getattr(config, "video_token_index" if "video" in config.model_type else "image_token_index")
    ids = ids.clone()
    ids[:, : config.num_query_tokens] = placeholder
    return ids


WITHOUT = {
    **dict.fromkeys(["fast_vlm", "gemma3n", "perception_lm"], "its image encoder needs timm"),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], "transformers rejects the config's own defaults"),
    "inkling_mm_model": "its image encoder needs scipy",
}
"""Why a type can't be built, or tested, where the error does not say it."""
