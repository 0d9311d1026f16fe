"""Batches of caches: prompts of lengths of their own, stored prefixes, and sequences that share a beginning."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.failing import failing
from helpers.tiny_models import CONFIGS, RoundedCache, model, past, prompt
from transformers import DynamicCache

import kvmmap
from kvmmap.integrations.transformers import KvmmapBatch, KvmmapCache

pytestmark = pytest.mark.torch
torch.set_num_threads(1)

LENGTHS = (30, 17, 25)


def prompts() -> list[torch.Tensor]:
    return [prompt(length, seed=number) for number, length in enumerate(LENGTHS)]


def padded(found: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts padded on the left, and their attention mask."""
    width = max(ids.shape[1] for ids in found)
    ids = torch.zeros(len(found), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, one in enumerate(found):
        ids[number, width - one.shape[1] :] = one
        mask[number, width - one.shape[1] :] = 1
    return ids, mask


def generate(net: Any, ids: torch.Tensor, mask: torch.Tensor, cache: Any, **more: Any) -> Any:
    settings = {"max_new_tokens": 10, "do_sample": False, "return_dict_in_generate": True, "output_logits": True} | more
    return net.generate(ids, attention_mask=mask, **past(cache), **settings)


def check_each(net: Any, found: Any, width: int, alone: Sequence[torch.Tensor], kind: Any = RoundedCache) -> None:
    """Each sequence must have the tokens and logits that it has alone, over the same rows."""
    for number, ids in enumerate(alone):
        right = generate(net, ids, torch.ones_like(ids), kind(config=net.config))
        assert found.sequences[number, width:].tolist() == right.sequences[0, ids.shape[1] :].tolist()
        for mine, other in zip(found.logits, right.logits, strict=True):
            assert (mine[number] - other[0]).abs().max() < 0.02 * other.std()


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
@pytest.mark.parametrize("family", list(CONFIGS))
def test_each_sequence_is_what_it_is_alone(family: str, attention: str) -> None:
    if family in ("gpt_oss", "gemma2") and attention == "sdpa":  # which knows neither sinks nor soft caps
        attention = "eager"
    net, (ids, mask) = model(family, attention=attention), padded(prompts())
    with KvmmapBatch([KvmmapCache(net) for _ in LENGTHS]) as batch:
        check_each(net, generate(net, ids, mask, batch), ids.shape[1], prompts())
        assert [cache.seq_len for cache in batch.caches] == [length + 9 for length in LENGTHS]
        # Another prompt for one, more for another, the same again for the third.
        later = [torch.cat([prompts()[0][:, :20], prompt(9, seed=5)], 1), torch.cat([prompts()[1], prompt(6)], 1)]
        later.append(prompts()[2])
        ids, mask = padded(later)
        assert batch.reuse(ids, mask) == [20, 17, 24]
        check_each(net, generate(net, ids, mask, batch), ids.shape[1], later)
        for cache, tokens in zip(batch.caches, later, strict=True):
            assert cache.token_ids[: tokens.shape[1]].tolist() == tokens[0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
def test_files_of_a_batch_are_those_of_single_sequences(tmp_path: Path, attention: str) -> None:
    net, (ids, mask) = model("llama", attention=attention), padded(prompts())
    paths = [tmp_path / f"{number}.kvm" for number in range(3)]
    with KvmmapBatch([KvmmapCache.create(path, net) for path in paths]) as batch:
        net(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(0), **past(batch))
        batch.flush()
    for path, tokens in zip(paths, prompts(), strict=True):
        with KvmmapCache(net) as alone, kvmmap.open(path) as stored:
            net(tokens, **past(alone))
            assert stored.token_ids.tolist() == tokens[0].tolist()
            for layer, right in zip(stored.layers, alone.layers, strict=True):
                expected = right.read(torch.float32)[0][0].transpose(0, 1).numpy()
                assert abs(layer.read_keys() - expected).max() < 0.05
    # Each in a process of its own, or all of them in a batch again.
    with KvmmapBatch([KvmmapCache.open(path, net) for path in paths]) as batch:
        longer = [torch.cat([tokens, prompt(4, seed=9)], 1) for tokens in prompts()]
        ids, mask = padded(longer)
        assert batch.reuse(ids, mask) == [*LENGTHS]
        check_each(net, generate(net, ids, mask, batch), ids.shape[1], longer)


def test_chunked_prefill() -> None:
    net, (ids, mask) = model("llama", attention="kvmmap"), padded(prompts())
    with KvmmapBatch([KvmmapCache(net) for _ in LENGTHS]) as batch:
        check_each(net, generate(net, ids, mask, batch, prefill_chunk_size=7), ids.shape[1], prompts())


@pytest.mark.parametrize("resident", ["host", "device"])
def test_a_pass_that_fails_is_rolled_back_in_every_sequence(resident: Any) -> None:
    net, (ids, mask) = model("llama"), padded(prompts())
    caches = [KvmmapCache(net, capacity=capacity, resident=resident) for capacity in (256, 256, 20)]
    with KvmmapBatch(caches) as batch:
        with pytest.raises(kvmmap.CapacityExceededError):
            generate(net, ids, mask, batch)
        assert [cache.seq_len for cache in caches] == [0, 0, 0]
        shorter = [tokens[:, :length] for tokens, length in zip(prompts(), (8, 5, 7), strict=True)]
        ids, mask = padded(shorter)
        with failing(net.model.layers[2], ZeroDivisionError()), pytest.raises(ZeroDivisionError):
            generate(net, ids, mask, batch)
        assert [cache.seq_len for cache in caches] == [0, 0, 0]
        kind = RoundedCache if resident == "host" else DynamicCache
        check_each(net, generate(net, ids, mask, batch), ids.shape[1], shorter, kind)


# Sequences that share a beginning


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
@pytest.mark.parametrize("where", ["file", "memory", "appending"])
def test_beam_search(path: Path, where: str, attention: str) -> None:
    net, ids = model("llama", attention=attention), prompt(30)
    settings = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 12, "output_scores": True}
    expected = net.generate(ids, **past(RoundedCache()), do_sample=False, return_dict_in_generate=True, **settings)
    beginning = KvmmapCache(net) if where == "memory" else KvmmapCache.create(path, net)
    net(ids, **past(beginning))
    if where == "file":
        beginning.close()
        beginning = KvmmapCache.open(path, net)
    with beginning, KvmmapBatch.branches(beginning, 4) as batch:
        assert batch.reuse(ids.repeat(4, 1)) == [29] * 4
        found = net.generate(ids, **past(batch), do_sample=False, return_dict_in_generate=True, **settings)
        assert found.sequences.tolist() == expected.sequences.tolist()
        assert torch.allclose(found.sequences_scores, expected.sequences_scores, atol=1e-3)
        assert beginning.seq_len == 30
        for cache in batch.caches:
            assert cache.token_ids[:29].tolist() == ids[0, :29].tolist()


def test_beams_that_swap_hold_what_was_swapped() -> None:
    net, ids = model("llama"), prompt(12)
    with KvmmapCache(net) as beginning:
        net(ids[:, :8], **past(beginning))
        with KvmmapBatch.branches(beginning, 4, room=20) as batch:
            for cache, token in zip(batch.caches, range(1, 5), strict=True):
                net(torch.tensor([[token, token]]), **past(cache))
            held = [cache.layers[0].read(torch.float32)[0] for cache in batch.caches]
            order = torch.tensor([1, 0, 3, 3])
            batch.reorder_cache(order)
            for cache, source in zip(batch.caches, order.tolist(), strict=True):
                assert torch.equal(cache.layers[0].read(torch.float32)[0], held[source])
                assert cache.token_ids[8:].tolist() == [source + 1] * 2
                assert cache.seq_len == 10


def test_several_answers_to_one_prompt(path: Path) -> None:
    net, ids = model("llama", attention="kvmmap"), prompt(30)
    with KvmmapCache.create(path, net) as cache:
        net(ids, **past(cache))
    with KvmmapCache.open(path, net) as cache, KvmmapBatch.branches(cache, 3) as batch:
        batch.reuse(ids.repeat(3, 1))
        torch.manual_seed(0)
        found = net.generate(ids, **past(batch), do_sample=True, num_return_sequences=3, max_new_tokens=6)
        for branch, tokens in zip(batch.caches, found, strict=True):
            assert branch.token_ids.tolist() == tokens[:-1].tolist()


# What is refused


def test_wrong_batches() -> None:
    net = model("llama")
    cache = KvmmapCache(net)
    for caches in ([], [cache, cache], [cache, KvmmapCache(model("llama", num_hidden_layers=2))]):
        with pytest.raises(kvmmap.KvmmapError, match="batch"):
            KvmmapBatch(caches)
    with pytest.raises(kvmmap.KvmmapError, match="at least one"):
        KvmmapBatch.branches(cache, 0)


def test_wrong_passes() -> None:
    net, (ids, mask) = model("llama"), padded(prompts())
    positions = (mask.cumsum(1) - 1).clamp(0)
    with KvmmapBatch([KvmmapCache(net) for _ in LENGTHS]) as batch, torch.no_grad():
        with pytest.raises(kvmmap.ShapeMismatchError, match="as many sequences"):
            net(ids[:2], **past(batch))
        with pytest.raises(kvmmap.UnsupportedModelError, match="position_ids"):
            net(ids, attention_mask=mask, **past(batch))
        with pytest.raises(kvmmap.UnsupportedModelError, match="left"):
            net(ids, attention_mask=mask.flip(1), position_ids=positions, **past(batch))
        with pytest.raises(kvmmap.ShapeMismatchError, match="attention mask"):
            net(ids, attention_mask=mask[:, 1:], position_ids=positions, **past(batch))
        with pytest.raises(kvmmap.UnsupportedModelError, match="zeros and ones"):
            net(ids, attention_mask=torch.zeros(3, 1, 30, 30), position_ids=positions, **past(batch))
        assert [cache.seq_len for cache in batch.caches] == [0, 0, 0]
        net(ids, attention_mask=mask, position_ids=positions, **past(batch))
        with pytest.raises(kvmmap.ShapeMismatchError, match="reuse"):  # the prompts again
            net(ids, attention_mask=torch.ones(3, 60), position_ids=positions, **past(batch))
        for refused in (
            lambda: batch.reorder_cache(torch.tensor([1, 0, 2])),
            lambda: batch.batch_repeat_interleave(2),
            lambda: batch.batch_select_indices(torch.tensor([0])),
            lambda: batch.crop(-1),
        ):
            with pytest.raises(kvmmap.UnsupportedModelError, match="branches"):
                refused()
        with pytest.raises(kvmmap.KvmmapError, match="caches"):
            batch.layers[0].keys  # noqa: B018
    other = model("llama")
    with KvmmapBatch([KvmmapCache(net)]) as batch, pytest.raises(kvmmap.ShapeMismatchError, match="opened with"):
        other(prompt(3), **past(batch))


def test_a_branch_of_positions_in_memory_beside_a_file_is_refused(path: Path) -> None:
    net = model("llama")
    with KvmmapCache.create(path, net) as cache:
        net(prompt(5), **past(cache))
    with KvmmapCache.open(path, net) as cache:
        net(torch.tensor([[3]]), **past(cache))
        with pytest.raises(kvmmap.KvmmapError, match="save"):
            KvmmapBatch.branches(cache, 2)


def test_single_caches_name_the_way_to_batches() -> None:
    net = model("llama")
    for make in (
        lambda: net.generate(prompt(3), **past(KvmmapCache(net)), num_beams=2, max_new_tokens=2),
        lambda: net(prompt(3).repeat(2, 1), **past(KvmmapCache(net))),
    ):
        with pytest.raises(kvmmap.UnsupportedModelError, match="KvmmapBatch"):
            make()
