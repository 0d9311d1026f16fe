"""Small random models of the families that the transformers integration is tested with, and what to compare it to."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers as tf
from tokenizers import decoders, models, pre_tokenizers
from transformers import DynamicCache

from kvmmap.codecs import by_name
from kvmmap.integrations.transformers import CACHE_ARGUMENT
from kvmmap.integrations.transformers.models import layer_kinds
from kvmmap.integrations.transformers.tensors import as_array
from kvmmap.row_arrays import as_rows

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


def rounded(tensor: torch.Tensor, codec: str = "int8") -> torch.Tensor:
    """Encode and decode keys or values, [..., dim]."""
    if not tensor.numel():
        return tensor
    made, dim = by_name(codec), tensor.shape[-1]
    rows, number = as_rows(as_array(tensor.detach().reshape(-1, 1, dim).contiguous()))
    arrays = [np.zeros((len(rows), 1, *one.shape), one.dtype) for one in made.arrays(dim)]
    assert made.encode(rows, number, arrays, 1) < 0
    return torch.from_numpy(made.decoded(arrays, dim)).to(tensor.dtype).reshape(tensor.shape)


def halves(tensor: torch.Tensor) -> torch.Tensor:
    """What is kept of keys or values in 16 bits, [batch, heads, n, dim]: f16, or bf16 for positions beyond it."""
    if tensor.dtype != torch.float32:
        return tensor
    near = tensor.half().float()
    return torch.where(near.isfinite().all(-1, keepdim=True).all(1, keepdim=True), near, tensor.bfloat16().float())


class RoundedCache(DynamicCache):
    """transformers' own cache over what a KvmmapCache serves: keys and values as they are read from it.

    They are kept as they come, and rounded when they are returned: the last and the first positions to 16 bits, others
    by the codec. All queries of a pass see in 16 bits what the first of them does, as those of a KvmmapCache that is
    not attended in place; in place each one has its own last positions: the same if none is beyond the window.

    Args:
        recent_window: last positions that are rounded to 16 bits.
        sinks: first positions that are.
        kwargs: DynamicCache's.
    """

    def __init__(self, *, recent_window: int = 128, sinks: int = 4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._recent = recent_window, sinks
        kinds = layer_kinds(kwargs["config"]) if "config" in kwargs else []
        self._latent, self._crosses = ([getattr(kind, name) for kind in kinds] for name in ("latent", "crosses"))
        self.forms: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []
        """Keys and values of the last update: by the codec, in 16 bits, window and sinks."""
        self._index_keys: dict[int, torch.Tensor] = {}
        for number, layer in enumerate(self.layers):
            if hasattr(layer, "update_index"):  # MiniMax M3's models ask the layer
                layer.update_index = partial(self._update_index, number, layer.update_index)

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx < len(self._crosses) and self._crosses[layer_idx]:  # rows of a source, which are not stored
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        latent = layer_idx < len(self._latent) and self._latent[layer_idx]
        stop = self.get_seq_length(layer_idx) + key_states.shape[2]
        found, forms = [], []
        for rows in super().update(key_states, value_states, layer_idx, *args, **kwargs):
            codec = "int8" if latent or rows.shape[-1] % 2 else "int8-rotated"
            recent = self._in_16_bits(rows.shape[2], key_states.shape[2], stop)
            forms.append((rounded(rows, codec), halves(rows), *self._recent))
            found.append(torch.where(recent, forms[-1][1], forms[-1][0]))
        self.forms = forms
        return tuple(found)

    def update_indexer(self, indexer_key_states: Any, layer_idx: int) -> Any:
        update = partial(super().update_indexer, layer_idx=layer_idx)
        return self._update_index(layer_idx, update, indexer_key_states)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._index_keys = {number: rows[beam_idx] for number, rows in self._index_keys.items()}

    def _update_index(self, number: int, update: Any, keys: torch.Tensor) -> torch.Tensor:
        """Index keys are kept in bf16, and besides as others are."""
        count = keys.shape[-2]
        held = update(halves(keys[:, None])[:, 0] if self._recent[0] else keys.bfloat16().to(keys.dtype)).shape[-2]
        before = self._index_keys.get(number, keys[..., :0, :])[..., : held - count, :]
        rows = self._index_keys[number] = torch.cat([before, keys], -2)
        return torch.where(self._in_16_bits(held, count, held), halves(rows[:, None])[:, 0], rows.bfloat16().to(rows))

    def _in_16_bits(self, held: int, new: int, stop: int) -> torch.Tensor:
        """Which of the last `held` of `stop` positions are, [held, 1], for `new` queries."""
        window, sinks = self._recent
        positions = torch.arange(stop - held, stop)[:, None]
        return (positions < sinks) | (positions > stop - new - window if window else positions < 0)


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
