"""The examples run unchanged, on a random model and a byte tokenizer."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_models import save_llama

import kvmmap

pytestmark = [pytest.mark.torch, pytest.mark.long]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its tokenizer as transformers saves them."""
    folder = tmp_path_factory.mktemp("model")
    save_llama(folder)
    return folder


def run(script: str, *arguments: object) -> str:
    """Return the output of an example."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_conversation_continues_in_another_process(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.kvm"
    first = run("conversation.py", "Hello there", "--model", folder, "--file", file, "--tokens", 8)
    assert re.search(r"\[0 of \d+ tokens were there, 8 generated", first)
    with kvmmap.open(file) as cache:
        known = cache.seq_len
        assert [message["role"] for message in cache.metadata["messages"]] == ["user", "assistant"]
    second = run("conversation.py", "And then?", "--model", folder, "--file", file, "--tokens", 8)
    found = re.search(r"\[(\d+) of (\d+) tokens were there, 8 generated", second)
    assert found is not None
    assert 27 <= int(found[1]) <= known  # the first prompt at least: what was answered may be written otherwise
    with kvmmap.open(file) as cache:
        assert cache.seq_len == int(found[2]) + 7
        assert len(cache.metadata["messages"]) == 4
        assert cache.verify().sound


def test_many_processes_reuse_one_prefilled_document(folder: Path, tmp_path: Path) -> None:
    document = tmp_path / "text.txt"
    document.write_text("A cache is a place to hide things in. " * 20)
    questions = ["What is it?", "Where?", "Why?"]
    printed = run("document.py", document, *questions, "--model", folder, "--tokens", 6, "--save")
    prefilled = re.search(r"\[(\d+) tokens prefilled", printed)
    assert prefilled is not None
    reused = re.findall(r"\[(\d+) of (\d+) tokens were there", printed)
    length = len(document.read_text()) + len("\n\nQuestion: ")
    assert [int(count) for count, _ in reused] == [length] * 3
    for number, (_, total) in enumerate(reused):
        with kvmmap.open(tmp_path / f"text.{number}.kvm") as cache:
            assert cache.seq_len == int(total) + 5
            assert cache.verify().sound
