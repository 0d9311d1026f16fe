"""How a KvmmapCache stores rows: its default, presets and codecs; reopened caches lose no more than unbroken ones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import model, past, prompt
from torch.nn.functional import cross_entropy, kl_div

import kvmmap
from kvmmap.codecs.presets import PRESETS, preset_recent
from kvmmap.integrations.transformers import KvmmapCache

pytestmark = pytest.mark.torch
torch.set_num_threads(1)

WINDOW, SINKS = 16, 2
ATTENTION = ["sdpa", "kvmmap"]


def codecs_of(path: Path) -> set[tuple[str, str]]:
    with kvmmap.open(path) as cache:
        return {(layer.key_codec.name, layer.value_codec.name) for layer in cache.geometry.layers}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_and_codecs(path: Path, preset: str) -> None:
    net = model("llama")
    KvmmapCache.create(path, net, preset=preset).close()
    assert codecs_of(path) == {PRESETS[preset]}
    with kvmmap.open(path) as cache:
        assert (cache.geometry.recent_window, cache.geometry.sinks) == preset_recent(preset)
    names = ["int8", "bf16", "f16"]
    KvmmapCache.create(path, net, preset=preset, value_codec=names, recent_window=5, overwrite=True).close()
    with kvmmap.open(path) as cache:
        assert [layer.value_codec.name for layer in cache.geometry.layers] == names
        assert {layer.key_codec.name for layer in cache.geometry.layers} == {PRESETS[preset][0]}
        assert (cache.geometry.recent_window, cache.geometry.sinks) == (5, preset_recent(preset)[1])
    mixed = ["f16", "f32", "f16"]
    KvmmapCache.create(path, net, preset=preset, key_codec="f32", value_codec=mixed, overwrite=True).close()
    with kvmmap.open(path) as cache:
        assert not cache.geometry.keeps_recent
    for wrong in ("huge", "", [preset]):
        with pytest.raises(kvmmap.DtypeError, match="no preset"):
            KvmmapCache(net, preset=wrong)
    with pytest.raises(kvmmap.DtypeError, match="no codec 'int9'"):
        KvmmapCache(net, key_codec="int9")


def step_by_step(net: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """Logits of every token, fed one by one."""
    with torch.inference_mode():
        found = [net(ids[:, at : at + 1], **past(cache)).logits[0, -1] for at in range(ids.shape[1])]
    return torch.stack(found).double()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("preset", ["int8", "fidelity", "small"])
def test_a_reopened_cache_goes_on_as_an_unbroken_one(path: Path, preset: str, attention: str) -> None:
    """Bit by bit where the file is appended to; within rounding where what is new is kept in memory."""
    net = model("llama", attention)
    window = {"recent_window": WINDOW, "sinks": SINKS} if preset_recent(preset)[0] else {}
    first, rest = prompt(50), prompt(40, seed=1)
    unbroken = KvmmapCache(net, preset=preset, **window)
    net(first, **past(unbroken))
    with KvmmapCache.create(path, net, preset=preset, **window) as cache:
        net(first, **past(cache))
    with KvmmapCache.open(path, net, "r") as cache:
        beside = step_by_step(net, rest, cache)
    expected = step_by_step(net, rest, unbroken)
    with KvmmapCache.open(path, net, "a") as cache:
        halves = [step_by_step(net, rest[:, :20], cache)]
    with KvmmapCache.open(path, net, "a") as cache:
        halves.append(step_by_step(net, rest[:, 20:], cache))
    found = torch.cat(halves)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    torch.testing.assert_close(beside, expected, rtol=0, atol=1e-6 if attention == "sdpa" else 3e-4)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_perplexity_and_divergence_of_a_reopened_cache(path: Path, mode: Any, attention: str) -> None:
    """Against a cache of f32: those of one that was never closed."""
    net = model("qwen3", attention)
    first, rest = prompt(60), prompt(50, seed=2)
    settings: dict[str, Any] = {"preset": "tiny", "recent_window": WINDOW, "sinks": SINKS}
    net.set_attn_implementation("sdpa")
    with torch.inference_mode():
        exact = net(torch.cat([first, rest], 1)).logits[0, 60:].double().log_softmax(-1)
    net.set_attn_implementation(attention)
    unbroken = KvmmapCache(net, **settings)
    net(first, **past(unbroken))
    with KvmmapCache.create(path, net, **settings) as cache:
        net(first, **past(cache))
    losses = []
    with KvmmapCache.open(path, net, mode) as cache:
        for one in (unbroken, cache):
            found = step_by_step(net, rest, one).log_softmax(-1)
            divergence = float(kl_div(found, exact, log_target=True, reduction="none").sum(-1).mean())
            losses.append((divergence, math.exp(float(cross_entropy(found[:-1], rest[0, 1:])))))
    (divergence, perplexity), (reopened, after) = losses
    assert divergence > 0
    assert reopened == pytest.approx(divergence, rel=1e-3)
    assert after == pytest.approx(perplexity, rel=1e-6)


def test_the_window_loses_less(path: Path) -> None:
    """What a window is for: with it, rows of 4 bits are closer to f32."""
    net = model("llama", "kvmmap")
    ids = prompt(80)
    net.set_attn_implementation("sdpa")
    with torch.inference_mode():
        exact = net(ids).logits[0].double().log_softmax(-1)
    net.set_attn_implementation("kvmmap")

    def loss(window: int) -> float:
        found = step_by_step(net, ids, KvmmapCache(net, preset="tiny", recent_window=window, sinks=0))
        return float(kl_div(found.log_softmax(-1), exact, log_target=True, reduction="none").sum(-1).mean())

    assert loss(128) < 0.01 * loss(0)
    assert loss(40) < 0.9 * loss(0)


def test_the_default_is_fidelity_where_rows_can_be_rotated(path: Path) -> None:
    """Rotated int8 with the recent window; plain int8 for latents, and keys or values of an odd number a row."""
    KvmmapCache.create(path, model("llama")).close()
    assert codecs_of(path) == {("int8-rotated", "int8-rotated")}
    with kvmmap.open(path) as cache:
        assert (cache.geometry.recent_window, cache.geometry.sinks) == preset_recent("fidelity")
    KvmmapCache.create(path, model("deepseek_v3"), overwrite=True).close()
    assert codecs_of(path) == {("int8", "int8")}
    KvmmapCache.create(path, model("qwen3", head_dim=10), overwrite=True).close()
    assert codecs_of(path) == {("int8-rotated", "int8-rotated")}
    KvmmapCache.create(path, model("gpt2", hidden_size=36, num_attention_heads=4), overwrite=True).close()
    assert codecs_of(path) == {("int8", "int8")}
    KvmmapCache.create(
        path, model("gpt2", hidden_size=36), preset="compact", value_codec="int8", overwrite=True
    ).close()
    assert codecs_of(path) == {("int8", "int8")}
    with pytest.raises(kvmmap.ShapeMismatchError, match="int4-rotated"):
        KvmmapCache(model("gpt2", hidden_size=36), preset="compact")


@pytest.mark.parametrize("attention", ATTENTION)
def test_perplexity_and_divergence_of_a_reopened_default_cache(path: Path, attention: str) -> None:
    """The preset as it is, over more positions than its window has: those of one that was never closed."""
    net = model("qwen3", attention)
    first, rest = prompt(180), prompt(40, seed=2)
    net.set_attn_implementation("sdpa")
    with torch.inference_mode():
        exact = net(torch.cat([first, rest], 1)).logits[0, 180:].double().log_softmax(-1)
    net.set_attn_implementation(attention)
    unbroken = KvmmapCache(net)
    net(first, **past(unbroken))
    with KvmmapCache.create(path, net) as cache:
        net(first, **past(cache))
    expected = step_by_step(net, rest, unbroken).log_softmax(-1)
    with KvmmapCache.open(path, net, "a") as cache:
        halves = [step_by_step(net, rest[:, :20], cache)]
    with KvmmapCache.open(path, net, "a") as cache:
        found = torch.cat([*halves, step_by_step(net, rest[:, 20:], cache)]).log_softmax(-1)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert float(kl_div(found, exact, log_target=True, reduction="none").sum(-1).mean()) > 0
