"""Rows in 16 bits with transformers: in place and not, closed and reopened, saved, copied, and read beside."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import tiny_models
from helpers.recent_oracle import halves

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache

WINDOW, SINKS = 8, 2
RECENT: dict[str, Any] = {"preset": "int8", "recent_window": WINDOW, "sinks": SINKS}


@pytest.fixture(params=["kvmmap", "sdpa"])
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_models.model("llama", request.param)


def feed(model: Any, cache: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(ids, **cache.argument).logits
    return logits


IDS = torch.arange(3, 43)[None] % 50


def test_a_pass_sees_what_its_queries_see_one_by_one(model: Any) -> None:
    """Nearly: the rows of neighbours are exact either way, and the codec's loss of those further away is the same."""
    whole, steps = KvmmapCache(model, 64, **RECENT), KvmmapCache(model, 64, **RECENT)
    plain = KvmmapCache(model, 64, preset="int8")
    at_once = feed(model, whole, IDS)
    one_by_one = torch.cat([feed(model, steps, IDS[:, i : i + 1]) for i in range(IDS.shape[1])], dim=1)
    exact = model(IDS).logits
    loss = (feed(model, plain, IDS) - exact).abs().mean()
    assert (at_once - exact).abs().mean() < 0.7 * loss
    assert (one_by_one - exact).abs().mean() < 0.7 * loss
    if model.config._attn_implementation == "kvmmap":
        assert (at_once - one_by_one).abs().mean() < 1e-5


def test_what_was_closed_continues_bit_by_bit(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "closed.kvm"
    unbroken = KvmmapCache(model, 64, **RECENT)
    expected = [feed(model, unbroken, IDS[:, start : start + 5]) for start in range(0, 40, 5)]
    for number, start in enumerate(range(0, 40, 5)):
        with (
            KvmmapCache.open(path, model, mode="a")
            if number
            else KvmmapCache.create(path, model, capacity=64, **RECENT) as cache
        ):
            torch.testing.assert_close(feed(model, cache, IDS[:, start : start + 5]), expected[number], rtol=0, atol=0)
    with kvmmap.open(path) as stored:
        assert (stored.geometry.recent_window, stored.geometry.sinks) == (WINDOW, SINKS)
        assert stored.verify().sound


def test_a_file_that_is_only_read_and_what_comes_after_it(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "read.kvm"
    unbroken = KvmmapCache(model, 64, **RECENT)
    expected = [
        feed(model, unbroken, IDS[:, :20]),
        feed(model, unbroken, IDS[:, 20:21]),
        feed(model, unbroken, IDS[:, 21:]),
    ]
    with KvmmapCache.create(path, model, capacity=64, **RECENT) as cache:
        feed(model, cache, IDS[:, :20])
    # Not in place, all queries of a pass see the same tensors, and so some rows in 16 bits that are not theirs.
    close = 5e-3 if model.config._attn_implementation == "kvmmap" else 0.05
    with KvmmapCache.open(path, model) as cache:
        torch.testing.assert_close(feed(model, cache, IDS[:, 20:21]), expected[1], rtol=0, atol=close)
        torch.testing.assert_close(feed(model, cache, IDS[:, 21:]), expected[2], rtol=0, atol=close)
        cache.save(tmp_path / "saved.kvm")
        newest = [layer.own.read_keys()[-7:] for layer in cache._layers]
    with kvmmap.open(tmp_path / "saved.kvm") as saved:
        for layer, expected_keys in zip(saved.layers, newest, strict=True):
            kept = layer.recent_rows()
            assert kept is not None
            assert kept.num_held(40) == WINDOW + SINKS
            np.testing.assert_array_equal(layer.read_keys(33), expected_keys)


def test_copies_in_memory_have_them(model: Any) -> None:
    cache = KvmmapCache(model, 64, **RECENT)
    feed(model, cache, IDS[:, :20])
    for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        for mine, copied in zip(cache._own.layers, other._own.layers, strict=True):
            np.testing.assert_array_equal(copied.read_keys(), mine.read_keys())
            assert (copied.read_keys()[-1] == halves(mine.read_keys()[-1])).all()


def test_cropping_keeps_the_rest(model: Any) -> None:
    cache, straight = KvmmapCache(model, 64, **RECENT), KvmmapCache(model, 64, **RECENT)
    feed(model, cache, IDS[:, :20])
    feed(model, cache, IDS[:, :3])
    cache.crop(-3)
    feed(model, straight, IDS[:, :20])
    torch.testing.assert_close(
        feed(model, cache, IDS[:, 20:22]), feed(model, straight, IDS[:, 20:22]), rtol=0, atol=0.05
    )
