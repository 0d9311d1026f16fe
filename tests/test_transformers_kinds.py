"""Kinds of layers besides those with keys and values of their own and a window: chunks, shared layers, index keys."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import config, model
from helpers.tiny_models import RoundedCache, generate, past, prompt
from transformers import CONFIG_MAPPING

import kvmmap
from kvmmap.errors import KvmmapError
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.arguments import is_plain
from kvmmap.integrations.transformers.attention import kvmmap_attention
from kvmmap.integrations.transformers.indexed import IndexOnlyLayer
from kvmmap.integrations.transformers.models import layer_kinds
from kvmmap.integrations.transformers.shared import SharedLayer

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)

CHUNKED, SHARED, INDEXED = "llama4_text", "gemma4_text", "glm_moe_dsa"


def built(kind: str, attention: str = "kvmmap") -> Any:
    net = model(config(kind), kind)
    net.set_attn_implementation(attention)
    return net


def ids(length: int) -> torch.Tensor:
    return prompt(length) % 79 + 1  # text for `families`, too


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((found - expected).abs().max()) < 0.02 * float(expected.std())


@pytest.mark.parametrize("split", [1, 5, 11, 12, 13, 24, 30, 36, 47])
@pytest.mark.parametrize("saved", [False, True])
def test_chunks_in_place_wherever_the_passes_and_the_file_end(tmp_path: Path, split: int, saved: bool) -> None:
    net, tokens = built(CHUNKED), ids(48)
    assert [kind.chunk for kind in layer_kinds(net.config)] == [12, None, 12]
    expected = net(tokens, **past(RoundedCache(config=net.config))).logits
    path = tmp_path / "a.kvm"
    with KvmmapCache.create(path, net) as cache:
        first = net(tokens[:, :split], **past(cache)).logits
        if not saved:
            second = net(tokens[:, split:], **past(cache)).logits
    if saved:
        with KvmmapCache.open(path, net) as cache:
            second = net(tokens[:, split:], **past(cache)).logits
            assert cache.token_ids.tolist() == tokens[0].tolist()
    close(torch.cat([first, second], 1), expected)


def test_a_mask_of_chunks_is_plain() -> None:
    positions, keys = torch.arange(5, 9)[:, None], torch.arange(9)
    mask = ((keys <= positions) & (keys // 4 == positions // 4))[None, None]
    assert is_plain(mask, 5, 4, None, 4)
    assert not is_plain(mask, 5, 4, None)
    assert not is_plain(mask, 5, 4, None, 3)
    assert is_plain(mask[:, 0], 5, 4, None, 4)
    assert is_plain(mask[:, :, -1:], 8, 1, None, 4)


def test_shared_layers_take_no_place_in_the_file(tmp_path: Path) -> None:
    net, path = built(SHARED), tmp_path / "a.kvm"
    with KvmmapCache.create(path, net) as cache:
        tokens, logits = generate(net, ids(30), cache, 4)
        assert cache.is_sliding == [True, False, True, False]
        assert [isinstance(layer, SharedLayer) for layer in cache.layers] == [False, False, True, True]
        with pytest.raises(KvmmapError, match="of another one"):
            cache.update(torch.zeros(1, 2, 1, 8), torch.zeros(1, 2, 1, 8), 3)
        cache.layers[3].crop(-1)
    with kvmmap.open(path) as stored:
        assert stored.num_layers == 2
    expected = generate(net, ids(30), RoundedCache(config=net.config), 4)
    close(logits, expected[1])
    for given in (net, net.config, None):
        with KvmmapCache.open(path, given) as cache:
            assert [layer.kind.geometry is None for layer in cache.layers] == [False, False, True, True]
            assert cache.seq_len == 33
    with KvmmapCache.open(path, net) as cache, cache.fork(tmp_path / "b.kvm", 20) as fork:
        assert reuse(fork, tokens) == 20
        close(net(tokens[:, 20:], **past(fork)).logits[0, -1:], net(tokens[:, 33:], **past(cache)).logits[0])


def test_index_keys_are_rows_of_their_own_in_16_bits(tmp_path: Path) -> None:
    net, path = built(INDEXED, "sdpa"), tmp_path / "a.kvm"
    tokens = ids(30)
    other = RoundedCache(config=net.config)
    expected = net(tokens, **past(other)).logits
    with KvmmapCache.create(path, net) as cache:
        close(net(tokens, **past(cache)).logits, expected)
        assert torch.equal(cache.layers[0].indexer_keys, other.layers[0].indexer_keys)
        assert [hasattr(layer, "update_indexer") for layer in cache.layers] == [True, False, True]
    with kvmmap.open(path) as stored:
        assert [layer.geometry.key_codec.name for layer in stored.layers] == ["int8"] * 3 + ["bf16"] * 2
        assert (stored.layers[4].head_dim, stored.layers[4].value_head_dim) == (4, 4)
    with KvmmapCache.open(path, mode="a") as cache:
        assert [layer.kind.index is not None for layer in cache.layers] == [True, False, True]
        cache.crop(-10)
        assert cache.layers[2].indexer_keys.shape == (1, 20, 8)
    memory = KvmmapCache(net)
    net(tokens[:, :20], **past(memory))
    close(net(tokens[:, 20:], **past(copy.deepcopy(memory))).logits, expected[:, 20:])


@pytest.mark.skipif("mistral_large4" not in CONFIG_MAPPING, reason="this release of transformers does not have it")
def test_index_keys_without_keys_and_values() -> None:
    net = built("mistral_large4", "sdpa")
    cache = KvmmapCache(net)
    net(ids(10), **past(cache))
    assert [type(layer) is IndexOnlyLayer for layer in cache.layers] == [False, False, True, False]
    assert cache.layers[2].indexer_keys.shape == (1, 10, 8)
    assert cache.layers[1].values.shape == (1, 1, 10, 0)  # no part of its latents is rotated
    with pytest.raises(KvmmapError, match="index keys alone"):
        cache.layers[2].update(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 1, 8))


@pytest.mark.parametrize("kind", [SHARED, INDEXED])
def test_a_pass_that_fails_behind_the_last_rows_is_rolled_back(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    net, tokens = built(kind, "sdpa"), ids(12)
    cache = KvmmapCache(net)
    net(tokens[:, :8], **past(cache))
    with monkeypatch.context() as patched:
        patched.setattr(net.lm_head, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            net(tokens[:, 8:], **past(cache))
    assert cache.seq_len == 8
    assert cache.token_ids.tolist() == tokens[0, :8].tolist()
    logits = net(tokens[:, 8:], **past(cache)).logits
    close(logits, net(tokens, **past(RoundedCache(config=net.config))).logits[:, 8:])


def test_a_selection_of_keys_is_refused_in_place() -> None:
    net = built("llama")
    cache = KvmmapCache(net)
    net(ids(4), **past(cache))
    chosen, net.indexer = torch.zeros(1, 1, 1, dtype=torch.int32), None
    with pytest.raises(kvmmap.UnsupportedModelError, match="a selection of keys"):
        kvmmap_attention(net, torch.zeros(1, 4, 1, 8), cache.layers[0], cache.layers[0], None, indices=chosen)
