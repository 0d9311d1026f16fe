"""Small random models of the families that the transformers integration is tested with, and what to compare it to."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as tf
from tokenizers import decoders, models, pre_tokenizers
from transformers import DynamicCache

import kvmmap
from kvmmap.integrations.transformers import CACHE_ARGUMENT

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
CHAT = "{% for m in messages %}{{ m.role + ':' + m.content + '\n' }}{% endfor %}{{ 'assistant:' }}"
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "llama": (tf.LlamaConfig, {}),
    "qwen3": (tf.Qwen3Config, {"head_dim": 16}),
    "mistral": (tf.MistralConfig, {"sliding_window": 12}),
    "gemma3": (tf.Gemma3TextConfig, {"head_dim": 256, "sliding_window": 12, "layer_types": MIXED}),
    "gemma2": (
        tf.Gemma2Config,
        {"head_dim": 8, "sliding_window": 12, "layer_types": MIXED, "attn_logit_softcapping": 2.0},
    ),
    "phi": (tf.PhiConfig, {}),
    "gpt2": (tf.GPT2Config, {"num_key_value_heads": None}),
    "gpt_oss": (
        tf.GptOssConfig,
        {
            "head_dim": 8,
            "sliding_window": 12,
            "layer_types": MIXED,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "deepseek_v3": (
        tf.DeepseekV3Config,
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4,
            "v_head_dim": 12,
            "n_routed_experts": 4,
            "n_group": 2,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
}
"""Families by name: the config's class, and what differs from `COMMON` in it."""

IN_PLACE = [name for name in CONFIGS if name != "deepseek_v3"]
"""Those that can attend in place: DeepSeek's latents become keys and values only after the cache."""


@cache
def config(family: str) -> Any:
    """A family's small config."""
    return _config(family)


def _config(family: str, **more: Any) -> Any:
    kind, settings = CONFIGS[family]
    return kind(
        **{name: value for name, value in (COMMON | settings | more).items() if value is not None or "_token" in name}
    )


def model(family: str = "llama", attention: str | None = None, seed: int = 0, **more: Any) -> Any:
    """A new random model, always the same for a seed."""
    torch.manual_seed(seed)
    net = tf.AutoModelForCausalLM.from_config(_config(family, **more)).eval()
    for name, weight in net.named_parameters():
        if "sinks" in name:  # not initialised
            torch.nn.init.normal_(weight)
    net.requires_grad_(False)
    net.generation_config.eos_token_id = None
    if attention is not None:
        net.set_attn_implementation(attention)
    return net


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, [1, length]."""
    return torch.from_numpy(np.random.default_rng(seed).integers(1, COMMON["vocab_size"], (1, length)))


def save_llama(folder: Path) -> None:
    """Save a small model with a tokenizer whose tokens are bytes, as transformers does."""
    model("llama", vocab_size=256, max_position_embeddings=2048).save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: number for number, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT).save_pretrained(folder)


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Quantise and dequantise keys or values."""
    kind = str(tensor.dtype).removeprefix("torch.")
    array = kvmmap.dequantize_rows(*kvmmap.quantize_rows(tensor.contiguous()), dtype=kind)
    if tensor.dtype is torch.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _rounding(update: Any) -> Any:
    return lambda keys: update(keys.bfloat16().to(keys.dtype))


class RoundedCache(DynamicCache):
    """transformers' own cache over what a KvmmapCache serves: its keys and values went through the codec."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for layer in self.layers:
            if hasattr(layer, "update_index"):  # MiniMax M3's models ask the layer
                layer.update_index = _rounding(layer.update_index)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        return super().update(rounded(key_states), rounded(value_states), layer_idx, *args, **kwargs)

    def update_indexer(self, indexer_key_states: Any, layer_idx: int) -> Any:
        return super().update_indexer(indexer_key_states.bfloat16().to(indexer_key_states.dtype), layer_idx)


def past(cache: Any) -> dict[str, Any]:
    """A cache as an argument, by the name that the installed transformers has for it."""
    return {CACHE_ARGUMENT: cache}


def generate(net: Any, ids: torch.Tensor, cache: Any, count: int = 24, **more: Any) -> Any:
    """Greedy tokens and the logits of every step: [1, n + count], [count, vocab]."""
    settings = {"do_sample": False} | more
    result = net.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        **past(cache),
        max_new_tokens=count,
        return_dict_in_generate=True,
        output_logits=True,
        **settings,
    )
    return result.sequences, torch.cat(result.logits)
