"""Metadata of a cache as JSON: the model that made it, and the user's own.

Pure: encodes, decodes and checks. It must not know where the bytes are kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .errors import CorruptCacheError, MetadataError

MAX_METADATA_BYTES = 16 * 2**20
MAX_DEPTH = 100
"""Nesting depth of objects and arrays: copying and printing metadata is recursive."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """Identity of the model that made a cache; compared before a saved cache is used with a model. All optional."""

    name: str | None = None
    """The model's name, such as a hub id."""

    revision: str | None = None
    """The revision of its weights."""

    fingerprint: str | None = None
    """A digest of the config and weights, however the integration computes it."""

    source_dtype: str | None = None
    """The dtype the keys and values had before they were quantised: "float32", "float16" or "bfloat16"."""

    rope: Mapping[str, Any] = field(default_factory=dict)
    """RoPE facts: theta, scaling and the like, plain JSON."""


@dataclass(frozen=True, slots=True)
class Document:
    """The whole of what is stored as metadata."""

    model: ModelInfo | None
    metadata: dict[str, Any]

    def encode(self) -> bytes:
        """Return the document as UTF-8 JSON.

        Raises:
            MetadataError: something in it is not plain JSON (NaN and infinity are not), or it is nested too deep.
        """
        if not isinstance(self.metadata, Mapping):
            raise MetadataError(
                f"metadata must be a dict with str keys, not {type(self.metadata).__name__}",
                expected="dict",
                actual=type(self.metadata).__name__,
            )
        try:
            model = None if self.model is None else asdict(self.model)
            if model is not None:
                _model(model)
            text = json.dumps({"model": model, "metadata": dict(self.metadata)}, allow_nan=False, separators=(",", ":"))
            data = text.encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise MetadataError(f"metadata must be plain JSON: {error}") from error
        # What comes back must be what went in: JSON would turn a key 1 into "1" and a tuple into a list, silently.
        if not _has_str_keys(self.metadata):
            raise MetadataError("metadata keys must all be str: JSON has no other kind")
        if _is_deep(self.metadata) or _is_deep(model):
            raise MetadataError(f"metadata must not be nested more than {MAX_DEPTH} deep")
        if len(data) > MAX_METADATA_BYTES:
            raise MetadataError(f"metadata is {len(data):,} bytes of JSON; the limit is {MAX_METADATA_BYTES:,}")
        return data

    @classmethod
    def decode(cls, data: bytes, path: str | None = None) -> Document:
        """Read what `encode` wrote.

        Raises:
            CorruptCacheError: it is not such a document.
        """
        try:
            raw = json.loads(data, parse_constant=_refuse_constant, parse_float=_finite)
            model, metadata = raw["model"], raw["metadata"]
            if _is_deep(model) or _is_deep(metadata):
                raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
            if model is not None:
                model = _model(model)
            if not isinstance(metadata, dict):
                raise TypeError("metadata is not an object")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CorruptCacheError(f"metadata is not readable: {error}", path=path) from error
        return cls(model, metadata)


def document(metadata: Mapping[str, Any] | None, model: ModelInfo | None) -> Document:
    """Return the document of a user's metadata and model."""
    return Document(model, {} if metadata is None else metadata)  # type: ignore[arg-type]


def copied(value: Any) -> Any:
    """Return a copy of plain JSON that shares no containers with it."""
    if isinstance(value, dict | Mapping):
        return {key: copied(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [copied(inner) for inner in value]
    if isinstance(value, tuple):
        return tuple(map(copied, value))
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text} is not a number that JSON's readers agree on")
    return number


def _model(facts: dict[str, Any]) -> ModelInfo:
    """Take what is known of a model; what a later version has added is left alone."""
    if not isinstance(facts, dict):
        raise TypeError("the model is not a JSON object")
    known = {f.name: facts[f.name] for f in fields(ModelInfo) if f.name in facts}
    for name, value in known.items():
        if not isinstance(value, dict if name == "rope" else str | None):
            raise TypeError(f"the model's {name} is {type(value).__name__}")
    return ModelInfo(**known)


def _is_deep(value: Any, depth: int = 0) -> bool:
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, list | tuple):
        return False
    return depth >= MAX_DEPTH or any(_is_deep(inner, depth + 1) for inner in value)


def _has_str_keys(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _has_str_keys(inner) for key, inner in value.items())
    if isinstance(value, list | tuple):
        return all(_has_str_keys(inner) for inner in value)
    return True
