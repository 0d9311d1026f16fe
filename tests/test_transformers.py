"""Generation through a KvmmapCache is generation through transformers' own cache of the same rows, in every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from helpers.support import run_python
from helpers.tiny_models import CONFIGS, IN_PLACE, RoundedCache, generate, model, past, prompt
from transformers import DynamicCache

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, KvmmapLayer
from kvmmap.integrations.transformers.blocks import attend_in_blocks

pytestmark = pytest.mark.torch
ATTENTIONS = ["sdpa", "kvmmap"]

torch.set_num_threads(1)  # models as small as these only wait for each other's threads


def stored(cache: KvmmapCache) -> list[np.ndarray]:
    """Everything that is kept, layer by layer."""
    arrays = []
    for layer in cache.layers:
        own = layer.own
        arrays += [own.key_codes, own.key_scales, own.value_codes, own.value_scales]
    return arrays


def reference_attention(family: str) -> str:
    """transformers' own attention for a family: "sdpa" has neither soft caps nor sinks."""
    return "eager" if family in ("gemma2", "gpt_oss") else "sdpa"


# Families


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_generation_is_that_of_a_dynamic_cache_of_the_same_rows(family: str, attention: str) -> None:
    net = model(family, reference_attention(family))
    ids = prompt(30)
    expected, expected_logits = generate(net, ids, RoundedCache(config=net.config))
    net.set_attn_implementation(attention if attention == "kvmmap" else reference_attention(family))
    tokens, logits = generate(net, ids, KvmmapCache(net))
    # Sums in another order may push a number over the edge between two codes.
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0.01)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_closing_and_reopening_between_two_tokens_changes_nothing(path: Path, family: str, attention: str) -> None:
    net = model(family, attention if attention == "kvmmap" else reference_attention(family))
    ids = prompt(30)
    through = KvmmapCache(net)
    expected, expected_logits = generate(net, ids, through)
    with KvmmapCache.create(path, net) as cache:
        tokens, first = generate(net, ids, cache, 7)
    with KvmmapCache.open(path, net, "a") as cache:
        tokens, second = generate(net, tokens, cache, 9)
    with KvmmapCache.open(path, net, "a") as cache:
        tokens, third = generate(net, tokens, cache, 8)
        assert tokens.tolist() == expected.tolist()
        assert torch.equal(torch.cat([first, second, third]), expected_logits)
        for array, other in zip(stored(cache), stored(through), strict=True):
            np.testing.assert_array_equal(array, other)
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()


