"""Decoding by compiled steps: the same rows, results and errors as by `push` and `attend`; torch's team of threads."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.tiny_models import generate, model, prompt

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache
from kvmmap.integrations.transformers.team import join_team
from kvmmap.integrations.transformers.tensors import as_array

pytestmark = pytest.mark.torch
torch.set_num_threads(1)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HEADS, DIM, VALUE_DIM = 3, 64, 32


def created(path: Path, **more: Any) -> kvmmap.QuantizedKvCache:
    shape = {"num_layers": 1, "capacity": 700, "num_kv_heads": HEADS, "head_dim": DIM, "value_head_dim": VALUE_DIM}
    return kvmmap.create(path, **shape, **more)


def rows(dtype: torch.dtype, heads: int = HEADS, dim: int = DIM) -> torch.Tensor:
    """As a model has them after it has split heads: [1, heads, 1, dim], strides as they come."""
    return torch.randn(1, 1, heads, dim).to(dtype).transpose(1, 2)


@pytest.mark.parametrize("preset", ["int8", "fidelity", "small", "tiny", "lossless"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_are_pushes(preset: str, dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    with created(tmp_path / "a.kvm", preset=preset) as mine, created(tmp_path / "b.kvm", preset=preset) as other:
        step = mine.layers[0].decode_step(torch.Tensor, DTYPES)
        assert step is not None
        for number in range(300):
            keys, values = rows(dtype), rows(dtype, dim=VALUE_DIM)
            assert step.push(keys, values)
            other.push_step([as_array(keys)[0, :, 0]], [as_array(values)[0, :, 0]])
            if number % 60:
                continue
            query = rows(dtype, 2 * HEADS)
            queries = as_array(query)[0].swapaxes(0, 1)
            for window, softcap in ((None, None), (40, None), (None, 3.0)):
                found = step.attend(query, 0.2, softcap, window)
                expected = other.layers[0].attend(queries, scale=0.2, softcap=softcap, window=window)
                assert found.shape == (1, 1, 2 * HEADS, VALUE_DIM)
                assert torch.equal(found[0], torch.from_numpy(expected).to(dtype))
        for one, two in zip(mine.layers[0].read_quantized(), other.layers[0].read_quantized(), strict=True):
            np.testing.assert_array_equal(one, two)
    with kvmmap.open(tmp_path / "a.kvm") as mine, kvmmap.open(tmp_path / "b.kvm") as other:
        np.testing.assert_array_equal(mine.layers[0].read_keys(), other.layers[0].read_keys())
        np.testing.assert_array_equal(mine.layers[0].read_values(), other.layers[0].read_values())
        assert mine.layers[0].recent_rows() is None or mine.layers[0].recent_rows().is_full(300)


def test_what_a_step_does_not_take_changes_nothing(tmp_path: Path) -> None:
    class Other(torch.Tensor):
        pass

    fine, values = rows(torch.float32), rows(torch.float32, dim=VALUE_DIM)
    bad = fine.clone()
    bad[0, 1, 0, 5] = torch.nan
    refused = [
        bad,
        fine.double(),
        torch.conj(torch.complex(fine, fine)).imag,  # whose negation is still to be done
        torch.randn(1, HEADS, DIM, 1).transpose(2, 3)[..., ::1].expand(1, HEADS, 1, DIM)[..., : DIM - 1],
        torch.randn(1, HEADS, 1, 2 * DIM)[..., ::2],
        fine.clone().requires_grad_(),
        fine.as_subclass(Other),
        fine[:, :2],
        fine[0],
        fine.expand(2, -1, -1, -1),
        fine.expand(-1, -1, 2, -1),
        fine.to("meta"),
        fine.to_sparse(),
        fine.numpy(),
    ]
    with created(tmp_path / "a.kvm") as cache:
        step = cache.layers[0].decode_step(torch.Tensor, DTYPES)
        assert step is not None
        assert step.attend(fine, 1.0, None, None) is None  # of nothing
        assert step.push(fine, values)
        kept = cache.layers[0].read_keys().copy()
        for one in refused:
            assert not step.push(one, values)
            assert step.length == 1
            if one is not refused[7]:  # two query heads for three of keys
                assert step.attend(one, 1.0, None, None) is None
        assert step.attend(refused[7], 1.0, None, None) is None
        np.testing.assert_array_equal(cache.layers[0].read_keys(), kept)
        for _ in range(699):
            assert step.push(fine, values)
        with pytest.raises(kvmmap.CapacityExceededError):
            step.push(fine, values)
    with pytest.raises(kvmmap.ClosedError):
        step.push(fine, values)
    with pytest.raises(kvmmap.ClosedError):
        step.attend(fine, 1.0, None, None)


def test_each_step_returns_a_tensor_of_its_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    with created(tmp_path / "a.kvm") as cache:
        step = cache.layers[0].decode_step(torch.Tensor, DTYPES)
        assert step is not None
        keys, values = rows(torch.float32), rows(torch.float32, dim=VALUE_DIM)
        step.prepare(keys)  # nothing is known of the queries yet
        assert step.push(keys, values)
        kept: list[tuple[torch.Tensor, torch.Tensor]] = []
        for heads, dtype, like, inference in [
            (2, torch.float32, keys, False),
            (2, torch.float32, keys, True),
            (4, torch.float32, keys, False),  # prepared for two
            (4, torch.bfloat16, keys, False),  # prepared in f32
            (4, torch.bfloat16, keys.bfloat16(), False),
            (4, torch.bfloat16, keys.double(), False),  # of which no step is made
            (4, torch.float32, keys.to("meta"), False),  # nor elsewhere
            (4, torch.bfloat16, None, False),
        ]:
            query = rows(dtype, heads * HEADS)
            with torch.inference_mode(inference):
                if like is not None:
                    step.prepare(like)
                found = step.attend(query, 0.2, None, None)
                assert step.attend(query * torch.nan, 0.2, None, None) is None
            assert found.is_inference() == inference
            assert found.dtype is dtype
            assert found.shape == (1, 1, heads * HEADS, VALUE_DIM)
            expected = cache.layers[0].attend(as_array(query)[0].swapaxes(0, 1), scale=0.2)
            assert torch.equal(found[0], torch.from_numpy(expected).to(dtype))
            kept.append((found, found.clone()))
        assert len({found.data_ptr() for found, _ in kept}) == len(kept)
        assert all(torch.equal(found, copy) for found, copy in kept)


def test_there_are_no_steps_where_there_is_no_shorter_way(tmp_path: Path) -> None:
    with created(tmp_path / "a.kvm") as cache:
        cache.push_step([np.ones((HEADS, DIM), np.float32)], [np.ones((HEADS, VALUE_DIM), np.float32)])
        with kvmmap.open(tmp_path / "a.kvm") as reader:
            assert reader.layers[0].decode_step(torch.Tensor, DTYPES) is None
    memory = kvmmap.QuantizedKvCache(1, 10, HEADS, DIM)
    assert memory.layers[0].decode_step(torch.Tensor, DTYPES) is None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss", "gpt2"])
def test_a_model_decodes_by_steps_as_without(family: str, tmp_path: Path) -> None:
    net, ids = model(family, "kvmmap"), prompt(30)
    cache = KvmmapCache.create(tmp_path / "a.kvm", net, capacity=200)
    tokens, logits = generate(net, ids, cache, 20)
    assert all(layer.step is not None for layer in cache.layers)
    expected_tokens, expected = generate(net, ids, KvmmapCache(net, capacity=200), 20)
    assert tokens.tolist() == expected_tokens.tolist()
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    cache.truncate(40)  # and goes on
    again, logits_again = generate(net, tokens[:, :41], cache, 9)
    assert again.tolist() == tokens.tolist()
    torch.testing.assert_close(logits_again, logits[-len(logits_again) :], rtol=0, atol=1e-4)
    cache.close()


def test_keys_that_change_within_a_pass_are_refused_as_without_steps(tmp_path: Path) -> None:
    net, ids = model("llama", "kvmmap"), prompt(10)
    with KvmmapCache.create(tmp_path / "a.kvm", net, capacity=100) as cache:
        generate(net, ids, cache, 3)
        length = cache.seq_len
        broken = net.model.layers[1].self_attn.k_proj
        handle = broken.register_forward_hook(lambda module, args, out: out * torch.inf)
        with pytest.raises(kvmmap.NonFiniteError, match="layer 1"):
            net(ids[:, :1], **cache.argument)
        handle.remove()
        assert cache.seq_len == length
        net(ids[:, :1], **cache.argument)
        assert cache.seq_len == length + 1


def test_a_team_of_torch_computes_the_same_also_after_a_fork(tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).standard_normal((8000, HEADS, DIM)).astype(np.float32)
    cache = kvmmap.create(tmp_path / "a.kvm", num_layers=1, capacity=8000, num_kv_heads=HEADS, head_dim=DIM)
    cache.extend([numbers], [numbers])
    queries = numbers[:1].repeat(2, axis=1)
    expected = cache.layers[0].attend(queries, threads=1)
    torch.set_num_threads(2)
    try:
        torch.randn(300, 300) @ torch.randn(300, 300)
        join_team()
        np.testing.assert_allclose(cache.layers[0].attend(queries, threads=2), expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(cache.layers[0].attend(queries, threads=5), expected, rtol=0, atol=1e-6)
        child = os.fork()
        if not child:
            same = np.allclose(cache.layers[0].attend(queries, threads=2), expected, rtol=0, atol=1e-6)
            os._exit(0 if same else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(1)
        join_team()  # one thread is no team
    cache.close()
