"""What forward passes a cache takes and which token ids it records: padding, masks, positions, wrappers, lengths."""

from __future__ import annotations

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.support import sweep
from helpers.tiny_models import COMMON, RoundedCache, generate, model, past, prompt, save_llama

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.rope import length_dependence

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
ATTENTIONS = ["sdpa", "eager", "kvmmap"]


def built(kind: str, **more: Any) -> Any:
    """A small random model of a family by its config's name."""
    torch.manual_seed(0)
    settings = COMMON | {"pad_token_id": 0} | more
    net = tf.AutoModelForCausalLM.from_config(getattr(tf, f"{kind}Config")(**settings)).eval().requires_grad_(False)
    net.generation_config.eos_token_id = None
    net.set_attn_implementation("kvmmap")
    return net


def agrees(net: Any, cache: KvmmapCache, ids: torch.Tensor, reused: int, count: int = 6, **more: Any) -> None:
    """Reuse and generate, and compare with generation that begins with an empty cache, ours and transformers' own."""
    assert reuse(cache, ids) == reused == cache.seq_len
    tokens, logits = generate(net, ids, cache, count, **more)
    expected, expected_logits = generate(net, ids, KvmmapCache(net, capacity=256), count, **more)
    torch.testing.assert_close(logits, expected_logits, rtol=0, atol=0.01)
    assert tokens.tolist() == expected.tolist()
    if length_dependence(net.config) is None:  # otherwise generate drops transformers' own cache
        expected, expected_logits = generate(net, ids, RoundedCache(config=net.config), count, **more)
        assert float((logits - expected_logits).abs().max()) < 0.02 * float(expected_logits.std())
        assert tokens.tolist() == expected.tolist()


# Masks and positions


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("hidden", [slice(0, 10), slice(9, 11)])
def test_padding_and_holes_are_refused_in_direct_calls(attention: str, hidden: slice) -> None:
    net, ids = model("llama", attention), prompt(30)
    mask = torch.ones_like(ids)
    mask[:, hidden] = 0
    cache = KvmmapCache(net)
    for given in ({"attention_mask": mask}, {"attention_mask": mask.bool()}, {"attention_mask": mask.float()}):
        with pytest.raises(kvmmap.UnsupportedModelError, match=f"hides position {hidden.start}"):
            net(ids, **given, **past(cache))
        with pytest.raises(kvmmap.UnsupportedModelError, match="hides position"):
            net.model(ids, **given, **past(cache))
    with pytest.raises(kvmmap.UnsupportedModelError, match="hides position"):
        net(inputs_embeds=net.get_input_embeddings()(ids), attention_mask=mask, **past(cache))
    assert cache.seq_len == 0
    net(ids[:, :20], **past(cache))
    with pytest.raises(kvmmap.UnsupportedModelError, match="is for 10 tokens"):
        net(ids[:, 20:], attention_mask=mask[:, 20:], **past(cache))
    assert cache.seq_len == 20
    assert cache.token_ids.tolist() == ids[0, :20].tolist()


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_passes_with_masks_of_their_own_have_unknown_ids(family: str, attention: str) -> None:
    net, ids = model(family, attention), prompt(30)
    causal = torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()
    if family == "mistral":
        causal &= causal.new_ones(30, 30).triu(-11)
    other = causal.clone()
    other[..., :20, :20] = True  # a bidirectional prefix
    for seen, known in ((causal, True), (other, False)):
        numbers = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        cache = KvmmapCache(net)
        net(ids, attention_mask=numbers if attention == "eager" else seen, **past(cache))
        assert cache.token_ids.tolist() == (ids[0].tolist() if known else [-1] * 30)
        if not known:
            with pytest.raises(kvmmap.UnknownTokensError, match="record_token_ids"):
                reuse(cache, ids)
        assert cache.seq_len == 30


@pytest.mark.parametrize("positions", [torch.arange(3, 33), torch.arange(3, 33)[None], torch.arange(30)[None] % 10])
def test_positions_that_do_not_follow_are_refused(positions: torch.Tensor) -> None:
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    for part in (net, net.model):
        with pytest.raises(kvmmap.UnsupportedModelError, match="goes on at 0"):
            part(prompt(30), position_ids=positions, **past(cache))
    assert cache.seq_len == 0
    net(prompt(30), position_ids=torch.arange(30)[None], **past(cache))
    assert cache.token_ids.tolist() == prompt(30)[0].tolist()


