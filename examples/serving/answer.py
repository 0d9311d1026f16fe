"""The answer to one prompt: a session of the library, and the model's steps in it, a token each.

Knows nothing of HTTP, of threads, or of text.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

import kvmmap
from kvmmap.integrations.transformers import KvmmapCache, open_session

CHUNK = 256
"""Tokens of a prompt that are computed between two looks at whether the answer is still wanted."""

LEAST_SHARED = 256
"""Computed tokens of a prompt from which on others may reuse them before the answer is complete."""

log = logging.getLogger("uvicorn.error")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How a token is chosen."""

    temperature: float = 1.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None


class Answer:
    """Tokens that a model answers a prompt with.

    Args:
        library: where what was computed before is, and where this goes.
        model: a causal model of transformers.
        prompt: its token ids, at least one.
        most: tokens of the answer, at most.
        ends: tokens that end it.
        choice: how tokens are chosen.
    """

    def __init__(
        self,
        library: kvmmap.Library,
        model: Any,
        prompt: Sequence[int],
        *,
        most: int,
        ends: frozenset[int],
        choice: Choice,
    ) -> None:
        self._library = library
        self._model = model
        self._ids = list(prompt)
        self._start = len(prompt)
        self._most = most
        self._ends = ends
        self._choice = choice
        self._random = torch.Generator()
        if choice.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(choice.seed % 2**63)
        self.reused: int | None = None
        """Tokens of the prompt that the library had; None until that is known."""
        self.stored = True
        """False if the library had no room, so that all was computed in memory."""

    @property
    def tokens(self) -> list[int]:
        """What was answered so far."""
        return self._ids[self._start :]

    def steps(self, wanted: Callable[[], bool]) -> Iterator[int]:
        """Yield tokens until one ends the answer, or it is long enough, or nobody wants it any more.

        Whatever ends it, what was computed is part of the library afterwards. A library that is full, or fails, costs
        no answer: then the rest is computed in memory.
        """
        try:
            with open_session(self._library, self._model, self._ids) as cache:
                self.reused = cache.reused
                yield from self._generate(cache, cache.reused, wanted)
            return
        except (kvmmap.KvmmapError, OSError) as error:
            log.warning("computing without the library: %s", error)
        self.reused, self.stored = 0, False
        if self.complete:
            return  # it was closing that failed
        with KvmmapCache(self._model) as cache:
            yield from self._generate(cache, 0, wanted)

    @property
    def ended(self) -> bool:
        """True if its last token is one that ends an answer."""
        return len(self._ids) > self._start and self._ids[-1] in self._ends

    @property
    def complete(self) -> bool:
        """True if no more tokens come."""
        return self.ended or len(self._ids) - self._start >= self._most

    def _generate(self, cache: KvmmapCache, known: int, wanted: Callable[[], bool]) -> Iterator[int]:
        share = self.stored and self._start - known >= LEAST_SHARED
        while not self.complete:
            for start in range(known, len(self._ids), CHUNK):
                if not wanted():
                    return
                logits = self._forward(cache, self._ids[start : start + CHUNK])
            if share:
                cache.flush()
                share = False
            known = len(self._ids)
            self._ids.append(self._choose(logits))
            yield self._ids[-1]

    @torch.inference_mode()
    def _forward(self, cache: KvmmapCache, ids: Sequence[int]) -> torch.Tensor:
        """Compute the next tokens' keys and values; return the logits after the last one, [vocabulary]."""
        tokens = torch.tensor([ids], device=self._model.device)
        found = self._model(tokens, **cache.argument, use_cache=True, logits_to_keep=1).logits
        return found[0, -1].float().cpu()

    @torch.inference_mode()
    def _choose(self, logits: torch.Tensor) -> int:
        choice = self._choice
        for token, bias in choice.bias.items():
            logits[token] += bias
        if self.tokens and (choice.frequency_penalty or choice.presence_penalty):
            counts = torch.bincount(torch.tensor(self.tokens), minlength=len(logits))
            logits -= choice.frequency_penalty * counts + choice.presence_penalty * (counts > 0)
        if choice.temperature == 0:
            return int(logits.argmax())
        shares = (logits / choice.temperature).softmax(0)
        if choice.top_p < 1:
            sorted_shares, order = shares.sort(descending=True)
            # The most likely one always stays: before it is nothing.
            before = sorted_shares.cumsum(0) - sorted_shares
            shares[order[before >= choice.top_p]] = 0
        return int(torch.multinomial(shares, 1, generator=self._random))
