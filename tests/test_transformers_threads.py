"""Within a model, attention and decoding take as many threads as torch does, or as KVMMAP_NUM_THREADS says."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.core_threads import core_threads
from transformers import AutoModelForCausalLM, LlamaConfig

from kvmmap.integrations.transformers import KvmmapBatch, KvmmapCache
from kvmmap.integrations.transformers.team import model_threads
from kvmmap.threads import VARIABLE

pytestmark = pytest.mark.torch
torch.set_num_threads(1)

POSITIONS = 6000
WAYS = ("in place", "a chunk in place", "read-only in place", "tensors", "device", "batch")


def wait_for_helpers(wanted: Callable[[int], bool], between: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not wanted(core_threads()):
        assert time.monotonic() < deadline, f"{core_threads()} helpers"
        between()


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
@pytest.mark.parametrize("way", WAYS)
def test_one_thread_of_torch_is_one_of_attention(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(
        hidden_size=256,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=16,
        vocab_size=9,
        num_hidden_layers=1,
        max_position_embeddings=POSITIONS + 1000,
    )
    attention = "sdpa" if way in ("tensors", "device") else "kvmmap"
    net = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    rows, ids = torch.randn(1, 4, POSITIONS, 64), torch.tensor([[5] * (3 if way == "a chunk in place" else 1)])

    def used(threads: Callable[[int], bool], between: Callable[[Callable[[], object]], object]) -> None:
        """Run passes over caches of enough rows for many threads, until so many are seen."""
        path = tmp_path / "a.kvm"
        # A device-resident layer decodes on the host what its device can't: here the last 3,000 positions.
        with KvmmapCache.create(path, config, recent_window=3000 if way == "device" else 128, overwrite=True) as made:
            made.update(rows, rows, 0)
            if way not in ("read-only in place", "device"):
                token = make_token(made)
                between(token)
                wait_for_helpers(threads, token)
                assert way != "in place" or made.layers[0].step is not None
                return
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            resident = "device" if way == "device" else "host"
            with KvmmapCache.open(path, config, mode="r", resident=resident) as opened:
                between(make_token(opened))
            if threads(core_threads()):
                return
        raise AssertionError(f"{core_threads()} helpers")

    def make_token(cache: KvmmapCache) -> Callable[[], object]:
        if way == "batch":
            KvmmapCache(net)  # hooks on the model
        given = (KvmmapBatch([cache]) if way == "batch" else cache).argument
        return lambda: net(ids, **given)

    def twice(token: Callable[[], object]) -> None:
        for _ in range(2):
            token()
            assert core_threads() == 0

    monkeypatch.delenv(VARIABLE, raising=False)
    with torch.no_grad():
        wait_for_helpers(lambda count: count == 0, lambda: time.sleep(0.01))  # of the test before
        used(lambda count: count == 0, twice)
        monkeypatch.setenv(VARIABLE, "3")
        # Where other processes want the processors, helpers may have ended before this one gets to look.
        used(lambda count: count == 2, lambda token: token())


def test_torch_counts_within_a_model_and_the_variable_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    try:
        torch.set_num_threads(len(os.sched_getaffinity(0)) + 1 if hasattr(os, "sched_getaffinity") else 2)
        assert model_threads() == torch.get_num_threads() > 1
        monkeypatch.setenv(VARIABLE, "1")
        assert model_threads() == 1
    finally:
        torch.set_num_threads(1)
    monkeypatch.delenv(VARIABLE)
    assert model_threads() == 1
