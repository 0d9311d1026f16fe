"""What a config says of a cache, and which models are refused by name when a cache is made."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf
from helpers.tiny_models import past, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache
from kvmmap.integrations.transformers.arguments import is_plain
from kvmmap.integrations.transformers.attention import kvmmap_attention
from kvmmap.integrations.transformers.dispatch import attends, masks_windows
from kvmmap.integrations.transformers.models import layer_kinds

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 96}


def known(name: str) -> Any:
    """A class of the installed transformers."""
    if not hasattr(tf, name):
        pytest.skip(f"transformers {tf.__version__} has no {name}")
    return getattr(tf, name)


def shapes(config: Any) -> list[tuple[int, int, int]]:
    """The KV heads and dims of each layer."""
    kinds = [kind.geometry for kind in layer_kinds(config)]
    return [(shape.num_kv_heads, shape.head_dim, shape.value_head_dim) for shape in kinds]


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({}, 1),
        ({"multi_query": False}, 4),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 4),
        ({"multi_query": True, "num_kv_heads": 4}, 1),
    ],
)
def test_kv_heads_of_falcon(settings: dict[str, Any], heads: int) -> None:
    config = tf.FalconConfig(**SMALL, **settings)
    assert shapes(config) == [(heads, 8, 8)] * 2
    net = tf.FalconForCausalLM(config).eval().requires_grad_(False)
    cache = KvmmapCache(net)
    net(prompt(5), **past(cache))
    assert cache.seq_len == 5


def test_kv_heads_that_differ_by_layer() -> None:
    config = known("MiMoV2FlashConfig")(
        **SMALL,
        num_key_value_heads=2,
        head_dim=8,
        v_head_dim=12,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    )
    assert shapes(config) == [(2, 8, 12), (4, 8, 12)]


def test_looped_layers_are_kept_once_a_loop() -> None:
    settings = {"num_hidden_layers": 4, "n_input_layers": 1, "n_output_layers": 1, "n_recurrent_loops": 3}
    config = known("DoryConfig")(**SMALL | settings, num_key_value_heads=2, head_dim=8)
    assert shapes(config) == [(2, 8, 8)] * (4 + 2 * 2)
    windows = [kind.window for kind in layer_kinds(config)]
    assert windows[4:] == windows[1:3] * 2
    config.recurrent_kv_cache_mode = "last_loop"
    with pytest.raises(kvmmap.UnsupportedModelError, match=r"dory reads a cache's tensors itself"):
        KvmmapCache(config)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("CpmAnt", {"num_hidden_layers": 2}, "cpmant puts positions of its own"),
        ("Moshi", {"num_hidden_layers": 2}, "moshi drops positions"),
        ("Mllama", {}, "mllama.* has cross-attention layers"),
        ("GPT2", {"add_cross_attention": True}, "gpt2 has cross-attention layers .add_cross_attention"),
        ("Blt", {}, "blt caches bytes and patches"),
        ("ProphetNet", {"is_encoder_decoder": False}, "prophetnet predicts several tokens"),
        ("XLNet", {}, "xlnet takes no cache"),
        ("OpenAIGPT", {}, "openai-gpt takes no cache"),
        ("Rwkv", {}, "rwkv has no attention heads"),
        ("xLSTM", {}, "xlstm has no attention heads"),
        ("PI0", {}, "pi0 has no decoder layers"),
        ("Bert", {"is_decoder": True, "add_cross_attention": True}, "bert has cross-attention layers"),
        ("T5Gemma2", {}, "t5gemma2 is an encoder-decoder"),
        ("MusicgenDecoder", {}, "musicgen_decoder feeds one code"),
        ("Qwen3OmniMoeText", {"sliding_window": 12}, "qwen3_omni_moe_text drops positions"),
        ("Bert", {}, "bert attends in both directions"),
        ("Roberta", {"is_decoder": False}, "roberta attends in both directions"),
        ("Gemma3Text", {"use_bidirectional_attention": True}, "gemma3_text attends in both directions"),
    ],
)
def test_models_that_can_not_be_kept_are_refused_by_name(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(kvmmap.UnsupportedModelError, match=message):
        KvmmapCache(known(f"{name}Config")(**settings))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("LlamaForCausalLM", "interface"),
        ("GPT2LMHeadModel", "interface"),  # uses keys itself only in "eager"
        ("Gemma2ForCausalLM", "interface"),
        ("JetMoeForCausalLM", "tensors"),
        ("DiffLlamaForCausalLM", "tensors"),
        ("DogeForCausalLM", "tensors"),
        ("DeepseekV3ForCausalLM", "tensors"),
        ("GitForCausalLM", "own"),
        ("MptForCausalLM", "own"),
        ("FalconForCausalLM", "own"),
    ],
)
def test_how_models_attend_is_read_from_their_source(name: str, how: str) -> None:
    assert attends(known(name).config_class()) == how


def test_models_that_mask_no_windows_are_known_by_their_source() -> None:
    assert not masks_windows(known("MoshiForCausalLM").config_class())
    assert not masks_windows(tf.GPT2LMHeadModel.config_class())
    assert masks_windows(tf.MistralForCausalLM.config_class())
    assert masks_windows(tf.Gemma3ForCausalLM.config_class())


def test_a_model_without_source_is_taken_for_an_ordinary_one() -> None:
    class Config:
        __module__ = "somewhere.configuration_new"

    assert attends(Config()) == "interface"
    assert masks_windows(Config())
    assert attends(None) == "interface"


def test_a_layer_in_place_of_tensors_is_refused_as_one_of_ours() -> None:
    """What a model without source runs into, if it uses keys before it attends."""
    layer = KvmmapCache(tf.LlamaConfig(**SMALL, intermediate_size=48)).layers[0]
    with pytest.raises(kvmmap.UnsupportedModelError, match=r"'repeat'.*can't attend in place"):
        layer.repeat(1, 2, 1, 1)
    assert not hasattr(layer, "repeat")


@pytest.mark.parametrize("family", [tf.MptConfig, tf.GitConfig, tf.BloomConfig])
def test_models_that_attend_themselves_get_masks_of_numbers(family: Any) -> None:
    """Also where attention "kvmmap" is set by the config, past what `set_attn_implementation` would refuse."""
    torch.manual_seed(0)
    config = family(**SMALL, d_model=32, n_heads=4, n_layers=2, n_head=4, n_layer=2)
    net = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval().requires_grad_(False)
    ids = prompt(20)
    expected = net(ids, use_cache=False).logits
    net.config._attn_implementation = "kvmmap"
    assert torch.equal(net(ids, use_cache=False).logits, expected)
    cache = KvmmapCache(net)
    assert (net(ids, **past(cache)).logits - expected).std() < 0.1 * expected.std()
    assert cache.seq_len == 20


@pytest.mark.parametrize(("length", "count", "window"), [(0, 5, None), (3, 1, None), (3, 4, 2), (9, 1, 4)])
def test_masks_that_mark_what_is_hidden_are_plain_too(length: int, count: int, window: int | None) -> None:
    """MPT's are such."""
    positions = torch.arange(length, length + count)[:, None]
    keys = torch.arange(length + count)
    seen = (keys <= positions) & (keys > positions - (window or 99))
    for mask in (seen, ~seen):
        assert is_plain(mask[None, None], length, count, window)
        wrong = mask.clone()
        wrong[-1, -2] = ~wrong[-1, -2]
        assert not is_plain(wrong[None, None], length, count, window)


