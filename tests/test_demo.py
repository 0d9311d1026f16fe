"""Parts of the demo. `make demo` runs all of it, which takes minutes and a model."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import kvmmap

DEMO = Path(__file__).parents[1] / "demo"


@pytest.fixture(autouse=True)
def _demo_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DEMO)


def test_facts() -> None:
    import facts

    assert facts.perplexity([math.log(8.0), math.log(2.0)]) == pytest.approx(4.0)
    assert facts.agreement([1, 2, 3, 4], [1, 2, 0, 4]) == 0.75
    assert facts.first_difference([1, 2, 3], [1, 0, 3]) == 1
    assert facts.first_difference([1, 2], [1, 2]) is None


def test_texts_are_long_enough(tmp_path: Path) -> None:
    import facts
    import texts

    for name in texts.TEXTS:
        title, text = texts.read_text(name)
        assert title
        assert len(text) > 8 * (facts.PROMPT_TOKENS + facts.FOLLOWING_TOKENS)
    (tmp_path / "own").write_text("words")
    assert texts.read_text(str(tmp_path / "own"))[1] == "words"


@pytest.mark.parametrize("greedy", [[1, 2, 3], [1, 9, 3]])
def test_tables_show_where_continuations_differ(greedy: list[int]) -> None:
    import tables

    guesses = {"perplexity": 2.0, "guesses": [1, 2], "greedy": greedy}
    saved: dict[str, Any] = guesses | {
        "greedy": [1, 2, 3],
        "greedy_chances": [[0.9, 0.1]] * 3,
        "half_perplexity": 2.0,
        "half_guesses": [1, 2],
        "half_greedy": [1, 2, 3],
        "title": "a text",
        "prefill_s": [4.0, 6.0, 5.0],
        "save_s": 0.1,
        "load_s": 20.0,
        "f32_bytes": 4_000_000,
    }
    times = {"open_s": 0.001, "read_s": 0.04, "step_s": 0.01}
    resumed: dict[str, Any] = guesses | {
        "cold": times,
        "warm": {name: [seconds] for name, seconds in times.items()},
        "disk_bytes": 1_000_000,
        "load_s": 20.0,
        "greedy_text": "[on] it goes",
    }
    console = Console(record=True, width=120)
    tables.show(console, saved, resumed)
    printed = console.export_text()
    assert "5.00 s" in printed
    assert "98x faster" in printed  # 5 s against 51 ms
    assert "4.00x smaller" in printed
    assert "[on] it goes" in printed
    assert ("differs from token 2 on" in printed) == (greedy != [1, 2, 3])


def test_tensors_come_back_within_half_a_step(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import store

    config = SimpleNamespace(
        num_hidden_layers=2,
        max_position_embeddings=64,
        num_key_value_heads=3,
        head_dim=16,
        rope_parameters={"theta": 1},
    )
    model: Any = SimpleNamespace(config=config, fingerprint="f")
    # As a model has them: [heads, n, dim], turned round without a copy.
    pairs = [(torch.randn(3, 5, 16).transpose(0, 1), torch.randn(3, 5, 16).transpose(0, 1)) for _ in range(2)]
    path = tmp_path / "x.kvm"
    for _ in range(2):  # a second run replaces the first one's file
        store.save(path, pairs, [1, 2, 3, 4, 5], model, "a text")
    with kvmmap.open(path) as cache:
        assert cache.token_ids.tolist() == [1, 2, 3, 4, 5]
        loaded = store.load(cache, "f", 4)
        for (keys, values), (loaded_keys, loaded_values), layer in zip(pairs, loaded, cache.layers, strict=True):
            for tensor, found, scales in (
                (keys, loaded_keys, layer.key_scales),
                (values, loaded_values, layer.value_scales),
            ):
                error = np.abs((tensor[:4] - found).numpy())
                assert (error <= scales[:4, :, None] / 2 * (1 + 1e-5) + 1e-7).all()
        with pytest.raises(SystemExit, match="another model"):
            store.load(cache, "g", 4)
