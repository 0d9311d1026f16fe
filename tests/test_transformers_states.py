"""Models with states through a KvmmapCache: reopening, checkpoints, failed passes, copies, and what is refused."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from packaging.version import Version

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from families.configs import config, model  # noqa: E402
from families.trial import generate, prompt  # noqa: E402
from helpers.failing import failing  # noqa: E402
from helpers.tiny_models import RoundedCache, past  # noqa: E402

import kvmmap  # noqa: E402
from kvmmap.errors import UnsupportedModelError  # noqa: E402
from kvmmap.integrations.transformers import ATTENTION, KvmmapCache, reuse  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore::UserWarning")]
KINDS = ["qwen3_5_text", "nemotron_h"]
NEXT = 32

torch.set_num_threads(1)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    if found == "nemotron_h" and Version(transformers.__version__).release < (5, 23):
        pytest.skip("this release of transformers names layers without attention otherwise: refused, by name")
    return found


@pytest.fixture
def net(kind: str) -> Any:
    return model(config(kind), kind)


def feed(net: Any, cache: Any, ids: Any) -> Any:
    """Logits of each token, [n, vocabulary]."""
    with torch.no_grad():
        return net(input_ids=ids, use_cache=True, **past(cache)).logits[0]


def steps(net: Any, cache: Any, ids: Any) -> Any:
    return torch.cat([feed(net, cache, ids[:, at : at + 1]) for at in range(ids.shape[1])])


# In another process

ANOTHER = """
import sys, torch, numpy as np
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
from families.configs import config, model
from helpers.tiny_models import past
from kvmmap.integrations.transformers import KvmmapCache
kind, path, mode, attention, out = sys.argv[1:]
net = model(config(kind), kind)
if attention:
    net.set_attn_implementation(attention)
ids = torch.from_numpy(np.load(out))
logits = []
with torch.no_grad(), KvmmapCache.open(path, net, mode) as cache:
    for at in range(cache.seq_len, ids.shape[1]):
        logits.append(net(input_ids=ids[:, at : at + 1], use_cache=True, **past(cache)).logits[0])
