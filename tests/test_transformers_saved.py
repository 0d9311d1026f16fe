"""Saved caches and the models that may use them: identity, reuse of a prefix, saving, many processes on one file."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from helpers.failing import failing
from helpers.tiny_models import config, generate, model, past, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, reuse
from kvmmap.integrations.transformers.identity import weights_fingerprint

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def saved(path: Path, net: Any, length: int = 30, **more: Any) -> torch.Tensor:
    """Prefill a prompt into a new file, and return its ids."""
    ids = prompt(length)
    with KvmmapCache.create(path, net, **more) as cache:
        net(ids, **past(cache))
    return ids


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# Identity


def test_what_is_recorded(path: Path) -> None:
    net = model("mistral")
    net.config.name_or_path = "some/model"
    ids = saved(path, net, metadata={"text": "a prompt"})
    with kvmmap.open(path) as cache:
        assert cache.capacity == 256
        assert cache.token_ids.tolist() == ids[0].tolist()
        info = cache.model
        assert info is not None
        assert (info.name, info.source_dtype) == ("some/model", "float32")
        assert info.fingerprint == weights_fingerprint(net)
        assert info.rope == {"rope_theta": 10_000.0, "rope_type": "default"}
        assert cache.metadata["text"] == "a prompt"
        assert cache.metadata["transformers"]["windows"] == [12, 12, 12]
        assert cache.metadata["transformers"]["config"]["model_type"] == "mistral"
    with KvmmapCache.open(path, net) as reopened:
        assert reopened.metadata == {"text": "a prompt"}
        assert "30/" in repr(reopened)
    with pytest.raises(kvmmap.MetadataError, match="own"):
        KvmmapCache(net, metadata={"transformers": 1})


@pytest.mark.parametrize(
    ("other", "differing"),
    [
        (lambda: model("llama", seed=1), {"weights"}),
        (lambda: model("llama", rope_parameters={"rope_type": "default", "rope_theta": 5e5}), {"rope_parameters"}),
        (lambda: model("llama", rms_norm_eps=1e-5), {"rms_norm_eps"}),
        (lambda: model("llama").to(torch.bfloat16), {"weights", "weights_dtype"}),
        (lambda: model("llama", num_hidden_layers=2), {"weights", "num_hidden_layers"}),
        (lambda: config("mistral"), {"model_type", "sliding_window"}),
    ],
)
@pytest.mark.parametrize("mode", ["r", "a"])
def test_a_cache_of_another_model_is_refused_with_the_difference(
    path: Path, other: Any, differing: set[str], mode: Any
) -> None:
    saved(path, model("llama"))
    with pytest.raises(kvmmap.ModelMismatchError, match="another model") as caught:
        KvmmapCache.open(path, other(), mode)
    assert set(caught.value.expected) == set(caught.value.actual)
    # Families have fields that the other lacks, and these are not compared.
    assert differing - {"sliding_window"} <= set(caught.value.expected)
    assert all(name in str(caught.value) for name in caught.value.expected)
    assert caught.value.path == str(path)
    with KvmmapCache.open(path, model("llama"), "a") as cache:  # nothing holds it
        assert cache.seq_len == 30


def test_irrelevant_settings_do_not_matter(path: Path) -> None:
    saved(path, model("llama"))
    net = model("llama", use_cache=False, attention_dropout=0.1, eos_token_id=5)
    net.config.name_or_path = "the same at another place"
    KvmmapCache.open(path, net).close()


def test_names_and_revisions_count_where_weights_are_not_known(path: Path) -> None:
    settings = config("llama")
    settings.name_or_path = "a/model"
    settings._commit_hash = "abc"
    try:
        KvmmapCache.create(path, settings).close()
        KvmmapCache.open(path, settings).close()
        settings._commit_hash = "def"
        with pytest.raises(kvmmap.ModelMismatchError, match="revision was 'abc' and is 'def'"):
            KvmmapCache.open(path, settings)
    finally:
        settings.name_or_path, settings._commit_hash = "", None


def test_a_cache_of_another_dtype_is_refused_in_the_first_pass(path: Path) -> None:
    net, half = model("llama"), model("llama").to(torch.float16)
    with KvmmapCache.create(path, net.config) as cache:
        net(prompt(4), **past(cache))
    with KvmmapCache.open(path, half.config, "a") as cache, pytest.raises(kvmmap.ModelMismatchError, match="float16"):
        half(prompt(3), **past(cache))


def test_without_a_model_the_config_is_checked_when_attending(path: Path) -> None:
    net = model("mistral", "kvmmap")
    ids = saved(path, net)
    more = torch.cat([ids, prompt(4, seed=3)], 1)
    with KvmmapCache.open(path, net) as cache:
        expected, _ = generate(net, more, cache, 5)
    with KvmmapCache.open(path) as cache:
        tokens, _ = generate(net, more, cache, 5)
    assert tokens.tolist() == expected.tolist()
    other = model("mistral", "kvmmap", sliding_window=13)
    with KvmmapCache.open(path) as cache, pytest.raises(kvmmap.ModelMismatchError, match="sliding_window was 12"):
        other(more[:, 30:], **past(cache))


def test_a_cache_made_without_the_integration(path: Path) -> None:
    net = model("llama")
    with kvmmap.create(path, num_layers=3, capacity=50, num_kv_heads=2, head_dim=8) as cache:
        rows = np.ones((3, 4, 2, 8), np.float32)
        cache.extend(rows, rows)
    with pytest.raises(kvmmap.UnsupportedModelError, match="open it with the model"):
        KvmmapCache.open(path)
    with KvmmapCache.open(path, net, "a") as opened:
        assert opened.seq_len == 4
        net(prompt(3), **past(opened))
        assert opened.seq_len == 7
    with pytest.raises(kvmmap.ShapeMismatchError, match=r"3 of .*\(2, 8, 8\), and the model 3 of .*\(2, 16, 16\)"):
        KvmmapCache.open(path, model("qwen3"))


def test_fingerprints_follow_the_weights() -> None:
    net = model("llama")
    first = weights_fingerprint(net)
    assert weights_fingerprint(model("llama")) == first
    assert weights_fingerprint(net) == first
    assert weights_fingerprint(net.model) == first  # heads on top make no keys
    with torch.no_grad():
        net.model.layers[1].self_attn.k_proj.weight[3, 4] += 1e-3
    assert weights_fingerprint(net) != first
    with torch.device("meta"):
        empty = tf.AutoModelForCausalLM.from_config(config("llama"))
    with pytest.raises(kvmmap.KvmmapError, match="fingerprint="):
        weights_fingerprint(empty)
    assert KvmmapCache(empty, fingerprint="mine")._own.model.fingerprint == "mine"


# Reuse


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("mode", ["r", "a", "memory"])
def test_a_prefix_is_reused_and_only_the_rest_prefilled(path: Path, mode: Any, family: str, attention: str) -> None:
    net = model(family, attention)
    ids = saved(path, net)
    before = digest(path)
    ends = [prompt(20, seed=1), prompt(20, seed=2), ids[:, :0]]
    prompts = [torch.cat([ids[:, :25], end], 1) for end in ends] + [ids]
    if mode == "memory":
        cache = KvmmapCache(net)
        net(ids, **past(cache))
    else:
        cache = KvmmapCache.open(path, net, mode)
    with cache:
        for whole, reused in zip(prompts, (25, 25, 24, 25), strict=True):
            assert reuse(cache, whole) == reused
            assert cache.seq_len == reused
            fed = _shapes_fed(net, whole, cache)
            assert fed[0] == (1, whole.shape[1] - reused)
            assert cache.token_ids.tolist() == [*whole[0].tolist(), *cache.token_ids[whole.shape[1] :].tolist()]
            expected, _ = generate(net, whole, KvmmapCache(net), 6)
            assert fed[-1] == expected.tolist()
    assert (digest(path) == before) == (mode != "a")


def _shapes_fed(net: Any, ids: torch.Tensor, cache: KvmmapCache) -> list[Any]:
    """Generate, and return the shapes of what was fed, and at last the tokens."""
    fed: list[Any] = []
    with torch.no_grad():
        hook = net.get_input_embeddings().register_forward_pre_hook(lambda _, args: fed.append(tuple(args[0].shape)))
    tokens, _ = generate(net, ids, cache, 6)
    hook.remove()
    return [*fed, tokens.tolist()]


def test_what_is_not_known_or_stands_for_an_image_ends_the_prefix(path: Path) -> None:
    net = model("llama")
    ids = prompt(20)
    cache = KvmmapCache(net.config)
    net(ids, **past(cache))
    assert cache.token_ids.tolist() == [-1] * 20
    cache.record_token_ids(ids[:, :12])
    assert reuse(cache, ids) == 12
    cache.record_token_ids(ids)
    assert reuse(cache, [*ids[0, :3].tolist(), 0]) == 3
    assert cache.seq_len == 3
    net.config.image_token_id = int(ids[0, 6])
    cache = KvmmapCache(net)
    net(ids, **past(cache))
    assert reuse(cache, ids) == ids[0].tolist().index(int(ids[0, 6]))
    for bad in ([], [[1], [2]], 3):
        with pytest.raises(kvmmap.ShapeMismatchError, match="one sequence"):
            reuse(cache, bad)


# Length


@pytest.mark.parametrize("mode", ["r", "a"])
def test_cropping_and_resetting(path: Path, mode: Any) -> None:
    net = model("llama", "kvmmap")
    ids = saved(path, net)
    with KvmmapCache.open(path, net, mode) as cache:
        net(prompt(5, seed=1), **past(cache))
        assert (cache.seq_len, cache.get_seq_length(), cache.layers[0].get_seq_length()) == (35, 35, 35)
        cache.crop(0)
        cache.crop(-3)
        assert cache.seq_len == 32
        cache.crop(-7)
        assert cache.token_ids.tolist() == ids[0, :25].tolist()
        net(ids[:, 25:], **past(cache))
        assert cache.token_ids.tolist() == ids[0].tolist()
        with pytest.raises(ValueError, match="minus"):
            cache.crop(4)
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            cache.truncate(31)
        with pytest.raises(kvmmap.KvmmapError, match="on the cache"):
            cache.layers[0].crop(-1)
        cache.crop(-100)
        assert cache.seq_len == 0
        cache.reset()
        net(ids, **past(cache))
        assert cache.token_ids.tolist() == ids[0].tolist()


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
def test_a_failed_forward_pass_changes_nothing(path: Path, attention: str) -> None:
    net = model("llama", attention)
    ids = saved(path, net, 20)
    longer = torch.cat([ids, prompt(9, seed=1)], 1)
    with KvmmapCache.open(path, net) as cache:
        expected, _ = generate(net, longer, cache, 5)

    for runs, watched in ((net, True), (model("llama", attention), False)):
        with KvmmapCache.open(path, runs if watched else runs.config, "a") as cache:
            error = RuntimeError("interrupted")
            with failing(runs.model.layers[1].mlp, error), pytest.raises(RuntimeError, match="interrupted"):
                runs(prompt(9, seed=2), **past(cache))
            assert cache.seq_len == 20
            assert {len(layer) for layer in cache.layers} == ({20} if watched else {20, 29})
            tokens, _ = generate(runs, longer, cache, 5)
            assert tokens.tolist() == expected.tolist()
            cache.truncate(20)


def test_a_full_cache_refuses_and_keeps_what_it_has(path: Path) -> None:
    net = model("llama", "kvmmap")
    with KvmmapCache.create(path, net, capacity=12) as cache:
        with pytest.raises(kvmmap.CapacityExceededError):
            generate(net, prompt(10), cache, 8)
        assert cache.seq_len == 12
        assert (cache.capacity, cache.get_max_length()) == (12, 12)
    with KvmmapCache.open(path, net, room=3) as cache:
        with pytest.raises(kvmmap.CapacityExceededError):
            net(prompt(4), **past(cache))
        assert cache.seq_len == 12
        assert cache.capacity == 15


def test_room_beside_a_file_is_what_the_model_is_made_for(path: Path) -> None:
    net = model("llama")
    saved(path, net, capacity=31)
    with KvmmapCache.open(path, net) as cache:
        assert cache.capacity == 256


# Saving


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
def test_a_continuation_is_saved_as_a_cache_of_its_own(path: Path, tmp_path: Path, attention: str) -> None:
    net = model("gemma3", attention)
    ids = saved(path, net, metadata={"a": 1})
    copy = tmp_path / "copy.kvm"
    with KvmmapCache.open(path, net) as cache:
        tokens, _ = generate(net, torch.cat([ids, prompt(4, seed=1)], 1), cache, 6)
        cache.save(copy)
        with pytest.raises(kvmmap.CacheExistsError):
            cache.save(copy)
        longer, _ = generate(net, tokens, cache, 6)
        with pytest.raises(kvmmap.CapacityExceededError):
            cache.save(tmp_path / "small.kvm", capacity=3)
        assert not (tmp_path / "small.kvm").exists()
    with kvmmap.open(copy) as plain:
        assert plain.verify().sound
        assert plain.metadata["a"] == 1
    with KvmmapCache.open(copy, net, "a") as cache:
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
        again, _ = generate(net, tokens, cache, 6)
        assert again.tolist() == longer.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "kvmmap"])
def test_a_group_is_generated_into_and_from_and_copied(tmp_path: Path, attention: str) -> None:
    net, ids = model("gemma3", attention), prompt(40)
    expected, _ = generate(net, ids, KvmmapCache(net), 20)
    with KvmmapCache.create(tmp_path / "a.zarr", net) as cache:
        tokens, _ = generate(net, ids, cache, 10)
        cache.save(tmp_path / "copy.kvm")
    with KvmmapCache.open(tmp_path / "a.zarr", net, "a") as cache:
        assert reuse(cache, tokens) == 49
        assert generate(net, tokens, cache, 10)[0].tolist() == expected.tolist()
    with KvmmapCache.open(tmp_path / "copy.kvm", net) as cache:
        assert generate(net, tokens, cache, 10)[0].tolist() == expected.tolist()
        cache.save(tmp_path / "back.zarr")
    for group, kept in (("a.zarr", 39), ("back.zarr", 39)):
        with KvmmapCache.open(tmp_path / group, net) as cache:
            assert cache.token_ids.tolist() == expected[0, :-1].tolist()
            assert reuse(cache, ids) == kept
            assert generate(net, ids, cache, 20)[0].tolist() == expected.tolist()


@pytest.mark.parametrize("kept", [30, 12, 0])
@pytest.mark.parametrize("mode", ["r", "a", "memory"])
def test_copies_contain_the_current_state(path: Path, tmp_path: Path, mode: Any, kept: int) -> None:
    net = model("llama", "kvmmap")
    ids = saved(path, net)
    if mode == "memory":
        cache = KvmmapCache(net)
        net(ids, **past(cache))
    else:
        cache = KvmmapCache.open(path, net, mode)
    with cache:
        cache.truncate(kept)
        for copy in (tmp_path / "one.kvm", tmp_path / "two.kvm"):
            cache.save(copy, capacity=99)
            with KvmmapCache.open(copy, net) as found:
                assert (found.seq_len, found._saved.capacity) == (cache.seq_len, 99)
                assert found.token_ids.tolist() == cache.token_ids.tolist()
                for one, other in zip(found.layers, cache.layers, strict=True):
                    for name in range(2):
                        assert torch.equal(one.read(torch.float32)[name], other.read(torch.float32)[name])
            net(prompt(5, seed=4), **past(cache))


def test_unknown_token_ids_stay_unknown_in_a_copy(tmp_path: Path) -> None:
    net = model("llama")
    cache = KvmmapCache(net)
    net(prompt(3), **past(cache))
    net(inputs_embeds=net.get_input_embeddings()(prompt(2)), **past(cache))
    net(prompt(4), **past(cache))
    cache.save(tmp_path / "copy.kvm")
    with kvmmap.open(tmp_path / "copy.kvm") as copy:
        assert copy.token_ids.tolist() == cache.token_ids.tolist()
        assert copy.token_ids.tolist() == [*prompt(3)[0].tolist(), -1, -1, *prompt(4)[0].tolist()]


ASK = """
import sys
sys.path.insert(0, {tests!r})
import torch
from helpers.tiny_models import generate, model, prompt
from kvmmap.integrations.transformers import KvmmapCache, reuse
torch.set_num_threads(1)
path, seed = sys.argv[1], int(sys.argv[2])
net = model("llama", "kvmmap")
ids = torch.cat([prompt(30), prompt(5, seed=seed)], 1)
with KvmmapCache.open(path, net) as cache:
    print(reuse(cache, ids), *generate(net, ids, cache, 8)[0][0].tolist())
    cache.save(path + sys.argv[2])
"""


def test_several_processes_continue_from_one_file(path: Path) -> None:
    net = model("llama", "kvmmap")
    ids = saved(path, net)
    before = digest(path)
    code = ASK.format(tests=str(Path(__file__).parent))
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(path), str(seed)], stdout=subprocess.PIPE, text=True)
        for seed in (1, 2)
    ]
    for seed, process in enumerate(started, 1):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        expected, _ = generate(net, torch.cat([ids, prompt(5, seed=seed)], 1), KvmmapCache(net), 8)
        assert [int(word) for word in out.split()] == [30, *expected[0].tolist()]
        with KvmmapCache.open(f"{path}{seed}", net) as cache:
            assert cache.token_ids.tolist() == expected[0, :-1].tolist()
    assert digest(path) == before
