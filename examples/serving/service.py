"""What a process answers with: the model, its tokenizer, the library, and the engine that runs them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from models import load

import kvmmap

from .activity import Activity, Record, recent
from .answer import Answer, Choice
from .engine import Engine, Job
from .errors import ApiError
from .requests import ChatRequest, CompletionRequest, Sampling
from .settings import Settings
from .text import Text
from .tree import Tree


@dataclass(frozen=True, slots=True)
class Prepared:
    """An answer that can begin."""

    answer: Answer
    text: Text
    tokens: int
    """Tokens of the prompt."""


class Service:
    """Everything that requests need; it loads the model.

    Args:
        settings: the server's options.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.started = int(time.time())
        torch.set_num_threads(settings.threads)
        self._model, self._tokenizer = load(settings.model)
        made_for = self._model.config.get_text_config().max_position_embeddings
        self.context = min(made_for, settings.context or made_for)
        self._vocabulary = self._model.get_input_embeddings().weight.shape[0]
        ends = self._model.generation_config.eos_token_id
        self._ends = frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])
        self._library = kvmmap.Library(settings.library, settings.max_bytes, ttl=settings.ttl, remote=settings.remote)
        if settings.telemetry:
            self._library.instrument()
        self._tree = Tree(self._library, self._tokenizer if settings.show_text else None)
        self._engine = Engine(settings.parallel, settings.waiting, Activity(settings.activity))

    def close(self) -> None:
        """End what is being answered, and close the library."""
        self._engine.close()
        self._library.close()

    def status(self) -> dict[str, Any]:
        """Return what the page shows."""
        return {"model": self.settings.name, "requests": recent(self.settings.activity), **self._tree.now()}

    def chat(self, body: ChatRequest) -> Prepared:
        """Prepare the answer to a conversation.

        Raises:
            ApiError: it can't be answered.
        """
        if self._tokenizer.chat_template is None:
            raise ApiError(400, f"{self.settings.name} has no chat template: use /v1/completions", param="model")
        messages = [message.plain() for message in body.messages]
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates raise what they like where roles don't alternate as they want it
            raise ApiError(400, f"the chat template refuses these messages: {error}", param="messages") from error
        return self._prepare(body, self._tokenizer(text, add_special_tokens=False).input_ids, "messages")

    def complete(self, body: CompletionRequest) -> Prepared:
        """Prepare the continuation of a text, or of token ids.

        Raises:
            ApiError: it can't be continued.
        """
        prompt = body.one_prompt
        ids = self._tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt
        return self._prepare(body, ids, "prompt")

    def _prepare(self, body: Sampling, ids: Sequence[int], param: str) -> Prepared:
        self.check_model(body.model)
        if not ids:
            raise ApiError(400, "the prompt has no tokens", param=param)
        outside = [token for token in [*ids, *(body.logit_bias or {})] if token >= self._vocabulary]
        if outside:
            raise ApiError(400, f"token {outside[0]} is outside of the vocabulary of {self._vocabulary}", param=param)
        room = self.context - len(ids)
        if room < (body.limit or 1):
            wanted = f" and {body.limit} to answer with" if body.limit else ""
            raise ApiError(
                400,
                f"the model's context is {self.context} tokens, and the prompt has {len(ids)}{wanted}: shorten it",
                code="context_length_exceeded",
                param=param,
            )
        answer = Answer(
            self._library,
            self._model,
            ids,
            most=body.limit or min(room, self.settings.max_tokens),
            ends=self._ends,
            choice=Choice(
                temperature=1.0 if body.temperature is None else body.temperature,
                top_p=1.0 if body.top_p is None else body.top_p,
                frequency_penalty=body.frequency_penalty or 0.0,
                presence_penalty=body.presence_penalty or 0.0,
                bias=body.logit_bias or {},
                seed=body.seed,
            ),
        )
        return Prepared(answer, Text(self._tokenizer, body.stops), len(ids))

    def begin(self, prepared: Prepared, id: str) -> Job:
        """Begin an answer as soon as a thread is free. Call it in the event loop.

        Raises:
            ApiError: too many wait already.
        """
        return self._engine.submit(prepared.answer, prepared.text, Record(id=id, prompt=prepared.tokens))

    def check_model(self, name: str) -> None:
        """Check that a model is the one that is served.

        Raises:
            ApiError: it is not.
        """
        if name != self.settings.name:
            raise ApiError(
                404,
                f"the model {name!r} is not served here: {self.settings.name!r} is",
                code="model_not_found",
                param="model",
            )

    def models(self) -> list[dict[str, Any]]:
        """Return the models that are served: this one."""
        owner = {"object": "model", "created": self.started, "owned_by": "kvmmap"}
        return [{"id": self.settings.name, **owner}]