# Attention over tensors


class Module(torch.nn.Module):
    """What an attention module says of itself."""

    is_causal = True
    num_key_value_groups = 2


def tensors(queries: int = 5, keys: int = 9) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return torch.randn(1, 4, queries, 8), torch.randn(1, 2, keys, 8), torch.randn(1, 2, keys, 6)


@pytest.mark.parametrize("given", ["s_aux", "sinks"])
@pytest.mark.parametrize("mask", ["none", "bool", "numbers"])
@pytest.mark.parametrize("biased", [False, True])
def test_sinks_over_tensors(given: str, mask: str, biased: bool) -> None:
    query, key, value = tensors(9, 9)
    seen = torch.ones(9, 9, dtype=torch.bool).tril()
    bias = torch.randn(1, 4, 9, 9) if biased else torch.zeros(1, 4, 9, 9)
    sinks = torch.randn(4)[None, :, None, None].expand(1, 4, 9, 1) if given == "s_aux" else torch.randn(1, 4, 9, 1)
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3 + bias
    weights = torch.cat([scores.masked_fill(~seen, -torch.inf), sinks], -1).softmax(-1)[..., :-1]
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    masks = {"none": None, "bool": seen[None, None], "numbers": torch.zeros(1, 1, 9, 9).masked_fill(~seen, -1e30)}
    more = {"s_aux": sinks[0, :, 0, 0]} if given == "s_aux" else {"sinks": sinks}
    if biased:
        more["position_bias"] = bias
    out, _ = kvmmap_attention(Module(), query, key, value, masks[mask], scaling=0.3, **more)
    torch.testing.assert_close(out, expected)


def test_attention_with_sinks_in_both_directions_sees_everything() -> None:
    query, key, value = tensors()
    scores = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3
    weights = torch.cat([scores, torch.zeros(1, 4, 5, 1)], -1).softmax(-1)[..., :-1]
    expected = (weights @ value.repeat_interleave(2, 1)).transpose(1, 2)
    out, _ = kvmmap_attention(Module(), query, key, value, None, scaling=0.3, s_aux=torch.zeros(4), is_causal=False)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    "argument", [{"score_mod": abs}, {"indices": torch.zeros(1)}, {"block_indices": torch.zeros(1)}, {"alibi": True}]
)
def test_arguments_that_change_attention_are_refused_over_tensors_too(argument: dict[str, Any]) -> None:
    with pytest.raises(kvmmap.UnsupportedModelError, match=f"{next(iter(argument))}=.*sdpa"):
        kvmmap_attention(Module(), *tensors(), None, **argument)
    out, _ = kvmmap_attention(Module(), *tensors(), None, use_cache=True, position_ids=torch.arange(5)[None])
    assert out.shape == (1, 5, 4, 6)


def test_a_soft_cap_with_a_position_bias_is_refused() -> None:
    with pytest.raises(kvmmap.UnsupportedModelError, match=r"softcap= and position_bias="):
        kvmmap_attention(Module(), *tensors(), None, softcap=2.0, position_bias=torch.zeros(1, 4, 5, 9))
