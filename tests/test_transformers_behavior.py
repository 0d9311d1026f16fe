"""Whose cache it is, beside weights: numbers that modules hold, and their parts without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import generate, model, past, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.behavior import changed_settings
from kvmmap.integrations.transformers.weights import body_of, weights_of

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def epsilon(net: Any) -> None:
    net.model.layers[1].input_layernorm.variance_epsilon = 0.5


def scale(net: Any) -> None:
    net.model.layers[0].self_attn.scaling *= 2


def epsilon_of_gemma(net: Any) -> None:
    net.model.layers[1].input_layernorm.eps = 0.5


def window(net: Any) -> None:
    net.model.layers[0].self_attn.sliding_window = 4


def embedding_scale(net: Any) -> None:
    net.model.embed_tokens.scalar_embed_scale = 3.0


def activation(net: Any) -> None:
    net.model.layers[0].mlp.act_fn = torch.nn.Tanh()


CHANGES = {
    "llama": [epsilon, scale, activation],
    "gemma3": [window, embedding_scale, epsilon_of_gemma],
}


@pytest.mark.parametrize(("kind", "change"), [(kind, change) for kind, found in CHANGES.items() for change in found])
def test_what_changes_a_pass_is_refused(tmp_path: Path, kind: str, change: Any) -> None:
    path = tmp_path / "a.kvm"
    net = model(kind, "kvmmap")
    with KvmmapCache.create(path, net) as cache:
        net(prompt(20), **past(cache))
        change(net)
        with pytest.raises(kvmmap.ModelMismatchError, match="module_settings was"):
            net(prompt(2), **past(cache))
        assert cache.seq_len == 20
    with pytest.raises(kvmmap.ModelMismatchError, match="module_settings was"):
        KvmmapCache.open(path, net)
    with KvmmapCache.open(path, model(kind, "kvmmap")) as cache:
        assert cache.seq_len == 20
    other = tmp_path / "b.kvm"
    with KvmmapCache.create(other, net) as cache:
        assert weights_of(net).settings
    with KvmmapCache.open(other, net):
        pass
    with pytest.raises(kvmmap.ModelMismatchError, match="module_settings was"):
        KvmmapCache.open(other, model(kind, "kvmmap"))


def test_hooks_that_observe_are_no_change(tmp_path: Path) -> None:
    net, seen = model("llama", "kvmmap"), []
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        net(prompt(20), **past(cache))
    net.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        net(prompt(2), **past(cache))
    assert seen


def test_changes_that_keys_and_values_do_not_depend_on_are_none() -> None:
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    net(prompt(20), **past(cache))
    known = weights_of(net)
    net.model.gradient_checkpointing = True
    net.model.layers[0].self_attn.attention_dropout = 0.5
    net.model.layers[0].self_attn.forward = torch.compile(net.model.layers[0].self_attn.forward, backend="eager")
    net(prompt(2), output_hidden_states=True, **past(cache))
    assert weights_of(net) is known
    assert reuse(cache, torch.cat([prompt(20), prompt(2)], 1)) == 21


def test_a_model_that_was_resized_is_the_one_that_is_loaded_so(tmp_path: Path) -> None:
    net = model("llama", "kvmmap")
    net.resize_token_embeddings(104)
    net.config.pad_token_id = 3
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        net(prompt(20), **past(cache))
    assert not changed_settings(body_of(net))
    net.save_pretrained(tmp_path / "model")
    loaded = type(net).from_pretrained(tmp_path / "model", attn_implementation="kvmmap").eval().requires_grad_(False)
    with KvmmapCache.open(tmp_path / "a.kvm", loaded) as cache:
        assert cache.seq_len == 20


def test_a_setting_that_is_put_back_is_no_change() -> None:
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    net(prompt(20), **past(cache))
    norm = net.model.layers[0].input_layernorm
    before = norm.variance_epsilon
    norm.variance_epsilon = 0.5
    with pytest.raises(kvmmap.ModelMismatchError):
        net(prompt(2), **past(cache))
    norm.variance_epsilon = before + 0.0
    net(prompt(2), **past(cache))
    assert cache.seq_len == 22


def test_a_config_that_was_edited_after_the_model_was_made_does_not_hide_what_it_says_no_longer(tmp_path: Path) -> None:
    net = model("llama", "kvmmap")
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        net(prompt(20), **past(cache))
    net.config.rms_norm_eps = 0.5
    with pytest.raises(kvmmap.ModelMismatchError, match="rms_norm_eps"):
        KvmmapCache.open(tmp_path / "a.kvm", net)
    for module in net.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.5
    assert not changed_settings(body_of(net))
    with pytest.raises(kvmmap.ModelMismatchError, match="rms_norm_eps"):
        KvmmapCache.open(tmp_path / "a.kvm", net)


def test_a_model_that_cannot_be_made_of_its_config_is_compared_within_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    net = model("llama", "kvmmap")
    monkeypatch.setattr(type(net.model), "__init__", lambda *_: 1 / 0)
    cache = KvmmapCache(net)
    generate(net, prompt(20), cache, 1)
    assert not changed_settings(net.model)
    epsilon(net)
    with pytest.raises(kvmmap.ModelMismatchError, match="tables"):
        net(prompt(2), **past(cache))


def test_looking_leaves_the_random_numbers_as_they_were() -> None:
    net = model("llama")
    before = torch.random.get_rng_state()
    changed_settings(body_of(net))
    assert torch.equal(torch.random.get_rng_state(), before)
