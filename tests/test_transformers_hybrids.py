"""Models with states in sessions of a library, and with rows as tensors on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families.configs import config, model
from families.outcomes import RELEASE
from families.resident import check_resident
from families.trial import BOUND, generate, prompt
from helpers.tiny_models import past
from transformers import DynamicCache

import kvmmap
from kvmmap.errors import CapacityExceededError, UnsupportedModelError
from kvmmap.integrations.transformers import KvmmapCache, attach, open_session, reuse

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore")]

KIND = "qwen3_5_text"

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def net() -> Any:
    return model(config(KIND), KIND)


def own(net: Any, ids: torch.Tensor, count: int) -> Any:
    return generate(net, ids, DynamicCache(config=net.config), count)


def check(found: Any, right: Any) -> None:
    assert found[0].tolist() == right[0].tolist()
    assert float((found[1] - right[1]).abs().max() / right[1].std()) < BOUND


def test_turns_begin_at_the_last_checkpoint_of_a_library(tmp_path: Path, net: Any) -> None:
    ids = prompt(30)
    with kvmmap.Library(tmp_path / "library") as library:
        with open_session(library, net, ids) as cache:
            assert cache.reused == 0
            first = generate(net, ids, cache, 4)
        check(first, own(net, ids, 4))
        more = torch.cat([first[0], prompt(3, 1)], 1)
        with library.session(net, more) as cache:
            assert cache.reused == 33  # where the first session was closed: the last token was never fed
            check(generate(net, more, cache, 3), own(net, more, 3))
        other = torch.cat([ids, prompt(5, 2)], 1)
        with library.session(net, other) as cache:
            assert cache.reused == 30  # the end of the first prompt
            check(generate(net, other, cache, 3), own(net, other, 3))
        early = torch.cat([ids[:, :20], prompt(5, 3)], 1)
        with library.session(net, early) as cache:
            assert cache.reused == 0  # 20 tokens agree, and no states are kept there
            check(generate(net, early, cache, 3), own(net, early, 3))
        with attach(library, net) as attached:
            net.generate(other, max_new_tokens=1, do_sample=False)
            assert attached.reused == 30


def test_a_model_that_drops_its_states_has_no_sessions(tmp_path: Path) -> None:
    jamba = model(config("jamba"), "jamba")
    with (
        kvmmap.Library(tmp_path / "library") as library,
        pytest.raises(UnsupportedModelError, match="one token at a time"),
    ):
        open_session(library, jamba, prompt(10))


def test_rows_on_the_device_and_checkpoints_in_the_file(tmp_path: Path, net: Any) -> None:
    assert check_resident(net, prompt(30), tmp_path, BOUND) is None


def test_a_resident_cache_goes_back_to_a_checkpoint(tmp_path: Path, net: Any) -> None:
    path, ids = tmp_path / "a.kvm", prompt(30)
    with KvmmapCache.create(path, net, resident="device") as cache:
        net(input_ids=ids[:, :20], **past(cache))
        cache.checkpoint(pin=True)
        check(generate(net, ids, cache, 3), own(net, ids, 3))
        branch = torch.cat([ids[:, :20], prompt(6, 1)], 1)
        assert reuse(cache, branch) == 20
        check(generate(net, branch, cache, 3), own(net, branch, 3))
        positions = [one.position for one in cache.checkpoints]
        assert positions[:2] == [20, 26]
    for resident in ("host", "device"):
        with KvmmapCache.open(path, net, resident=resident) as cache:
            assert cache.seq_len == 28
            longer = torch.cat([branch, prompt(4, 2)], 1)
            assert reuse(cache, longer) == 26
            check(generate(net, longer, cache, 3), own(net, longer, 3))


def test_as_many_checkpoints_are_kept_as_there_are_slots(tmp_path: Path, net: Any) -> None:
    with KvmmapCache.create(tmp_path / "a.kvm", net, checkpoint_slots=2) as cache:
        for at in range(4):
            net(input_ids=prompt(4)[:, at : at + 1], **past(cache))
            cache.checkpoint()
        assert len(cache.checkpoints) == 2
        cache.checkpoint(pin=True)
        net(input_ids=prompt(1), **past(cache))
        with pytest.raises(CapacityExceededError):
            cache.checkpoint(pin=True)
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        assert len(cache.checkpoints) == 2


@pytest.mark.skipif(RELEASE < "5.23", reason="whose generate feeds chunks from the start of a prompt")
@pytest.mark.parametrize("kind", ["jamba", "zamba"])
def test_models_that_take_one_token_a_pass_continue_in_chunks_of_one(kind: str) -> None:
    net, ids = model(config(kind), kind), prompt(24)
    with KvmmapCache(net) as cache:
        generate(net, ids[:, :18], cache, 1)
        assert reuse(cache, ids) == 18
        with pytest.raises(UnsupportedModelError, match="prefill_chunk_size=1"):
            generate(net, ids, cache, 3)
        assert reuse(cache, ids) == 18
        check(generate(net, ids, cache, 3, prefill_chunk_size=1), own(net, ids, 3))
