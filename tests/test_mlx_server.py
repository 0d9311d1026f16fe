"""mlx-lm's server with its prompts on the disk: the real server, with a tiny model of random weights."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvmmap

INSTALLED = importlib.util.find_spec("mlx_lm") is not None
needs_mlx = pytest.mark.skipif(not INSTALLED, reason="mlx-lm is not installed")
pytestmark = pytest.mark.filterwarnings("default")

LAYERS, HEADS, KV_HEADS, DIM, HIDDEN, INNER = 2, 4, 2, 16, 64, 96
WORDS = [f"w{number}" for number in range(200)]
PROMPT = " ".join(WORDS[7 * number % 200] for number in range(60))


def write_model(folder: Path, seed: int = 0, dtype: Any = np.float32) -> Path:
    """A checkpoint of a Llama, and a tokenizer of words."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir()
    random = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (len(WORDS) + 2, HIDDEN), "norm": (HIDDEN,)}
    for layer in range(LAYERS):
        here = f"layers.{layer}"
        shapes |= {f"{here}.input_layernorm": (HIDDEN,), f"{here}.post_attention_layernorm": (HIDDEN,)}
        for name, heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            shapes[f"{here}.self_attn.{name}_proj"] = (heads * DIM, HIDDEN)
        shapes[f"{here}.self_attn.o_proj"] = (HIDDEN, HEADS * DIM)
        shapes |= {f"{here}.mlp.{name}_proj": (INNER, HIDDEN) for name in ("gate", "up")}
        shapes[f"{here}.mlp.down_proj"] = (HIDDEN, INNER)
    weights = {
        f"model.{name}.weight": (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(dtype)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    config = {
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": DIM,
        "rms_norm_eps": 1e-5,
        "vocab_size": len(WORDS) + 2,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*WORDS, "<unk>", "<eos>"])}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>").save_pretrained(folder)
    return folder


class Server:
    """A running server."""

    def __init__(self, port: int, process: subprocess.Popen[bytes], log: Path) -> None:
        self._url, self._process, self._log = f"http://127.0.0.1:{port}", process, log

    def wait(self) -> None:
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self._url}/health", timeout=5):
                return
            assert self._process.poll() is None, self._log.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)

    def complete(self, prompt: str, tokens: int = 4) -> tuple[str, int]:
        """Return what follows a prompt, and how many tokens were not computed."""
        asked = {"prompt": prompt, "max_tokens": tokens, "temperature": 0.0}
        request = urllib.request.Request(
            f"{self._url}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            found = json.load(answer)
        return found["choices"][0]["text"], found["usage"]["prompt_tokens_details"]["cached_tokens"]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def server(folder: Path, model: Path, *options: str) -> Iterator[Server]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = folder / "server.log"
    arguments = [folder / "library", "--model", model, "--port", str(port), *options]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvmmap.integrations.mlx", *arguments],
            stdout=file,
            stderr=file,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )
    running = Server(port, process, log)
    try:
        running.wait()
        yield running
    finally:
        running.kill()


@needs_mlx
def test_a_server_goes_on_after_it_was_killed(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with server(tmp_path, model) as first:
        answer, cached = first.complete(PROMPT)
        assert cached == 0
        longer, more = first.complete(f"{PROMPT} {answer} w3 w4")
        assert more >= 60
    with server(tmp_path, model) as second:
        assert second.complete(f"{PROMPT} {answer} w3 w4")[0] == longer
        again, cached = second.complete(PROMPT)
        assert (again, cached) == (answer, 59)
        assert second.complete(" ".join(PROMPT.split()[:30]) + " w1 w1")[1] >= 30  # in memory by now
    library = kvmmap.Library(tmp_path / "library", create=False)
    for segment in library.entries():
        with kvmmap.open(segment.path) as cache:
            assert cache.verify().sound
            assert cache.metadata["portable"]["program"] == "mlx-lm"
            assert cache.metadata["portable"]["id"]
    library.close()


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Any]:
    """Make prompt caches over one directory, as processes one after the other have them."""
    from kvmmap.integrations.mlx import KvmmapPromptCache

    made: list[Any] = []

    def make(**options: Any) -> Any:
        made.append(KvmmapPromptCache(tmp_path / "library", **options))
        return made[-1]

    yield make
    for cache in made:
        cache.close()


def filled(count: int, dtype: Any, seed: int = 0) -> list[Any]:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache

    found = []
    for layer in range(LAYERS):
        random = np.random.default_rng([seed, layer])
        keys, values = (
            mx.array(random.standard_normal((1, KV_HEADS, count, DIM)).astype(np.float32)).astype(dtype)
            for _ in range(2)
        )
        cache = KVCache()
        cache.update_and_fetch(keys, values)
        found.append(cache)
    return found


