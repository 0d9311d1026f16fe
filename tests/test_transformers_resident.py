"""Caches that keep keys and values as tensors on the model's device, with the CPU as the device, and their writer."""

from __future__ import annotations

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.failing import failing
from helpers.tiny_models import CONFIGS, generate, model, past, prompt
from transformers import DynamicCache

import kvmmap
from kvmmap import codecs
from kvmmap.integrations.transformers import KvmmapCache, resident, reuse, write_behind
from kvmmap.integrations.transformers.device_codecs import can_decode, decode, to_device

pytestmark = pytest.mark.torch
torch.set_num_threads(1)


def logits(net: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return net(ids, **past(cache)).logits  # type: ignore[no-any-return]


def same_rows(cache: kvmmap.QuantizedKvCache, own: DynamicCache) -> None:
    """What is stored must be what a codec makes of the model's keys and values."""
    for layer, tensors in zip(cache.layers, own.layers, strict=True):
        expected = kvmmap.QuantizedKvCache(
            1,
            len(layer),
            layer.num_kv_heads,
            layer.head_dim,
            value_head_dim=layer.value_head_dim,
            key_codec=layer.geometry.key_codec.name,
            value_codec=layer.geometry.value_codec.name,
        )
        rows = [tensor[:, :, : len(layer)].transpose(1, 2).contiguous() for tensor in (tensors.keys, tensors.values)]
        expected.extend(*rows)
        for found, right in zip(layer.read_quantized(), expected.layers[0].read_quantized(), strict=True):
            assert np.array_equal(found, right)


# Decoding on a device


@pytest.mark.parametrize("name", [name for name in codecs.names() if can_decode(codecs.by_name(name))])
@pytest.mark.parametrize("dim", [8, 64, 80, 96, 128, 256, 1000])
def test_rows_decoded_on_a_device_are_those_of_the_compiled_core(name: str, dim: int) -> None:
    codec = codecs.by_name(name)
    rows = np.random.default_rng(dim).normal(size=(1, 50, 2, dim)).astype(np.float32)
    rows *= np.exp(np.random.default_rng(1).normal(size=(1, 50, 2, 1))).astype(np.float32)
    rows[0, 0] = 0
    cache = kvmmap.QuantizedKvCache(1, 50, 2, dim, key_codec=name, value_codec=name)
    cache.extend(rows, rows)
    (layer,) = cache.layers
    count = len(codec.arrays(dim))
    arrays = [to_device(array, torch.device("cpu")) for array in layer.read_quantized()[:count]]
    for dtype, kind in ((torch.float32, "float32"), (torch.float16, "float16"), (torch.bfloat16, "bfloat16")):
        found = decode(codec, arrays, dim, dtype)
        expected = np.ascontiguousarray(layer.read_keys(dtype=kind))
        bits = np.uint32 if dtype is torch.float32 else np.uint16
        assert np.array_equal(found.view(torch.uint8).numpy().view(bits), expected.view(bits))


def test_a_codec_of_a_user_is_decoded_on_the_host() -> None:
    class Other(type(codecs.by_name("int8"))):  # type: ignore[misc]
        name = "other"

    assert not can_decode(Other())


@pytest.mark.parametrize("codec", ["int8", "int8-rotated", "int4-rotated"])
def test_rows_in_16_bits_are_part_of_what_a_device_gets(codec: str) -> None:
    shape = {"key_codec": codec, "value_codec": codec, "recent_window": 8, "sinks": 3}
    cache = kvmmap.QuantizedKvCache(1, 60, 2, 16, **shape)
    cache.extend(*(torch.randn(1, 50, 2, 16) for _ in range(2)))
    (layer,) = cache.layers
    for start, stop in ((0, 50), (0, 2), (1, 44), (10, 20), (45, 50), (40, 47)):
        found = resident.decode_on_device(layer, start, stop, torch.empty(0))
        for tensor, right in zip(found, resident.read_on_host(layer, start, stop, torch.empty(0)), strict=True):
            assert torch.equal(tensor, right)


# Generation


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "deepseek_v3"])
def test_generation_is_that_of_transformers_own_cache(path: Path, family: str) -> None:
    net, ids = model(family), prompt(30)
    expected = generate(net, ids, DynamicCache(config=net.config), prefill_chunk_size=7)
    with KvmmapCache.create(path, net, resident="device") as cache:
        tokens, found = generate(net, ids, cache, prefill_chunk_size=7)
        assert tokens.tolist() == expected[0].tolist()
        assert torch.equal(found, expected[1])
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()


def test_what_is_written_is_what_the_model_computed(path: Path) -> None:
    net, own = model("llama"), DynamicCache()
    with KvmmapCache.create(path, net, resident="device") as cache:
        for ids in (prompt(30), *prompt(7, seed=1).T[:, None]):
            logits(net, ids, cache)
            logits(net, ids, own)
        cache.flush()
        with kvmmap.open(path) as beside:
            assert beside.seq_len == 37
            same_rows(beside, own)


