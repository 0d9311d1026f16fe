"""What is answered: completions, and the chunks of streamed ones, as OpenAI's API has them."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from .engine import Piece


class Reply:
    """The form of one answer.

    Args:
        chat: True for a chat completion, False for a text completion.
        model: the model's name.
    """

    def __init__(self, chat: bool, model: str) -> None:
        self._chat = chat
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._common = {"id": self.id, "created": int(time.time()), "model": model}

    def whole(self, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the answer as one object."""
        if self._chat:
            kind, content = "chat.completion", {"message": {"role": "assistant", "content": text, "refusal": None}}
        else:
            kind, content = "text_completion", {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self._common, "object": kind, "choices": [choice], "usage": usage}

    def opening(self) -> dict[str, Any] | None:
        """Return the chunk before the first piece: who speaks, in a chat."""
        return self._chunk({"role": "assistant", "content": ""}, None) if self._chat else None

    def chunk(self, piece: Piece) -> dict[str, Any]:
        """Return a piece as a chunk."""
        return self._chunk({"content": piece.text} if piece.text else {}, piece.finish, piece.text)

    def closing(self, usage: dict[str, Any]) -> dict[str, Any]:
        """Return the chunk after the last piece, for those who asked for the usage."""
        return {**self._common, "object": self._kind, "choices": [], "usage": usage}

    @property
    def _kind(self) -> str:
        return "chat.completion.chunk" if self._chat else "text_completion"

    def _chunk(self, delta: dict[str, Any], finish: str | None, text: str = "") -> dict[str, Any]:
        content: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": finish}
        return {**self._common, "object": self._kind, "choices": [choice]}


def usage(prompt: int, cached: int, generated: int) -> dict[str, Any]:
    """Return the counts of tokens: of the prompt, of it those that were not computed, and of the answer."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def event(data: dict[str, Any] | str) -> bytes:
    """Return a server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n".encode()
