"""What may be asked: the bodies of chat and text completions, checked before anything is computed.

A parameter that is known to OpenAI's API and would change the answer, but is not supported, is an error; one that
changes nothing here is accepted and ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import ApiError

Stop = Annotated[str, Field(min_length=1, max_length=200)]
Token = Annotated[int, Field(ge=0, lt=2**31)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Ignored = Any


class StreamOptions(BaseModel):
    """How an answer is streamed."""

    include_usage: bool = False
    include_obfuscation: Ignored = None


class Sampling(BaseModel):
    """What both kinds of requests have in common."""

    model_config = ConfigDict(extra="forbid")

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[Token, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None

    @property
    def stops(self) -> list[str]:
        """Texts at which the answer ends."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, at most."""
        return self.max_tokens


class TextPart(BaseModel):
    """A part of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """Return it as chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(BaseModel):
    """The format of an answer."""

    type: Literal["text"]


class ChatRequest(Sampling):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    response_format: TextFormat | None = None
    logprobs: Literal[False] | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    parallel_tool_calls: Ignored = None
    reasoning_effort: Ignored = None

    @property
    def limit(self) -> int | None:
        """Tokens of the answer, at most."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(Sampling):
    """The body of /v1/completions. The prompt is a text or token ids; a list of one of these is one, too."""

    prompt: str | list[str] | list[Token] | list[list[Token]]
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    logprobs: Literal[0] | None = None
    suffix: Literal[""] | None = None

    @property
    def one_prompt(self) -> str | Sequence[int]:
        """The prompt.

        Raises:
            ApiError: there are several, or none.
        """
        found = self.prompt
        if isinstance(found, list) and found and not isinstance(found[0], int):
            if len(found) > 1:
                raise ApiError(400, "one prompt at a time: send a request for each", param="prompt")
            return found[0]  # type: ignore[return-value]
        return found  # type: ignore[return-value]


Body = TypeVar("Body", bound=Sampling)


def parse(kind: type[Body], data: bytes) -> Body:
    """Return the body of a request.

    Raises:
        ApiError: it is not JSON, or not such a body; says which parameter is at fault.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        # Where a value may have several types, each has its errors: the one that fits it best fails the deepest.
        first = max(error.errors(), key=lambda found: len(found["loc"]))
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['msg']}", code="invalid_json")
    where = [str(part) for part in first["loc"] if isinstance(part, int) or part in _names(kind)]
    param = ".".join(where) or None
    if first["type"] == "extra_forbidden":
        name = str(first["loc"][-1])
        raise ApiError(400, f"unknown or unsupported parameter: {name}", code="unknown_parameter", param=name)
    if first["type"] == "missing":
        name = ".".join(str(part) for part in first["loc"])
        raise ApiError(400, f"missing parameter: {name}", code="missing_required_parameter", param=name)
    raise ApiError(400, f"{param}: {first['msg']}", code="invalid_value", param=param)


def _names(kind: type[BaseModel]) -> set[str]:
    """Names that may stand in a path to a value: pydantic adds those of types, where a value may have several."""
    return {*kind.model_fields, *Message.model_fields, *TextPart.model_fields, *StreamOptions.model_fields}