@needs_mlx
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_rows_come_back_bit_by_bit(dtype: str, tmp_path: Path, caches: Any) -> None:
    import mlx.core as mx

    key = (str(write_model(tmp_path / "model")), None, None)
    kind, tokens = getattr(mx, dtype), list(range(70))
    made = filled(70, kind)
    caches().insert_cache(key, tokens, made)
    found, rest = caches().fetch_nearest_cache(key, [*tokens[:50], 1, 2])
    assert (len(rest), found[0].offset) == (2, 50)
    for one, other in zip(made, found, strict=True):
        assert other.keys.dtype == kind
        assert mx.array_equal(one.keys[..., :50, :], other.keys).item()
        assert mx.array_equal(one.values[..., :50, :], other.values).item()
    # It grows as any other: past the room that mlx reserves in steps.
    more = filled(3, kind, seed=1)
    keys, _ = found[0].update_and_fetch(more[0].keys[..., :3, :], more[0].values[..., :3, :])
    assert keys.shape == (1, KV_HEADS, 53, DIM)


@needs_mlx
def test_what_is_another_never_matches(tmp_path: Path, caches: Any) -> None:
    import mlx.core as mx

    model, other = write_model(tmp_path / "model"), write_model(tmp_path / "other", seed=1)
    tokens = list(range(40))
    caches().insert_cache((str(model), None, None), tokens, filled(40, mx.float32))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapters.safetensors").write_bytes(b"weights")
    moved = model.rename(tmp_path / "moved")
    assert caches().fetch_nearest_cache((str(moved), None, None), tokens)[0] is not None  # the files count
    assert caches().fetch_nearest_cache((str(other), None, None), tokens)[0] is None
    assert caches().fetch_nearest_cache((str(moved), str(adapter), None), tokens)[0] is None
    assert caches().fetch_nearest_cache((str(moved), None, str(other)), tokens)[0] is None
    assert caches(salt="tenant").fetch_nearest_cache((str(moved), None, None), tokens)[0] is None
    assert caches(codec="int8").fetch_nearest_cache((str(moved), None, None), tokens)[0] is not None
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    assert caches().fetch_nearest_cache((str(moved), None, None), tokens)[0] is None
    assert caches().fetch_nearest_cache((str(tmp_path / "none"), None, None), tokens)[0] is None


@needs_mlx
def test_other_kinds_of_caches_stay_in_memory(tmp_path: Path, caches: Any) -> None:
    import mlx.core as mx
    from mlx_lm.models.cache import KVCache, RotatingKVCache

    key = (str(write_model(tmp_path / "model")), None, None)
    tokens, plain = list(range(40)), filled(40, mx.float32)
    ring = RotatingKVCache(max_size=64)
    ring.update_and_fetch(plain[0].keys[..., :40, :], plain[0].values[..., :40, :])
    empty = [KVCache() for _ in plain]
    cache = caches()
    for entry in ([plain[0], ring], empty, [plain[0], filled(30, mx.float32)[1]]):
        cache.insert_cache(key, tokens, entry)
    cache.insert_cache(key, [*tokens[:-1], "image"], filled(40, mx.float32))
    assert not cache.library.namespaces()
    found, rest = cache.fetch_nearest_cache(key, [*tokens, 1])
    assert found is not None
    assert rest == [1]


@needs_mlx
def test_a_damaged_segment_is_computed_again(tmp_path: Path, caches: Any) -> None:
    import mlx.core as mx

    key = (str(write_model(tmp_path / "model")), None, None)
    made = filled(300, mx.float32)
    caches().insert_cache(key, list(range(300)), made)
    path = next((tmp_path / "library").glob("caches/*/*.kvm"))
    spot = path.read_bytes().find(np.array(made[1].keys[0, 1, 100]).tobytes())
    assert spot > 0
    with path.open("r+b") as file:
        file.seek(spot)
        file.write(b"\x01\x02\x03")
    found, rest = caches().fetch_nearest_cache(key, list(range(310)))
    assert found is None
    assert len(rest) == 310


def test_without_mlx_the_integration_says_what_it_needs() -> None:
    if INSTALLED:
        pytest.skip("mlx-lm is installed")
    with pytest.raises(kvmmap.MissingLibraryError, match="pip install mlx-lm"):
        importlib.import_module("kvmmap.integrations.mlx")
