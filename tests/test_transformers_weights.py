"""Whose cache it is: whatever changes keys and values is noticed when a cache is opened, and at each pass."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from helpers.tiny_models import generate, model, past, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.identity import weights_fingerprint
from kvmmap.integrations.transformers.memory import LEAST, TensorBytes
from kvmmap.integrations.transformers.weights import weights_of

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def data(net: Any) -> None:
    net.model.layers[0].self_attn.k_proj.weight.data += 0.3


def data_of_the_last_norm(net: Any) -> None:
    net.model.layers[2].input_layernorm.weight.data.mul_(1.5)


def data_of_one_number(net: Any) -> None:
    net.model.layers[1].mlp.up_proj.weight.data[7, 11] += 1.0


def frequencies(net: Any) -> None:
    net.model.rotary_emb.inv_freq.mul_(1.01)


def data_of_frequencies(net: Any) -> None:
    net.model.rotary_emb.inv_freq.data[3] *= 1.01


def replaced_frequencies(net: Any) -> None:
    net.model.rotary_emb.inv_freq = net.model.rotary_emb.inv_freq * 1.01


def scaled_sines(net: Any) -> None:
    net.model.rotary_emb.attention_scaling = 1.1


def in_place(net: Any) -> None:
    with torch.no_grad():
        net.model.layers[1].mlp.up_proj.weight[0, 0] += 1.0


def loaded(net: Any) -> None:
    net.load_state_dict(model("llama", seed=1).state_dict())


def assigned(net: Any) -> None:
    net.load_state_dict(model("llama", seed=1).state_dict(), assign=True)


def replaced(net: Any) -> None:
    net.model.layers[1].self_attn.v_proj.weight = model("llama", seed=1).model.layers[1].self_attn.v_proj.weight


def layer_replaced(net: Any) -> None:
    net.model.layers[1] = model("llama", "kvmmap", seed=1).model.layers[1]


def halved(net: Any) -> None:
    net.half()


def narrowed_and_widened(net: Any) -> None:
    net.half().float()


def bias_added(net: Any) -> None:
    net.model.layers[1].self_attn.k_proj.bias = torch.nn.Parameter(torch.full((16,), 0.1), requires_grad=False)


CHANGES = [
    bias_added,
    data,
    data_of_the_last_norm,
    data_of_one_number,
    frequencies,
    data_of_frequencies,
    replaced_frequencies,
    scaled_sines,
    in_place,
    loaded,
    assigned,
    replaced,
    layer_replaced,
    halved,
    narrowed_and_widened,
]


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_are_refused(path: Path, change: Any) -> None:
    net = model("llama", "kvmmap")
    ids = prompt(20)
    with KvmmapCache.create(path, net) as cache:
        net(ids, **past(cache))
        change(net)
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
            net(prompt(2), **past(cache))
        assert cache.seq_len == 20
    with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
        KvmmapCache.open(path, net)
    other = KvmmapCache(net)
    net(ids, **past(other))
    assert reuse(other, ids) == 19


@pytest.mark.parametrize("how", ["none", "deleted", "registered"])
def test_a_bias_that_is_removed_is_a_change(path: Path, how: str) -> None:
    net = model("llama", "kvmmap", attention_bias=True)
    with KvmmapCache.create(path, net) as cache:
        net(prompt(20), **past(cache))
        projection = net.model.layers[1].self_attn.k_proj
        assert projection.bias is not None
        if how == "none":
            projection.bias = None
        elif how == "deleted":
            del projection.bias
        else:
            projection.register_parameter("bias", None)
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
            net(prompt(2), **past(cache))
    with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
        KvmmapCache.open(path, net)


def test_a_change_that_is_undone_is_none(path: Path) -> None:
    net = model("llama", "kvmmap")
    with KvmmapCache.create(path, net) as cache:
        net(prompt(20), **past(cache))
        data(net)
        net.model.layers[0].self_attn.k_proj.weight.data.copy_(model("llama").model.layers[0].self_attn.k_proj.weight)
        net(prompt(2), **past(cache))
        assert cache.seq_len == 22


def test_the_model_that_runs_is_the_one_that_counts(path: Path) -> None:
    net, same, other = model("llama", "kvmmap"), model("llama", "kvmmap"), model("llama", "kvmmap", seed=1)
    twin = copy.deepcopy(net)
    for watched in (same, other):
        KvmmapCache(watched)
    ids = prompt(20)
    with KvmmapCache.create(path, net) as cache:
        net(ids, **past(cache))
        with pytest.raises(kvmmap.ModelMismatchError, match="weights was"):
            other(prompt(2), **past(cache))
        assert cache.seq_len == 20
        same(prompt(2), **past(cache))
        net(prompt(2), **past(cache))
        KvmmapCache(twin)
        twin(prompt(2), **past(cache))
        assert cache.seq_len == 26
        assert (cache.token_ids >= 0).all()


def test_a_given_fingerprint_holds_until_something_changes(path: Path) -> None:
    net = model("llama", "kvmmap")
    with KvmmapCache.create(path, net, fingerprint="mine") as cache:
        net(prompt(20), **past(cache))
        data(net)
        with pytest.raises(kvmmap.ModelMismatchError, match="fingerprint='mine'"):
            net(prompt(2), **past(cache))
        assert cache.seq_len == 20


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_no_change(path: Path, kind: str) -> None:
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 24}
    net = model("llama", "kvmmap", max_position_embeddings=24, rope_parameters=rope)
    before = weights_of(net)
    fingerprint = weights_fingerprint(net)
    with KvmmapCache.create(path, net, capacity=64) as cache:
        net(prompt(40), **past(cache))
        net(prompt(2), **past(cache))
    assert weights_of(net) is before
    net.model.rotary_emb.original_inv_freq.mul_(1.01)
    assert weights_fingerprint(net) != fingerprint


def test_frequencies_that_another_machine_computes_a_little_differently_are_the_same() -> None:
    net = model("llama")
    fingerprint = weights_fingerprint(net)
    net.model.rotary_emb.inv_freq.mul_(1 + 1e-7)
    assert weights_fingerprint(net) == fingerprint
    net.half()
    halved = weights_fingerprint(net)
    net = model("llama").half()
    net.model.rotary_emb.inv_freq = torch.nn.Buffer(net.model.rotary_emb.inv_freq.float(), persistent=False)
    assert weights_fingerprint(net) != halved


def test_tables_of_positions_are_refused_once_they_change(path: Path) -> None:
    torch.manual_seed(0)
    config = tf.GPTJConfig(vocab_size=96, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64)
    net = tf.GPTJForCausalLM(config).eval().requires_grad_(False)
    with KvmmapCache.create(path, net) as cache:
        net(prompt(20), **past(cache))
        tables = [buffer for name, buffer in net.named_buffers() if name.endswith("embed_positions")]
        tables[-1].data[5] += 0.1  # one for each layer, or one for all
        with pytest.raises(kvmmap.ModelMismatchError, match="tables"):
            net(prompt(2), **past(cache))


def test_an_edit_of_any_byte_is_noticed_by_and_by() -> None:
    tensor = torch.zeros(3 * LEAST)  # 4 bytes each
    memory = TensorBytes([tensor, torch.zeros(5, dtype=torch.int8), torch.zeros(8, 8).T])
    looks = tensor.nbytes // LEAST + 1
    assert all(memory.unchanged() for _ in range(2 * looks))
    tensor.data[2 * LEAST + 12345] = 1.0
    assert not all(memory.unchanged() for _ in range(looks))
    tensor.data[2 * LEAST + 12345] = 0.0
    assert all(memory.unchanged() for _ in range(looks))
    tensor.data[0] = 1.0
    assert not memory.unchanged()


def test_what_changes_before_it_was_looked_at_is_noticed_once_all_was_read() -> None:
    tensor = torch.zeros(8 * LEAST)
    memory = TensorBytes([tensor])
    memory.read_all()
    tensor.data[-10] = 1.0
    assert not memory.unchanged(thorough=True) or not memory.unchanged(thorough=True)


def dropout(net: Any) -> None:
    net.train()
    for layer in net.model.layers:
        layer.self_attn.attention_dropout = 0.1


def module(net: Any) -> None:
    net.model.layers[1].mlp.act_fn = torch.nn.Sequential(net.model.layers[1].mlp.act_fn, torch.nn.Dropout(0.2))
    net.model.layers[1].mlp.train()


@pytest.mark.parametrize("activate", [dropout, module])
def test_dropout_is_refused_by_name(activate: Any) -> None:
    net = model("llama", "sdpa")
    activate(net)
    cache = KvmmapCache(net)
    with pytest.raises(kvmmap.UnsupportedModelError, match=r"dropout=0.1|\(p=0.2\)"):
        net(prompt(5), **past(cache))
    assert cache.seq_len == 0
    net.eval()
    net(prompt(5), **past(cache))
    assert cache.seq_len == 5


def test_training_mode_without_dropout_is_no_harm() -> None:
    net = model("llama", "kvmmap").train()
    cache = KvmmapCache(net)
    net(prompt(5), **past(cache))
    assert cache.token_ids.tolist() == prompt(5)[0].tolist()


@pytest.mark.parametrize("first", [True, False])
def test_autocast_is_refused_for_keys_made_without_and_the_other_way_round(path: Path, first: bool) -> None:
    net = model("llama")
    with KvmmapCache.create(path, net) as cache, torch.autocast("cpu", torch.bfloat16, enabled=first):
        net(prompt(5), **past(cache))
    with KvmmapCache.open(path, net, "a") as cache:
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=not first),
            pytest.raises(kvmmap.ModelMismatchError, match="autocast"),
        ):
            net(prompt(2), **past(cache))
        assert cache.seq_len == 5
        with torch.autocast("cpu", torch.bfloat16, enabled=first):
            net(prompt(2), **past(cache))
        assert cache.seq_len == 7


def test_a_look_at_unchanged_weights_keeps_the_digest() -> None:
    net = model("llama")
    first = weights_of(net)
    weights_fingerprint(net)
    assert weights_of(net) is first
    net(prompt(3))
    assert weights_of(net) is first


def quantised(seed: int = 0) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(model("llama", seed=seed), {torch.nn.Linear}, dtype=torch.qint8)
    net.set_attn_implementation("kvmmap")
    return net


def test_packed_weights_count(path: Path) -> None:
    if not torch.backends.quantized.supported_engines:
        pytest.skip("no engine for quantised models")
    nets = [quantised(), quantised(), quantised(seed=1)]
    first, same, other = map(weights_fingerprint, nets)
    assert first == same != other
    with KvmmapCache.create(path, nets[0]) as cache:
        nets[0](prompt(10), **past(cache))
    KvmmapCache.open(path, nets[1]).close()
    with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
        KvmmapCache.open(path, nets[2])
    net = quantised()  # only linear layers inside differ, which have no tensors in the state dict
    net.model.layers[1].self_attn.k_proj = quantised(seed=1).model.layers[1].self_attn.k_proj
    with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
        KvmmapCache.open(path, net)


# Adapters


def adapted(seed: int = 3, **more: Any) -> Any:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False, **more)
    base = model("llama", "kvmmap")
    torch.manual_seed(seed)
    return peft.get_peft_model(base, settings).eval().requires_grad_(False)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@torch.no_grad()
def test_adapters_count(path: Path) -> None:
    net, ids = adapted(), prompt(20)
    with KvmmapCache.create(path, net) as cache:
        net(input_ids=ids, **past(cache))
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"), net.disable_adapter():
            net(input_ids=prompt(2), **past(cache))
        assert cache.seq_len == 20
        net(input_ids=prompt(2), **past(cache))
        net.base_model.model.model.layers[0].self_attn.k_proj.scaling["default"] *= 2
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
            net(input_ids=prompt(2), **past(cache))
        net.base_model.model.model.layers[0].self_attn.k_proj.scaling["default"] /= 2
        net.merge_adapter()
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
            net(input_ids=prompt(2), **past(cache))
        assert cache.seq_len == 22
    KvmmapCache.open(path, adapted()).close()
    for other in (adapted(seed=4), adapted(lora_alpha=16), model("llama")):
        with pytest.raises(kvmmap.ModelMismatchError, match="weights"):
            KvmmapCache.open(path, other)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@torch.no_grad()
def test_a_disabled_adapter_leaves_the_base_model() -> None:
    net, base = adapted(), model("llama", "kvmmap")
    cache = KvmmapCache(base)
    generate(base, prompt(20), cache, 1)
    assert weights_fingerprint(net) != weights_fingerprint(base)
    with net.disable_adapter():
        assert weights_fingerprint(net) == weights_fingerprint(base)


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@torch.no_grad()
def test_adapters_that_transformers_itself_adds_count_while_they_are_active() -> None:
    import peft

    base, inside = model("llama", "kvmmap"), model("llama", "kvmmap")
    torch.manual_seed(3)
    try:
        inside.add_adapter(peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False))
    except (ImportError, ValueError) as error:  # a release of transformers may want a newer peft than there is
        pytest.skip(f"transformers refuses this peft: {error}")
    inside.eval()
    enabled = weights_fingerprint(inside)
    inside.disable_adapters()
    assert weights_fingerprint(inside) == weights_fingerprint(base) != enabled
    inside.enable_adapters()
    assert weights_fingerprint(inside) == enabled
    torch.manual_seed(4)
    inside.add_adapter(peft.LoraConfig(target_modules=["k_proj"], init_lora_weights=False), "second")
    inside.set_adapter("second")
    assert weights_fingerprint(inside) not in (enabled, weights_fingerprint(base))
    inside.set_adapter("default")
    assert weights_fingerprint(inside) == enabled