@pytest.mark.parametrize("mode", ["r", "a"])
@pytest.mark.parametrize("ending", [".kvm", ".zarr"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reopening_continues_from_what_is_stored(tmp_path: Path, mode: Any, ending: str, dtype: torch.dtype) -> None:
    net, ids, path = model("llama").to(dtype), prompt(40), tmp_path / f"cache{ending}"
    with KvmmapCache.create(path, net, resident="device") as cache:
        logits(net, ids[:, :30], cache)
    own = DynamicCache()
    with KvmmapCache.open(path, net) as saved:
        for number, layer in enumerate(saved.layers):
            own.update(*layer.read(dtype), number)
    with KvmmapCache.open(path, net, mode, resident="device") as cache:
        assert reuse(cache, ids) == 30
        for at in range(30, 40):
            assert torch.equal(logits(net, ids[:, at : at + 1], cache), logits(net, ids[:, at : at + 1], own))
        for layer, tensors in zip(cache.layers, own.layers, strict=True):
            assert torch.equal(layer.keys, tensors.keys)
            assert torch.equal(layer.values, tensors.values)
        assert cache.seq_len == 40
    with kvmmap.open(path) as stored:
        assert stored.seq_len == (40 if mode == "a" else 30)


@pytest.mark.parametrize("codec", ["int8-rotated", "int4-rotated", "bf16"])
def test_other_codecs(path: Path, codec: str) -> None:
    net, ids = model("llama"), prompt(30)
    shape = {
        "num_layers": 3,
        "capacity": 64,
        "num_kv_heads": 2,
        "head_dim": 8,
        "key_codec": codec,
        "value_codec": codec,
    }
    with KvmmapCache.create(path, net) as made:
        logits(net, ids, made)
        info, metadata = made._own.model, made._own.metadata
    other = path.with_name("other.kvm")
    with kvmmap.open(path) as source, kvmmap.create(other, **shape, model=info, metadata=metadata) as copy:
        rows = [np.stack([read(layer) for layer in source.layers]) for read in (_keys, _values)]
        copy.extend(*rows, token_ids=source.token_ids)
    with KvmmapCache.open(other, net) as host, KvmmapCache.open(other, net, resident="device") as cache:
        logits(net, ids[:, :1], cache)
        for layer, stored in zip(cache.layers, host.layers, strict=True):
            assert torch.equal(layer.keys[:, :, :30], stored.keys)
            assert torch.equal(layer.values[:, :, :30], stored.values)


def _keys(layer: kvmmap.QuantizedKvLayer) -> Any:
    return layer.read_keys()


def _values(layer: kvmmap.QuantizedKvLayer) -> Any:
    return layer.read_values()


def test_in_place_attention_is_not_asked_for(path: Path) -> None:
    """With attention "kvmmap" chosen, too, a device-resident cache is attended over as tensors."""
    net, ids = model("llama", attention="kvmmap"), prompt(30)
    expected = generate(model("llama"), ids, DynamicCache())
    with KvmmapCache.create(path, net, resident="device") as cache:
        found = generate(net, ids, cache)
    assert found[0].tolist() == expected[0].tolist()
    assert torch.allclose(found[1], expected[1], atol=1e-4)


# Going back, copies


def test_truncation_prompt_lookup_and_branches(path: Path) -> None:
    net, ids = model("llama"), prompt(14).repeat(1, 2)
    expected = generate(net, ids, DynamicCache(), prompt_lookup_num_tokens=3)
    with KvmmapCache.create(path, net, resident="device") as cache:
        found = generate(net, ids, cache, prompt_lookup_num_tokens=3)
        assert found[0].tolist() == expected[0].tolist()
        other = torch.cat([ids[:, :9], prompt(9, seed=4)], 1)
        assert reuse(cache, other) == 9
        assert cache.seq_len == 9
        generate(net, other, cache, 5)
        own = DynamicCache()
        tokens, _ = generate(net, other, own, 5)
        assert cache.token_ids.tolist() == tokens[0, :-1].tolist()
        cache.flush()
        with kvmmap.open(path) as stored:
            for layer, tensors in zip(stored.layers, own.layers, strict=True):
                assert np.allclose(layer.read_keys(), tensors.keys[0].transpose(0, 1), atol=0.02)
        cache.truncate(0)
        assert (cache.seq_len, len(cache.token_ids)) == (0, 0)
        assert generate(net, ids, cache)[0].tolist() == generate(net, ids, DynamicCache())[0].tolist()


@pytest.mark.parametrize("resident", ["host", "device"])
def test_a_pass_that_fails_is_rolled_back(path: Path, resident: Any) -> None:
    net, ids = model("llama"), prompt(30)
    with KvmmapCache.create(path, net, resident=resident) as cache:
        logits(net, ids[:, :20], cache)
        with failing(net.model.layers[2], ZeroDivisionError()), pytest.raises(ZeroDivisionError):
            logits(net, ids[:, 20:], cache)
        assert cache.seq_len == 20
        logits(net, ids[:, 20:], cache)
        assert cache.token_ids.tolist() == ids[0].tolist()


def test_saving_and_forking_wait_for_the_writer(path: Path, tmp_path: Path) -> None:
    net, ids = model("llama"), prompt(30)
    with KvmmapCache(net, resident="device") as cache:
        logits(net, ids, cache)
        cache.save(path)
        with cache.fork(tmp_path / "fork.kvm", 12) as fork:
            assert (fork.seq_len, fork.layers[0].keys) == (12, None)
            logits(net, ids[:, 12:], fork)
    for place in (path, tmp_path / "fork.kvm"):
        with kvmmap.open(place) as stored:
            assert stored.token_ids.tolist() == ids[0].tolist()


# The writer


def test_positions_that_wait_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write_behind, "MOST_BEHIND", 5)
    monkeypatch.setattr(write_behind, "PATIENCE", 60)  # nothing is written unless somebody waits
    net = model("llama")
    with KvmmapCache.create(path, net, resident="device") as cache:
        for at in range(20):
            logits(net, prompt(20)[:, at : at + 1], cache)
            with kvmmap.open(path) as stored:
                assert at + 1 - stored.seq_len <= 6


def test_a_full_disk_loses_nothing(path: Path) -> None:
    child = os.fork()  # a limit on the size of files can't be raised again, in a container
    if child == 0:
        try:
            fill_the_disk(path)
            os._exit(0)
        except BaseException:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            os.write(2, traceback.format_exc().encode())
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    own = DynamicCache()
    for ids in prompt(30).split(10, dim=1):
        logits(model("llama"), ids, own)
    with kvmmap.open(path) as stored:
        assert stored.token_ids.tolist() == prompt(30)[0].tolist()
        same_rows(stored, own)


def fill_the_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    net, (first, second, third) = model("llama"), prompt(30).split(10, dim=1)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with KvmmapCache.create(path, net, resident="device") as cache:
        logits(net, first, cache)
        cache.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
        logits(net, second, cache)
        for action in (cache.flush, lambda: logits(net, third, cache), lambda: cache.token_ids):
            with pytest.raises(OSError, match="too large"):
                action()
        assert cache.seq_len == 20
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        cache.flush()
        logits(net, third, cache)


def test_numbers_that_cannot_be_stored_are_reported_and_can_be_dropped(path: Path) -> None:
    good, bad = torch.ones(1, 2, 1, 8), torch.full((1, 2, 1, 8), torch.nan)
    with KvmmapCache.create(path, model("llama").config, resident="device") as cache:
        for numbers in (good, bad):
            for layer in range(3):
                cache.update(numbers, numbers, layer)
        for _ in range(2):
            with pytest.raises(kvmmap.NonFiniteError):
                cache.flush()
        with pytest.raises(kvmmap.NonFiniteError):
            cache.update(good, good, 0)
        assert cache.seq_len == 2
        cache.truncate(1)
        for layer in range(3):
            cache.update(good, good, layer)
        cache.flush()
    with kvmmap.open(path) as stored:
        assert stored.seq_len == 2


def test_a_full_cache(path: Path) -> None:
    net, ids = model("llama"), prompt(30)
    with KvmmapCache.create(path, net, capacity=20, resident="device") as cache:
        logits(net, ids[:, :15], cache)
        with pytest.raises(kvmmap.CapacityExceededError, match="20"):
            logits(net, ids[:, 15:], cache)
        assert cache.seq_len == 15
        logits(net, ids[:, 15:20], cache)
        assert cache.token_ids.tolist() == ids[0, :20].tolist()


def test_a_program_that_closes_nothing_has_written_everything(path: Path) -> None:
    text = (
        "import sys, torch; from helpers.tiny_models import model, past, prompt\n"
        "from kvmmap.integrations.transformers import KvmmapCache\n"
        "net = model('llama'); cache = KvmmapCache.create(sys.argv[1], net, resident='device')\n"
        "with torch.no_grad(): net(prompt(30), **past(cache))"
    )
    done = subprocess.run([sys.executable, "-c", text, path], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    with kvmmap.open(path) as stored:
        assert stored.seq_len == 30


@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_cache_that_is_dropped_has_written_everything(path: Path) -> None:
    net = model("llama")
    cache = KvmmapCache.create(path, net, resident="device")
    logits(net, prompt(30), cache)
    del cache
    gc.collect()
    with kvmmap.open(path) as stored:
        assert stored.seq_len == 30


def test_closing_ends_the_thread(path: Path) -> None:
    net = model("llama")
    cache = KvmmapCache.create(path, net, resident="device")
    logits(net, prompt(30), cache)
    assert any(thread.name == "kvmmap-write-behind" for thread in threading.enumerate())
    cache.close()
    cache.close()
    assert not any(thread.name == "kvmmap-write-behind" for thread in threading.enumerate())


def test_wrong_uses(path: Path) -> None:
    net = model("llama")
    for make in (
        lambda: KvmmapCache(net, resident="gpu"),  # type: ignore[arg-type]
        lambda: KvmmapCache.create(path, net, resident="cuda"),  # type: ignore[arg-type]
    ):
        with pytest.raises(kvmmap.KvmmapError, match='"host" or "device"'):
            make()
    assert not path.exists()
    net.requires_grad_(True)
    with KvmmapCache(net, resident="device") as cache, pytest.raises(kvmmap.KvmmapError, match="gradients"):
        net(prompt(3), **past(cache))
