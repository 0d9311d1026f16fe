"""Every family that the installed transformers knows is right through a KvmmapCache, or refused by name.

A few families are tried here; with KVMMAP_FAMILIES=all, every one. What comes of each is compared with the record, so
that a family that works by now, or is refused for another reason, shows as well: `python -m families` in tests/ writes
the record, and the table of it in docs/transformers.md.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from helpers.support import some, sweep

from families import outcomes
from families.configs import SEQUENCES, encoder_decoders, types
from families.trial import trial

pytestmark = pytest.mark.torch

FEW = [
    "cpmant",  # refused: positions of its own
    "florence2",  # encoder-decoder
    "falcon",  # multi-query; takes no other attention
    "gemma4_text",  # shared layers, windows of two kinds
    "jamba",  # states; takes one token a pass after the first
    "llama4_text",  # chunks
    *sweep(
        "mimo_v2_flash",  # heads differ by layer
        "qwen2_5_vl",  # M-RoPE
        "deepseek_v3",  # latents
        "gemma3_text",  # windows of two kinds
        "git",  # attends itself
        "gpt2",
        "gpt_oss",  # sinks
        "jetmoe",  # uses keys before it attends
        "lfm2",  # states of convolutions
        "llama",
        "idefics",  # attends to an image, whose encoder's output it is given in later passes
        "mamba",  # states alone
        "mllama",  # layers that attend to an image alone
        "mistral_large4",  # index keys, also without keys and values
        "mpt",  # attends itself, and takes "kvmmap" only at first
        "qwen2_moe",  # masks of two kinds, layers of one
        "xlnet",  # refused: takes no cache
    ),
]
"""One family of each kind."""

LEAST = {"5.20": 0.95, "5.23": 0.95, "5.24": 0.95}
"""The share of types that are supported at least, of those that can be built and generate with a cache, by release."""

ALL = os.environ.get("KVMMAP_FAMILIES") == "all"
RECORD = outcomes.load()

torch.set_num_threads(1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", types() if ALL else FEW)
def test_a_family_is_right_or_refused_as_recorded(tmp_path: Path, kind: str) -> None:
    if kind not in types():
        pytest.skip(f"transformers {outcomes.RELEASE} has no {kind}")
    with torch.no_grad():
        found = trial(kind, tmp_path).plain()
    if outcomes.RELEASE in RECORD:
        assert found == RECORD[outcomes.RELEASE][kind]


REFUSED = frozenset([SEQUENCES + "fsmt", SEQUENCES + "prophetnet"])
"""Encoder-decoders of other auto classes that are refused by name."""

UNTESTED = frozenset(SEQUENCES + kind for kind in ("canary", "cohere_asr", "dia", "moonshine_streaming", "pop2piano"))
"""Those of which no small model is made here that generates."""


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", some(sorted({*encoder_decoders()} - UNTESTED), 50))
def test_encoder_decoders_of_other_auto_classes_are_right_or_refused(tmp_path: Path, kind: str) -> None:
    with torch.no_grad():
        found = trial(kind, tmp_path)
    assert found.supported == (kind not in REFUSED), found.why


@pytest.mark.skipif(outcomes.RELEASE not in RECORD, reason="this release of transformers has no record")
def test_the_record_has_every_family() -> None:
    assert sorted(RECORD[outcomes.RELEASE]) == types()


def test_the_page_shows_the_record() -> None:
    page = outcomes.PAGE.read_text()
    assert outcomes.table(RECORD) in page.split(outcomes.BEGIN)[1].split(outcomes.END)[0]


def test_few_families_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for release, families in RECORD.items():
        supported, total = outcomes.counted(families)
        with capsys.disabled():
            print(f"\ntransformers {release}: {supported} of {total} types are supported, {supported / total:.1%}")
        assert supported / total >= LEAST[release], release


def test_most_families_are_tested_and_every_reason_is_given() -> None:
    for release, families in RECORD.items():
        untested = [kind for kind, outcome in families.items() if outcome.get("why", "").startswith("not ")]
        assert len(untested) < 0.05 * len(families), (release, untested)
        assert all(outcome["in_place"] or outcome["why"] for outcome in families.values())
