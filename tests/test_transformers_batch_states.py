"""Batches of models with states, and with index keys: each sequence must be what it is alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from families.batches import check_batch
from families.configs import config, model
from families.outcomes import RELEASE
from families.trial import BOUND, _reference, generate, past, prompt
from helpers.failing import failing
from helpers.support import sweep

import kvmmap
from kvmmap.errors import ShapeMismatchError, UnknownTokensError, UnsupportedModelError
from kvmmap.integrations.transformers import KvmmapBatch, KvmmapCache, reuse
from kvmmap.integrations.transformers.versions import argument_of

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]
torch.set_num_threads(1)

KINDS = ("qwen3_5_text", "deepseek_v32", *sweep("falcon_h1", "zamba2", "lfm2", "minimax"))


def made(kind: str) -> Any:
    return model(config(kind), kind)


def in_batch(net: Any, prompts: Sequence[torch.Tensor], batch: KvmmapBatch, count: int, **more: Any) -> Any:
    """Generate prompts, [n] each: sequences [batch, n + count], logits [count, batch, vocabulary]."""
    width = max(len(ids) for ids in prompts)
    ids, mask = torch.ones(2, len(prompts), width, dtype=torch.long)
    for line, one in enumerate(prompts):
        mask[line, : width - len(one)] = 0
        ids[line, width - len(one) :] = one
    if any(cache.seq_len for cache in batch.caches):
        batch.reuse(ids, mask)
    found = net.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **past(net, batch),
        **more,
    )
    return found.sequences, torch.stack(list(found.logits))


def alone(net: Any, ids: torch.Tensor, count: int) -> torch.Tensor:
    return in_one(net, ids, _reference(net), count)


def in_one(net: Any, ids: torch.Tensor, cache: Any, count: int) -> torch.Tensor:
    found = net.generate(
        ids[None],
        attention_mask=torch.ones_like(ids[None]),
        max_new_tokens=count,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **past(net, cache),
    )
    return torch.cat(list(found.logits))


def check(found: torch.Tensor, right: torch.Tensor) -> None:
    assert float((found - right).abs().max() / right.std()) < BOUND


@pytest.mark.parametrize("attention", ["own", "kvmmap"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_turns(kind: str, attention: str) -> None:
    net = made(kind)
    if attention == "kvmmap":
        net.set_attn_implementation(attention)
    assert not check_batch(net, kind, lambda: _reference(net), argument_of(net), BOUND)


@pytest.mark.parametrize("kind", ["lfm2", *sweep("qwen3_5_text")])
def test_files_are_continued_alone_and_in_other_batches(tmp_path: Path, kind: str) -> None:
    net, ids = made(kind), prompt(40)[0]
    prompts = [ids[:14], ids[5:14], ids[20:31]]
    paths = [tmp_path / f"{number}.kvm" for number in range(3)]
    with KvmmapBatch([KvmmapCache.create(path, net) for path in paths]) as batch:
        sequences, _ = in_batch(net, prompts, batch, 3)
        for cache, one in zip(batch.caches, prompts, strict=True):
            assert [one.position for one in cache.checkpoints] == [len(one)]  # the end of its prompt
    longer = [torch.cat([line[-3 - len(one) :], ids[-2 - number :]]) for number, (line, one) in
              enumerate(zip(sequences, prompts, strict=True))]  # fmt: skip
    with KvmmapCache.open(paths[0], net) as cache:  # a sequence of the batch, by itself
        assert reuse(cache, longer[0]) == 16
        check(in_one(net, longer[0], cache, 3), alone(net, longer[0], 3))
    with KvmmapBatch([KvmmapCache.open(path, net, "a") for path in reversed(paths)]) as batch:
        _, found = in_batch(net, longer[::-1], batch, 3)
        for line, one in enumerate(longer[::-1]):
            check(found[:, line], alone(net, one, 3))
    for path, one in zip(paths, longer, strict=True):
        with kvmmap.open(path) as stored:
            assert stored.seq_len == len(one) + 2
            assert stored.checkpoints[-1].position == stored.seq_len
            assert stored.token_ids[: len(one)].tolist() == one.tolist()


def test_what_a_sequence_has_left_beyond_others_is_fed_by_itself() -> None:
    net, ids = made("qwen3_5_text"), prompt(40)[0]
    with KvmmapBatch([KvmmapCache(net), KvmmapCache(net)]) as batch:
        in_batch(net, [ids[:20], ids[:7]], batch, 2)
        longer = torch.stack([ids[:30], torch.cat([ids[:7], ids[10:33]])])
        assert batch.reuse(longer) == [20, 7]  # told as it is: 10 and 23 tokens are computed
        assert [cache.seq_len for cache in batch.caches] == [20, 20]  # 13 of them by now
        assert batch.get_seq_length() == 20


@pytest.mark.parametrize("kind", ["mamba2", "deepseek_v32", *sweep("qwen3_5_text", "minimax")])
def test_beam_search(kind: str, path: Path) -> None:
    net, ids = made(kind), prompt(24)
    settings = {"num_beams": 3, "num_return_sequences": 3, "max_new_tokens": 6, "do_sample": False}
    expected = net.generate(ids, attention_mask=torch.ones_like(ids), **past(net, _reference(net)), **settings)
    with KvmmapCache.create(path, net) as cache:
        generate(net, ids[:, :15], cache, 1)
    with KvmmapCache.open(path, net) as cache, KvmmapBatch.branches(cache, 3) as batch:
        assert batch.reuse(ids.repeat(3, 1)) == [15] * 3
        if kind == "mamba2" and argument_of(net) != "cache":  # which older releases feed from the start of a prompt
            with pytest.raises((UnsupportedModelError, ShapeMismatchError)):
                net.generate(ids, attention_mask=torch.ones_like(ids), **past(net, batch), **settings)
            return
        found = net.generate(ids, attention_mask=torch.ones_like(ids), **past(net, batch), **settings)
        assert found.tolist() == expected.tolist()
        assert cache.seq_len == 15


def test_a_pass_that_fails_leaves_every_sequence_at_a_checkpoint() -> None:
    net, ids = made("qwen3_5_text"), prompt(30)[0]
    prompts = [ids[:12], ids[3:12]]
    with KvmmapBatch([KvmmapCache(net), KvmmapCache(net)]) as batch:
        in_batch(net, prompts, batch, 1)
        batch.flush()
        longer = [torch.cat([one, ids[20:24]]) for one in prompts]
        with failing(net.model.layers[2], ZeroDivisionError()), pytest.raises(ZeroDivisionError):
            in_batch(net, longer, batch, 2)
        assert [cache.seq_len for cache in batch.caches] == [12, 9]
        _, found = in_batch(net, longer, batch, 2)
        for line, one in enumerate(longer):
            check(found[:, line], alone(net, one, 2))


def test_passes_that_would_feed_padding_into_states_are_refused() -> None:
    net, ids = made("qwen3_5_text"), prompt(30)[0]
    with KvmmapBatch([KvmmapCache(net), KvmmapCache(net)]) as batch:
        in_batch(net, [ids[:12], ids[:9]], batch, 1)
        before = [cache.seq_len for cache in batch.caches]
        mask = torch.ones(2, 16, dtype=torch.long)
        mask[1, :4] = 0
        positions = (mask.cumsum(1) - 1).clamp(0)[:, 12:]
        with pytest.raises(UnsupportedModelError, match=r"sequence 1 has 3 tokens .*batch.reuse\("):
            net(ids[None, 12:16].repeat(2, 1), attention_mask=mask, position_ids=positions, **past(net, batch))
        assert [cache.seq_len for cache in batch.caches] == before
    with (
        KvmmapBatch([KvmmapCache(net), KvmmapCache(net)]) as batch,
        pytest.raises(UnsupportedModelError, match="chunk"),
    ):
        in_batch(net, [ids[:12], ids[:2]], batch, 1, prefill_chunk_size=5)


@pytest.mark.parametrize("kind", ["minimax_m3_vl_text", "qwen4_exp_text", "glm5_next", "git"])
def test_models_that_no_batch_can_hold_are_refused(kind: str) -> None:
    try:
        net = made(kind)
        KvmmapCache(net)
    except Exception:
        pytest.skip("not in this release")
    if kind == "qwen4_exp_text" and RELEASE < "5.23":
        pytest.skip("which rotates index keys before the cache in this release")
    ids = prompt(20)[0]
    with KvmmapBatch([KvmmapCache(net), KvmmapCache(net)]) as batch, pytest.raises(UnsupportedModelError):
        in_batch(net, [ids[:12], ids[:9]], batch, 2)


def test_positions_that_a_model_counts_otherwise_than_generate_are_not_reused() -> None:
    net, ids = made("roberta"), prompt(20)
    with KvmmapCache(net) as cache:
        net(ids[:, :12], **past(net, cache))  # from padding_idx + 1 on, where generate begins at 0
        assert cache.token_ids.tolist() == [-1] * 12
        with pytest.raises(UnknownTokensError):
            reuse(cache, ids)
        assert reuse(cache, ids, discard=True) == 0
        first = generate(net, ids, cache, 3)
        assert reuse(cache, ids) == 19
        assert generate(net, ids, cache, 3)[0].tolist() == first[0].tolist()


def test_caches_of_a_class_of_a_models_own_are_forked_and_copied(tmp_path: Path) -> None:
    net, ids = made("minimax"), prompt(14)
    with KvmmapCache.create(tmp_path / "chat.kvm", net) as cache:
        generate(net, ids[:, :9], cache, 1)
        with cache.fork(tmp_path / "fork.kvm") as made_by_fork:
            assert reuse(made_by_fork, ids) == 9
            check(in_one(net, ids[0], made_by_fork, 2), alone(net, ids[0], 2))
    kept = KvmmapCache(net)
    generate(net, ids[:, :9], kept, 1)
    for copied in (copy.deepcopy(kept), pickle.loads(pickle.dumps(kept))):
        assert reuse(copied, ids) == 9
    check(in_one(net, ids[0], copy.deepcopy(kept), 2), alone(net, ids[0], 2))