def multimodal() -> Any:
    config = tf.Qwen2VLConfig(
        text_config=COMMON
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
            "pad_token_id": 0,
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    torch.manual_seed(0)
    net = tf.Qwen2VLForConditionalGeneration(config).eval().requires_grad_(False)
    net.generation_config.eos_token_id = None
    net.set_attn_implementation("kvmmap")
    return net


def test_positions_in_three_axes() -> None:
    net, ids = multimodal(), prompt(30) % 89 + 1
    plain = torch.arange(30).expand(3, 1, 30)
    shifted = plain.clone()
    shifted[1, :, 12:] += 4
    for positions, known in ((plain, 30), (shifted, 12)):
        cache = KvmmapCache(net)
        net(input_ids=ids, position_ids=positions, **past(cache))
        assert cache.seq_len == 30
        assert cache.token_ids.tolist() == [*ids[0, :known].tolist(), *[-1] * (30 - known)]
        assert reuse(cache, ids) == min(known, 29)
    cache = KvmmapCache(net)
    tokens, _ = generate(net, ids, cache, 5)
    assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
    agrees(net, cache, torch.cat([ids, prompt(4, seed=1) % 89 + 1], 1), 30, 3)


def test_arguments_besides_tokens_make_ids_unknown() -> None:
    net = model("gpt2", "kvmmap")
    ids = prompt(12)
    cache = KvmmapCache(net)
    net(ids, token_type_ids=torch.ones_like(ids), **past(cache))
    assert cache.token_ids.tolist() == [-1] * 12
    with pytest.raises(kvmmap.UnknownTokensError):
        reuse(cache, ids)


# Reuse loses nothing that it can't judge


@pytest.mark.parametrize("mode", ["r", "a"])
def test_what_is_not_known_is_not_dropped(path: Path, mode: Any) -> None:
    net, ids = model("llama", "kvmmap"), prompt(30)
    with KvmmapCache.create(path, net) as cache:
        net(inputs_embeds=net.get_input_embeddings()(ids), **past(cache))
    longer = torch.cat([ids, prompt(5, seed=1)], 1)
    with KvmmapCache.open(path, net, mode) as cache:
        with pytest.raises(kvmmap.UnknownTokensError, match=r"record_token_ids.*discard=True") as caught:
            reuse(cache, longer)
        assert (caught.value.position, caught.value.actual, cache.seq_len) == (0, 30, 30)
        cache.record_token_ids(longer)
        agrees(net, cache, longer, 30)
    with KvmmapCache.open(path, net, mode) as cache:
        if mode == "a":
            assert reuse(cache, longer) == 34
        else:  # a file that is only read is told nothing
            with pytest.raises(kvmmap.UnknownTokensError):
                reuse(cache, longer)
            assert reuse(cache, longer, discard=True) == 0


def test_a_gap_can_be_filled(path: Path) -> None:
    net, ids = model("llama", "kvmmap"), prompt(30)
    with KvmmapCache.create(path, net) as cache:
        net(ids[:, :10], **past(cache))
        net(inputs_embeds=net.get_input_embeddings()(ids[:, 10:20]), **past(cache))
        net(ids[:, 20:], **past(cache))
    with KvmmapCache.open(path, net, "a") as cache:
        with pytest.raises(kvmmap.UnknownTokensError, match="from 10 on"):
            reuse(cache, ids)
        assert cache.seq_len == 30
        cache.record_token_ids(ids)
        agrees(net, cache, torch.cat([ids, prompt(5, seed=1)], 1), 30)
    with KvmmapCache.open(path, net, "a") as cache:
        assert reuse(cache, ids, discard=True) == 10


def test_nothing_is_lost_if_asked_and_a_fork_continues(path: Path, tmp_path: Path) -> None:
    net, ids = model("llama", "kvmmap"), prompt(30)
    with KvmmapCache.create(path, net) as cache:
        net(ids, **past(cache))
    other = torch.cat([ids[:, :25], prompt(8, seed=1)], 1)
    with KvmmapCache.open(path, net, "a") as cache:
        with pytest.raises(kvmmap.UnknownTokensError, match=r"shares 25 .*cache.fork"):
            reuse(cache, other, discard=False)
        with cache.fork(tmp_path / "fork.kvm", 25) as fork:
            assert fork.token_ids.tolist() == ids[0, :25].tolist()
            agrees(net, fork, other, 25)
        with cache.fork(tmp_path / "whole.kvm") as fork:
            assert fork.seq_len == 30
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.fork(tmp_path / "none.kvm", 31)
        assert reuse(cache, torch.cat([ids, other], 1), discard=False) == 30
    with KvmmapCache.open(path, net, "a") as cache:
        assert cache.seq_len == 30
        agrees(net, cache, other, 25)


def test_ids_that_are_no_numbers_are_refused() -> None:
    cache = KvmmapCache(model("llama"))
    with pytest.raises(kvmmap.DtypeError, match="whole numbers"):
        reuse(cache, [[1.5, 2.0]])
    assert reuse(cache, torch.tensor([[-1, 2]])) == 0


# Masks for layers that no mask is used of


MIXED = {
    "Qwen2Moe": {
        "use_sliding_window": False,
        "sliding_window": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
    },
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
    "Cohere2": {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
    "Olmo3": {"sliding_window": 8, "layer_types": ["full_attention"] * 3},
    "Afmoe": {
        "sliding_window": 8,
        "layer_types": ["full_attention"] * 3,
        "head_dim": 8,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "n_group": 1,
        "topk_group": 1,
    },
}


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("family", MIXED)
def test_masks_that_no_layer_uses_change_nothing(family: str, full: bool) -> None:
    settings = MIXED[family]
    if not full and "layer_types" in settings:
        settings = settings | {"layer_types": ["sliding_attention"] * 3}
    net = built(family, **settings)
    ids = torch.cat([prompt(20), prompt(20)], 1)
    cache = KvmmapCache(net)
    generate(net, ids, cache, 1)
    longer = torch.cat([ids, prompt(5, seed=1)], 1)
    agrees(net, cache, longer, 40)
    agrees(net, KvmmapCache(net), longer, 0, prefill_chunk_size=7)
    expected, _ = generate(net, longer, RoundedCache(config=net.config), 8)
    mask = torch.ones_like(longer)
    tokens = net.generate(
        longer,
        attention_mask=mask,
        **past(KvmmapCache(net)),
        max_new_tokens=8,
        do_sample=False,
        prompt_lookup_num_tokens=4,
    )
    assert tokens.tolist() == expected.tolist()
    net.set_attn_implementation("eager")
    eager, _ = generate(net, longer, KvmmapCache(net), 8)
    assert eager.tolist() == expected.tolist()


# Frequencies that depend on the length


def dynamic() -> Any:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return built("Llama", max_position_embeddings=48, rope_parameters=rope)


def longrope(kind: str = "Phi3") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
        rope |= {"original_max_position_embeddings": 48}
        more = {"original_max_position_embeddings": 48} if kind == "Phi3" else {}
        return built(kind, rope_parameters=rope, **more)


@pytest.mark.parametrize("saved", [True, False])
def test_keys_of_another_length_are_not_reused(path: Path, saved: bool) -> None:
    net, ids = dynamic(), prompt(90)
    cache = KvmmapCache.create(path, net, capacity=256) if saved else KvmmapCache(net, capacity=256)
    net(ids, **past(cache))
    if saved:
        cache.close()
        cache = KvmmapCache.open(path, net)
    agrees(net, cache, ids[:, :45], 0, 1)
    assert (cache.seq_len, reuse(cache, ids[:, :44])) == (45, 43)  # shorter than the original length
    net(ids[:, 43:90], **past(cache))
    agrees(net, cache, ids, 43 if net.model.rotary_emb.max_seq_len_cached < 48 else 0, 1)
    cache.close()


def test_frequencies_that_change_once() -> None:
    net, ids = longrope(), prompt(90)
    cache = KvmmapCache(net)
    generate(net, ids[:, :80], cache, 1)
    assert cache.seq_len == 80  # transformers would have dropped an empty cache, too
    agrees(net, cache, ids, 80)
    agrees(net, cache, ids[:, :45], 0, 1)
    agrees(net, cache, ids[:, :47], 45, 1)
    agrees(net, cache, ids, 0)


def test_a_generation_that_leaves_the_cache_warns(path: Path) -> None:
    net, ids = longrope(), prompt(40)
    with KvmmapCache.create(path, net) as cache:
        with pytest.warns(RuntimeWarning, match=r"beyond 48 positions.*48/256"):
            net.generate(ids, attention_mask=torch.ones_like(ids), **past(cache), max_new_tokens=20, do_sample=False)
        assert cache.seq_len == 48
        assert (cache.token_ids >= 0).all()
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        generate(other, ids, KvmmapCache(other), 2)


# Wrappers


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
def test_peft_is_watched_through_its_base(path: Path) -> None:
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(model("llama", "kvmmap"), peft.LoraConfig(target_modules=["k_proj"])).eval()
    net.requires_grad_(False)
    ids = prompt(20)
    with KvmmapCache.create(path, net) as cache:
        net.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **past(cache), max_new_tokens=1)
        assert cache.token_ids.tolist() == ids[0].tolist()
    longer = torch.cat([ids, prompt(5, seed=1)], 1)
    with KvmmapCache.open(path, net, "a") as cache:
        assert reuse(cache, longer) == 20
        net(input_ids=longer[:, 20:], **past(cache))
        assert cache.token_ids.tolist() == longer[0].tolist()
    mask = torch.ones_like(ids)
    mask[:, :4] = 0
    cache = KvmmapCache(net)
    with pytest.raises(kvmmap.UnsupportedModelError, match="no padding"):
        net(input_ids=ids, attention_mask=mask, **past(cache))
    assert cache.seq_len == 0


@pytest.mark.parametrize(("attention", "whole", "shapes"), [("kvmmap", False, None), *sweep(("sdpa", True, True))])
def test_compiled_models(attention: str, whole: bool, shapes: bool | None) -> None:
    net, ids = model("llama", attention), prompt(20)
    expected, _ = generate(net, ids, KvmmapCache(net), 4)
    torch._dynamo.reset()
    if whole:
        run = torch.compile(net, backend="eager", dynamic=shapes)
        cache, tokens = KvmmapCache(net), ids
        with torch.no_grad():
            fed = ids
            for _ in range(4):
                fed = run(fed, **past(cache)).logits[:, -1:].argmax(-1)
                tokens = torch.cat([tokens, fed], 1)
    else:
        net.forward = torch.compile(net.forward, backend="eager", dynamic=shapes)
        cache = KvmmapCache(net)
        tokens, _ = generate(net, ids, cache, 4)
    assert tokens.tolist() == expected.tolist()
    assert cache.token_ids.tolist() == tokens[0, :-1].tolist()


@pytest.mark.parametrize("how", ["model", "forward", "module"])
def test_a_full_graph_is_refused_when_the_cache_is_made(how: str) -> None:
    net = model("llama", "kvmmap")
    if how == "model":
        whole = torch.compile(net, backend="eager", fullgraph=True)
    elif how == "forward":
        net.forward = torch.compile(net.forward, backend="eager", fullgraph=True)
        whole = net
    else:
        net.compile(backend="eager", fullgraph=True)
        whole = net
    with pytest.raises(kvmmap.UnsupportedModelError, match="without fullgraph=True"):
        KvmmapCache(whole)


def test_a_full_graph_that_is_compiled_later_is_refused_by_torch() -> None:
    torch._dynamo.reset()  # it would use the graphs of this code that it has made before, with their breaks
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    net.forward = torch.compile(net.forward, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="compile the model without fullgraph=True"), torch.no_grad():
        net(prompt(5), **past(cache))
    assert cache.seq_len == 0


def test_stop_strings(tmp_path: Path) -> None:
    save_llama(tmp_path)
    net, tokenizer = tf.AutoModelForCausalLM.from_pretrained(tmp_path), tf.AutoTokenizer.from_pretrained(tmp_path)
    net.generation_config.eos_token_id = None
    net.set_attn_implementation("kvmmap")
    expected, _ = generate(net, prompt(20), KvmmapCache(net), 6)
    tokens, _ = generate(net, prompt(20), KvmmapCache(net), 6, stop_strings=["no such text"], tokenizer=tokenizer)
    assert tokens.tolist() == expected.tolist()


def test_a_model_that_the_cache_was_not_opened_for_is_refused() -> None:
    net, other = model("llama", "kvmmap"), model("llama", "kvmmap", seed=1)
    cache = KvmmapCache(net)
    net(prompt(10), **past(cache))
    with pytest.raises(kvmmap.ModelMismatchError, match="another model"):
        other(prompt(3), **past(cache))
    assert cache.seq_len == 10


# Copies


def test_caches_in_memory_are_copied_and_pickled() -> None:
    net, ids = model("gemma3", "kvmmap"), prompt(30)
    cache = KvmmapCache(net, metadata={"a": 1})
    net(ids, **past(cache))
    longer = torch.cat([ids, prompt(5, seed=1)], 1)
    for made in (copy.deepcopy(cache), copy.copy(cache), pickle.loads(pickle.dumps(cache))):
        assert (made.seq_len, made.capacity, made.metadata) == (30, 256, {"a": 1})
        assert made.token_ids.tolist() == ids[0].tolist()
        for one, two in zip(made.layers, cache.layers, strict=True):
            assert torch.equal(one.keys, two.keys)
        agrees(net, made, longer, 30)
        assert cache.seq_len == 30


@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_file_is_not_copied_as_an_object(path: Path, mode: Any) -> None:
    net = model("llama", "kvmmap")
    KvmmapCache.create(path, net).close()
    with KvmmapCache.open(path, net, mode) as cache:
        for fail in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(kvmmap.KvmmapError, match=r"save\(path\).*mode=\"r\""):
                fail(cache)


def test_layers_give_their_tensors() -> None:
    net = model("llama").to(torch.bfloat16)
    cache = KvmmapCache(net)
    net(prompt(7), **past(cache))
    layer = cache.layers[1]
    assert (layer.keys.shape, layer.keys.dtype, layer.values.shape) == ((1, 2, 7, 8), torch.bfloat16, (1, 2, 7, 8))
    assert torch.equal(layer.keys, layer.read(torch.bfloat16)[0])
    assert torch.equal(layer.values, layer.read(torch.bfloat16)[1])