@pytest.mark.parametrize("family", IN_PLACE)
def test_decoding_in_place_builds_no_keys_and_values(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    net = model(family, "kvmmap")
    cache = KvmmapCache(net)
    tokens, _ = generate(net, prompt(30), cache, 1)
    monkeypatch.delattr(KvmmapLayer, "read")
    tokens, _ = generate(net, tokens, cache, 4)
    assert tokens.shape == (1, 35)


def test_latents_are_dequantised_for_attention() -> None:
    cache = KvmmapCache(model("deepseek_v3"))
    assert all(layer.kind.latent for layer in cache.layers)
    assert (cache.layers[0].own.head_dim, cache.layers[0].own.value_head_dim) == (24, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_half_precision(attention: str, dtype: torch.dtype) -> None:
    net = model("llama").to(dtype)
    ids = prompt(36)
    cache, other = KvmmapCache(net), RoundedCache(config=net.config)
    for start, stop in ((0, 30), (30, 31), (31, 35), (35, 36)):
        net.set_attn_implementation("sdpa")
        expected = net(ids[:, start:stop], **past(other)).logits
        net.set_attn_implementation(attention)
        logits = net(ids[:, start:stop], **past(cache)).logits
        assert logits.dtype == dtype
        assert (logits - expected).float().std() < 0.15 * expected.float().std()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_on_a_gpu(attention: str) -> None:
    net = model("llama", attention).cuda()
    ids = prompt(30).cuda()
    expected, _ = generate(net, ids, RoundedCache(config=net.config))
    tokens, _ = generate(net, ids, KvmmapCache(net))
    assert tokens.tolist() == expected.tolist()


# Ways of generating


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_prompt_may_be_prefilled_in_chunks(family: str, attention: str) -> None:
    net = model(family, attention if attention == "kvmmap" else reference_attention(family))
    whole, whole_logits = generate(net, prompt(100), KvmmapCache(net), 6)
    tokens, logits = generate(net, prompt(100), KvmmapCache(net), 6, prefill_chunk_size=23)
    assert tokens.tolist() == whole.tolist()
    torch.testing.assert_close(logits, whole_logits, rtol=0, atol=0.01)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sampling(attention: str) -> None:
    net = model("llama", "sdpa")
    torch.manual_seed(1)
    expected, _ = generate(net, prompt(30), RoundedCache(config=net.config), do_sample=True, temperature=0.8, top_k=20)
    net.set_attn_implementation(attention)
    torch.manual_seed(1)
    tokens, _ = generate(net, prompt(30), KvmmapCache(net), do_sample=True, temperature=0.8, top_k=20)
    assert tokens.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("assistant", [{"prompt_lookup_num_tokens": 4}, {"assistant_model": None}])
def test_assisted_generation(path: Path, family: str, attention: str, assistant: dict[str, Any]) -> None:
    net = model(family, attention)
    ids = torch.cat([prompt(20), prompt(20)], 1)  # something to look up
    expected, _ = generate(net, ids, KvmmapCache(net))
    if "assistant_model" in assistant:
        assistant = {"assistant_model": model(family, seed=1)}
    with KvmmapCache.create(path, net) as cache:
        tokens = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **past(cache),
            do_sample=False,
            max_new_tokens=24,
            **assistant,
        )
        assert tokens.tolist() == expected.tolist()
        assert cache.seq_len == tokens.shape[1] - 1
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()


def test_calling_the_model_itself(path: Path) -> None:
    net = model("llama", "kvmmap")
    ids = prompt(40)
    expected = net(ids, **past(DynamicCache())).logits
    cache = KvmmapCache(net)
    one = net(ids[:, :25], **past(cache)).logits
    two = net(input_ids=ids[:, 25:], **past(cache), use_cache=True).logits
    assert (torch.cat([one, two], 1) - expected).std() < 0.05 * expected.std()
    assert cache.token_ids.tolist() == ids[0].tolist()
    embedded = net.get_input_embeddings()(prompt(3, seed=1))
    net(inputs_embeds=embedded, **past(cache))
    net(prompt(2, seed=2), **past(cache))
    assert cache.token_ids.tolist() == [*ids[0].tolist(), -1, -1, -1, *prompt(2, seed=2)[0].tolist()]


@pytest.mark.parametrize("family", CONFIGS)
def test_attention_without_a_cache_of_ours_is_transformers_own(family: str) -> None:
    net = model(family, reference_attention(family))
    ids = torch.cat([prompt(30), prompt(30, seed=1)])
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    expected = [net(ids, attention_mask=mask).logits[1], net(ids, attention_mask=mask, use_cache=False).logits[0, 9:]]
    dynamic = DynamicCache(config=net.config)
    net(ids[:, :20], attention_mask=mask[:, :20], **past(dynamic))
    expected.append(net(ids[:, 20:], attention_mask=mask, **past(dynamic)).logits)
    net.set_attn_implementation("kvmmap")
    found = [net(ids, attention_mask=mask).logits[1], net(ids, attention_mask=mask, use_cache=False).logits[0, 9:]]
    dynamic = DynamicCache(config=net.config)
    net(ids[:, :20], attention_mask=mask[:, :20], **past(dynamic))
    found.append(net(ids[:, 20:], attention_mask=mask, **past(dynamic)).logits)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4)


def test_padding_and_own_masks_are_attended_with_as_tensors() -> None:
    """Where no model was given to watch: positions are then the caller's business."""
    net = model("mistral", "sdpa")
    ids, mask = prompt(40), torch.ones(1, 40, dtype=torch.long)
    mask[0, :7] = 0
    own = torch.ones(1, 1, 40, 40, dtype=torch.bool).tril()
    own[..., 3] = False
    own[..., 3, 3] = True
    for given in (mask, own):
        net.set_attn_implementation("sdpa")
        expected = net(ids, attention_mask=given, **past(RoundedCache(config=net.config))).logits[0, 7:]
        net.set_attn_implementation("kvmmap")
        logits = net(ids, attention_mask=given, **past(KvmmapCache(net.config))).logits[0, 7:]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


def test_attention_in_blocks_is_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 300, 8), torch.randn(2, 3, 411, 8), torch.randn(2, 3, 411, 5)
    positions, keys = torch.arange(111, 411)[:, None], torch.arange(411)
    for window, softcap in ((None, None), (50, None), (1, 3.0), (411, 0.5)):
        seen = keys <= positions
        if window is not None:
            seen &= keys > positions - window
        scores = 0.3 * query @ key.repeat_interleave(2, 1).transpose(-1, -2)
        scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~seen, -torch.inf)
        expected = scores.softmax(-1) @ value.repeat_interleave(2, 1)
        for more in ({"window": window}, {"mask": seen.expand(1, 1, -1, -1)}, {"mask": seen.expand(2, 6, -1, -1)}):
            out, lse = attend_in_blocks(query, key, value, scale=0.3, softcap=softcap, **more)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(lse, scores.logsumexp(-1))
    blind = torch.zeros(1, 1, 300, 411, dtype=torch.bool)
    out, lse = attend_in_blocks(query, key, value, scale=1.0, mask=blind)
    assert not out.any()
    assert (lse == -torch.inf).all()


