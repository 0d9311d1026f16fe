"""Models that keep states and no keys and values: positions, another process, checkpoints, and what is refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families.configs import config, model  # noqa: E402
from families.trial import past, prompt  # noqa: E402

import kvmmap  # noqa: E402
from kvmmap.integrations.transformers import KvmmapCache, reuse  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::UserWarning")]
KINDS = ["mamba", "mamba2"]
"""One that takes one token a pass after the first one, and one that takes any number."""

NEXT = 32

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def net(request: pytest.FixtureRequest) -> Any:
    return model(config(request.param), request.param)


def feed(net: Any, cache: Any, ids: Any) -> Any:
    """Logits of each token, [n, vocabulary]."""
    with torch.no_grad():
        return net(input_ids=ids, use_cache=True, **past(net, cache)).logits[0]


def steps(net: Any, cache: Any, ids: Any) -> Any:
    return torch.cat([feed(net, cache, ids[:, at : at + 1]) for at in range(ids.shape[1])])


ANOTHER = """
import sys, torch, numpy as np
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from families.configs import config, model
from kvmmap.integrations.transformers import KvmmapCache
kind, path, out = sys.argv[1:]
net = model(config(kind), kind)
ids = torch.from_numpy(np.load(out))
logits = []
with torch.no_grad(), KvmmapCache.open(path, net, "a") as cache:
    for at in range(cache.seq_len, ids.shape[1]):
        logits.append(net(input_ids=ids[:, at : at + 1], use_cache=True, **cache.argument).logits[0])
np.save(out, torch.cat(logits).numpy())
"""


def test_another_process_continues_bit_for_bit(tmp_path: Path, net: Any) -> None:
    ids, other = prompt(20 + NEXT), transformers.DynamicCache(config=net.config)
    feed(net, other, ids[:, :20])
    expected = steps(net, other, ids[:, 20:])
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        feed(net, cache, ids[:, :20])
    np.save(tmp_path / "out.npy", ids.numpy())
    code = ANOTHER.format(tests=str(Path(__file__).parent))
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, net.config.model_type, tmp_path / "a.kvm", tmp_path / "out.npy"],
        check=True,
    )
    np.testing.assert_array_equal(np.load(tmp_path / "out.npy"), expected.numpy())
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        assert cache.token_ids.tolist() == ids[0].tolist()


@pytest.mark.parametrize("suffix", ["kvm", "zarr"])
def test_positions_are_counted_and_go_back_to_checkpoints(tmp_path: Path, net: Any, suffix: str) -> None:
    ids, path = prompt(12), tmp_path / f"a.{suffix}"
    with KvmmapCache.create(path, net, capacity=40) as cache:
        feed(net, cache, ids[:, :9])
        assert (cache.seq_len, cache.get_seq_length(), cache.capacity) == (9, 9, 40)
        assert len(cache) == len(cache.layers) == net.config.num_hidden_layers
        expected = steps(net, cache, ids[:, 9:])
        assert reuse(cache, ids) == 9  # the end of the prompt
        assert torch.equal(steps(net, cache, ids[:, 9:]), expected)
        cache.save(tmp_path / f"b.{suffix}")
    for name in ("a", "b"):
        with KvmmapCache.open(tmp_path / f"{name}.{suffix}", net) as cache:
            assert (cache.seq_len, [one.position for one in cache.checkpoints]) == (12, [9, 12])
            assert cache.truncate(11) == 9
            assert torch.equal(steps(net, cache, ids[:, 9:]), expected)
    with kvmmap.open(path) as stored:
        assert stored.verify().sound
        assert sum(layer.position_bytes for layer in stored.geometry.layers) == 4


def test_a_device_resident_cache_is_the_same(tmp_path: Path, net: Any) -> None:
    ids = prompt(12)
    with KvmmapCache.create(tmp_path / "a.kvm", net, resident="device") as cache:
        feed(net, cache, ids[:, :9])
        expected = steps(net, cache, ids[:, 9:])
    with KvmmapCache.open(tmp_path / "a.kvm", net, resident="device") as cache:
        assert cache.truncate(9) == 9
        assert torch.equal(steps(net, cache, ids[:, 9:]), expected)


def test_passes_that_can_not_be_counted_change_nothing(net: Any) -> None:
    ids, cache = prompt(12), KvmmapCache(net, 10)
    feed(net, cache, ids[:, :9])
    kept = [layer.recurrent_states[0].clone() for layer in cache.layers]
    other = model(net.config, net.config.model_type)
    refused = [
        (lambda: feed(net, cache, ids[:, 9:].repeat(2, 1)), kvmmap.UnsupportedModelError, "batch of 2"),
        (lambda: feed(other, cache, ids[:, 9:10]), kvmmap.ModelMismatchError, "another model object"),
        (lambda: cache.crop(-1), kvmmap.UnsupportedModelError, "single tokens"),
    ]
    for act, error, match in refused:
        with pytest.raises(error, match=match):
            act()
        assert cache.seq_len == 9
    feed(net, cache, ids[:, 9:10])
    with pytest.raises(kvmmap.CapacityExceededError):
        feed(net, cache, ids[:, 10:11])
    assert cache.seq_len == 10
    assert cache.truncate(9) == 9
    for layer, state in zip(cache.layers, kept, strict=True):
        assert torch.equal(layer.recurrent_states[0], state)
