"""Tokens as text, piece by piece: only whole characters, and nothing of a stop text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers.decoders import DecodeStream


class Text:
    """The text of an answer as it grows.

    Args:
        tokenizer: of transformers, a fast one.
        stops: texts at which it ends; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._stops = stops
        self._held = ""
        self.stopped = False
        """True once a stop text was found."""

    def add(self, token: int) -> str:
        """Add a token; return what is certain to be part of the text now, maybe nothing."""
        if self.stopped:
            return ""
        self._held += self._stream.step(self._backend, token) or ""
        where = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if where:
            self.stopped = True
            return self._take(min(where))
        # The longest end of it that a stop text may begin with waits for the next token.
        longest = max(
            (size for stop in self._stops for size in range(1, len(stop)) if self._held.endswith(stop[:size])),
            default=0,
        )
        return self._take(len(self._held) - longest)

    def end(self) -> str:
        """Return what is left when no more tokens come. Bytes that are no whole character are dropped."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, size: int) -> str:
        taken, self._held = self._held[:size], self._held[size:]
        return taken