# Refusals


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_batches_are_refused_and_nothing_is_stored(attention: str) -> None:
    net = model("llama", attention)
    ids = prompt(10)
    for settings in ({"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}):
        cache = KvmmapCache(net)
        with pytest.raises(kvmmap.UnsupportedModelError, match=r"one sequence.*beam"):
            net.generate(ids, **past(cache), max_new_tokens=3, **settings)
        assert cache.seq_len == 0
    with pytest.raises(kvmmap.UnsupportedModelError, match="batch of 2"):
        net(ids.repeat(2, 1), **past(KvmmapCache(net)))
    cache = KvmmapCache(net)
    cache.reorder_cache(torch.tensor([0]))
    cache.batch_repeat_interleave(1)
    cache.batch_select_indices(torch.tensor([0]))
    for call in (
        lambda: cache.reorder_cache(torch.tensor([0, 0])),
        lambda: cache.batch_repeat_interleave(2),
        lambda: cache.batch_select_indices(torch.tensor([0, 0])),
    ):
        with pytest.raises(kvmmap.UnsupportedModelError, match="one sequence"):
            call()
    assert cache.batch_size == 1


def test_tokens_that_do_not_come_next_are_refused() -> None:
    net = model("llama", "kvmmap")
    ids = prompt(20)
    cache = KvmmapCache(net)
    padded = torch.ones_like(ids)
    padded[0, :5] = 0
    with pytest.raises(kvmmap.UnsupportedModelError, match="no padding"):
        net.generate(ids, attention_mask=padded, **past(cache), max_new_tokens=3)
    assert cache.seq_len == 0
    generate(net, ids, cache, 1)
    assert cache.seq_len == 20
    with pytest.raises(kvmmap.UnsupportedModelError, match="reuse"):
        generate(net, ids, cache, 1)  # all of it is there: transformers would feed all of it again
    with pytest.raises(kvmmap.UnsupportedModelError, match="packed"):
        net(ids, position_ids=torch.arange(20)[None] % 10, **past(KvmmapCache(net)))
    assert cache.seq_len == 20


def test_gradients_are_refused() -> None:
    net = model("llama", "kvmmap").requires_grad_(True)
    with pytest.raises(kvmmap.KvmmapError, match="no_grad"):
        net(prompt(5), **past(KvmmapCache(net)))
    with torch.no_grad():
        net(prompt(5), **past(KvmmapCache(net)))


def test_what_attention_can_not_do_is_refused(path: Path) -> None:
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    with pytest.raises(kvmmap.UnsupportedModelError, match="output_attentions"):
        net(prompt(5), **past(cache), output_attentions=True)
    assert cache.seq_len == 0
    with pytest.raises(kvmmap.UnsupportedModelError, match=r"cu_seq_lens_q.*sdpa"):
        net(prompt(5), **past(cache), cu_seq_lens_q=torch.tensor([0, 5]))
    mixed = KvmmapCache(model("gemma3"))
    mixed.layers[0].pattern.in_place = True  # a mask was made for windows only
    with pytest.raises(kvmmap.UnsupportedModelError, match="one mask"):
        mixed.update(torch.zeros(1, 2, 3, 256), torch.zeros(1, 2, 3, 256), 1)
    layer = cache.layers[0]
    with pytest.raises(kvmmap.UnsupportedModelError, match="can't attend in place"):
        torch.cat([layer, layer])
    with pytest.raises(AttributeError, match="can't attend in place"):
        layer.shape  # noqa: B018


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tf.T5Config(), "t5.*encoder-decoder"),
        (tf.MambaConfig(num_hidden_layers=2), "mamba keeps states, whose shapes are found by running"),
        (tf.Qwen3NextConfig(num_hidden_layers=4), "qwen3_next keeps states.*make the cache with the model"),
        (tf.DeepseekV4Config(num_hidden_layers=4), "deepseek_v4.*compressed"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_models_that_keep_something_else_are_refused_by_name(config: Any, message: str) -> None:
    with pytest.raises(kvmmap.UnsupportedModelError, match=message):
        KvmmapCache(config)


def test_objects_that_are_not_models_are_refused() -> None:
    with pytest.raises(kvmmap.KvmmapError, match="not a str"):
        KvmmapCache("model")


def test_importing_kvmmap_does_not_import_torch() -> None:
    code = "import sys, kvmmap; assert not {'torch', 'transformers', 'kvmmap.integrations'} & set(sys.modules)"
    run_python(code)
