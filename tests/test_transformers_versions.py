"""The cache argument by every name, on every release of transformers; and which releases are supported."""

from __future__ import annotations

import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers.tiny_models import generate, model, prompt

import kvmmap
from kvmmap.integrations.transformers import CACHE_ARGUMENT, KvmmapCache, reuse, versions

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
OTHER = {"cache": "past_key_values", "past_key_values": "cache"}[CACHE_ARGUMENT]


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
@pytest.mark.parametrize("way", ["cache", "past_key_values", "by position"])
def test_the_cache_is_found_under_every_name(way: str, attention: str) -> None:
    net, ids = model("llama", attention), prompt(20)
    cache = KvmmapCache(net)
    for start, stop in ((0, 12), (12, 20)):
        fed = ids[:, start:stop]
        out = net(fed, None, None, cache) if way == "by position" else net(input_ids=fed, **{way: cache})
    through = KvmmapCache(net)
    expected = net(ids, **through.argument).logits[:, 12:]
    torch.testing.assert_close(out.logits, expected, rtol=0, atol=0.01)
    assert cache.token_ids.tolist() == ids[0].tolist()
    assert cache.seq_len == 20


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_generate_uses_the_cache_or_refuses_it(path: Path, name: str) -> None:
    net, ids = model("llama", "kvmmap"), prompt(20)
    longer = torch.cat([ids, prompt(5, seed=1)], 1)
    expected, _ = generate(net, longer, KvmmapCache(net), 4)
    with warnings.catch_warnings(), KvmmapCache.create(path, net) as cache:
        warnings.simplefilter("ignore", FutureWarning)  # the older name, on newer releases
        settings: dict[str, Any] = {"max_new_tokens": 1, "do_sample": False}
        if name == "cache" and name != CACHE_ARGUMENT:
            with pytest.raises((kvmmap.UnsupportedModelError, ValueError), match="cache"):
                net.generate(ids, attention_mask=torch.ones_like(ids), **{name: cache}, **settings)
            assert cache.seq_len == 0
            return
        net.generate(ids, attention_mask=torch.ones_like(ids), **{name: cache}, **settings)
        assert cache.token_ids.tolist() == ids[0].tolist()
    with KvmmapCache.open(path, net, "a") as cache:
        assert (reuse(cache, longer), cache.seq_len) == (20, 20)
        assert generate(net, longer, cache, 4)[0].tolist() == expected.tolist()


def test_a_name_that_a_model_would_ignore_is_refused() -> None:
    net = model("llama", "kvmmap")
    cache = KvmmapCache(net)
    for given in ({"kv_cache": cache}, {OTHER: cache, CACHE_ARGUMENT: transformers.DynamicCache()}):
        with pytest.raises(kvmmap.UnsupportedModelError, match=f"give it as {CACHE_ARGUMENT}="):
            net(prompt(4), **given)
    assert cache.seq_len == 0


def test_the_argument_is_the_one_of_the_installed_release() -> None:
    cache = KvmmapCache(model("llama"))
    assert cache.argument == {CACHE_ARGUMENT: cache}


def test_the_tested_range_is_the_range_that_is_installed() -> None:
    settings = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    needed = settings["project"]["optional-dependencies"]["transformers"]
    (oldest, newest) = versions.OLDEST, versions.NEWEST
    assert f"transformers>={oldest[0]}.{oldest[1]},<{newest[0]}.{newest[1] + 1}" in needed


def test_a_release_outside_of_the_range_is_warned_of_by_name() -> None:
    for untested in ("5.19.4", "5.25.0", "6.0.0.dev0", "4.57.1"):
        with pytest.warns(RuntimeWarning, match=untested):
            versions.check_version(untested)
    for tested in ("5.20.0", "5.20.2", "5.23.0", "5.24.0", "5.24.7.dev0"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            versions.check_version(tested)