np.save(out, torch.cat(logits).numpy())
"""


@pytest.mark.parametrize(("mode", "attention"), [("r", ""), ("a", ATTENTION)])
def test_reopened_in_another_process_it_continues_as_if_never_closed(
    tmp_path: Path, kind: str, net: Any, mode: str, attention: str
) -> None:
    ids = prompt(30 + 5 + NEXT)
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        feed(net, cache, ids[:, :30])
        steps(net, cache, ids[:, 30:35])
    own = RoundedCache(config=net.config)
    feed(net, own, ids[:, :30])
    expected = steps(net, own, ids[:, 30:])[-NEXT:].numpy()
    np.save(tmp_path / "out.npy", ids.numpy())
    program = ANOTHER.format(tests=str(Path(__file__).parent))
    arguments = [kind, str(tmp_path / "a.kvm"), mode, attention, str(tmp_path / "out.npy")]
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "out.npy")
    if attention:
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * expected.std())
    else:
        np.testing.assert_array_equal(found, expected)


# Checkpoints


def test_checkpoints_are_made_where_they_are_needed(tmp_path: Path, net: Any) -> None:
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        generate(net, prompt(20), cache, 4)
        assert [one.position for one in cache.checkpoints] == [20]  # before the first new token
        assert cache.restorable(19) == 0
        assert cache.restorable(22) == 20
        assert cache.restorable() == cache.seq_len == 23
        cache.flush()
        cache.checkpoint(pin=True)
        assert cache.checkpoints == ((20, False), (23, True))
        assert cache.checkpoint_bytes > 0
    with kvmmap.open(tmp_path / "a.kvm") as stored:
        assert (stored.seq_len, stored.rows_beyond_checkpoint) == (23, 0)
        assert stored.verify().sound


def test_truncation_and_reuse_go_to_a_checkpoint(net: Any) -> None:
    cache = KvmmapCache(net)
    ids = prompt(40)
    feed(net, cache, ids[:, :16])
    cache.checkpoint()
    feed(net, cache, ids[:, 16:])
    other = torch.cat([ids[:, :25], prompt(10, seed=3)], 1)
    assert reuse(cache, other) == cache.seq_len == 16
    own = RoundedCache(config=net.config)
    feed(net, own, other[:, :16])
    expected = feed(net, own, other[:, 16:])
    np.testing.assert_allclose(feed(net, cache, other[:, 16:]), expected, rtol=0, atol=1e-5 * expected.std())
    assert cache.truncate(20) == cache.seq_len == 16
    assert cache.truncate(15) == cache.seq_len == 0
    np.testing.assert_array_equal(feed(net, cache, ids[:, :9]), feed(net, RoundedCache(config=net.config), ids[:, :9]))


def test_a_failed_pass_restores_a_checkpoint(net: Any) -> None:
    cache, ids = KvmmapCache(net), prompt(30)
    feed(net, cache, ids[:, :20])
    feed(net, cache, ids[:, 20:21])
    last = [part for part in net.modules() if hasattr(part, "layer_idx")][-1]
    error = ZeroDivisionError()
    with (
        failing(last, error),
        pytest.raises(ZeroDivisionError),
        pytest.warns(RuntimeWarning, match="checkpoint, at position 20"),
    ):
        feed(net, cache, ids[:, 21:22])
    assert cache.seq_len == 20
    own = RoundedCache(config=net.config)
    feed(net, own, ids[:, :20])
    np.testing.assert_array_equal(steps(net, cache, ids[:, 20:]), steps(net, own, ids[:, 20:]))


def test_a_read_only_cache_goes_back_into_its_file(tmp_path: Path, net: Any) -> None:
    ids = prompt(40)
    with KvmmapCache.create(tmp_path / "a.kvm", net) as cache:
        feed(net, cache, ids[:, :10])
        cache.checkpoint()
        feed(net, cache, ids[:, 10:20])
    before = (tmp_path / "a.kvm").read_bytes()
    with KvmmapCache.open(tmp_path / "a.kvm", net) as cache:
        feed(net, cache, ids[:, 20:30])
        cache.checkpoint()
        feed(net, cache, ids[:, 30:])
        assert [one.position for one in cache.checkpoints] == [10, 20, 30]
        for start, kept in ((30, 30), (20, 20), (10, 10)):
            assert cache.truncate(kept) == kept
            own = RoundedCache(config=net.config)
            for first in range(0, start, 10):
                feed(net, own, ids[:, first : first + 10])
            expected = feed(net, own, ids[:, start : start + 10])
            np.testing.assert_array_equal(feed(net, cache, ids[:, start : start + 10]), expected)
    assert (tmp_path / "a.kvm").read_bytes() == before


@pytest.mark.parametrize("how", ["save", "fork", "copy"])
def test_copies_continue_alike(tmp_path: Path, net: Any, how: str) -> None:
    import copy

    ids = prompt(30)
    cache = KvmmapCache(net)
    feed(net, cache, ids[:, :20])
    steps(net, cache, ids[:, 20:24])
    made: Any
    if how == "copy":
        made = copy.deepcopy(cache)
    elif how == "fork":
        made = cache.fork(tmp_path / "b.kvm")
    else:
        cache.save(tmp_path / "b.kvm")
        made = KvmmapCache.open(tmp_path / "b.kvm", net)
    assert made.seq_len == 24
    assert [one.position for one in made.checkpoints] == [20, 24]
    np.testing.assert_array_equal(steps(net, made, ids[:, 24:]), steps(net, cache, ids[:, 24:]))
    made.close()


# What is refused


def test_what_needs_the_model_is_refused_without_it(tmp_path: Path, net: Any) -> None:
    KvmmapCache.create(tmp_path / "a.kvm", net).close()
    acts: list[Callable[[], Any]] = [
        lambda: KvmmapCache(net.config),
        lambda: KvmmapCache.open(tmp_path / "a.kvm"),
        lambda: KvmmapCache.open(tmp_path / "a.kvm", net.config),
        lambda: KvmmapCache(net).crop(-1),
    ]
    for act in acts:
        with pytest.raises(UnsupportedModelError):
            act()


def test_finding_the_states_leaves_the_model_as_it_was(kind: str) -> None:
    net, other = (model(config(kind), kind) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.manual_seed(1)
        before = torch.get_rng_state()
        KvmmapCache(net)
        assert torch.equal(torch.get_rng_state(), before)
    ids = prompt(9)
    np.testing.assert_array_equal(
        feed(net, RoundedCache(config=net.config), ids), feed(other, RoundedCache(config=other.config), ids)
    )
