"""What keys and values depend on besides the token ids: one namespace a combination of weights, config and codecs.

Segments of another namespace never match. Pure: what a model's facts are is the integration's business.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

from ..cache_reader import CacheReader
from ..errors import MetadataError
from ..geometry import CacheGeometry, LayerGeometry
from ..metadata import Document, ModelInfo
from ..state_spec import CHECKPOINT_SLOTS, StateSpec

NOTES = "library"
"""Key in a segment's metadata under which is what the library records."""


@dataclass(frozen=True, kw_only=True)
class Namespace:
    """Everything that changes keys and values: only caches of an equal namespace match.

    Weights are compared by `model.fingerprint`, or by `model.name` and `model.revision` where no fingerprint is known.
    """

    layers: tuple[LayerGeometry, ...]
    """Heads, dims and codecs of each layer."""

    model: ModelInfo = field(default_factory=ModelInfo)
    """The model: the fingerprint of its weights, its RoPE facts, the dtype of computation."""

    facts: Mapping[str, Any] = field(default_factory=dict)
    """Everything else that changes keys and values, as plain JSON: config, windows, adapters and their scale."""

    recent_window: int = 0
    """Last positions that are kept in 16 bits besides."""

    sinks: int = 0
    """First positions that are kept in 16 bits besides."""

    states: tuple[StateSpec, ...] = ()
    """States of fixed size that layers keep beside their rows: then only checkpoints can be restored."""

    checkpoint_slots: int = CHECKPOINT_SLOTS
    """Checkpoints that a segment keeps; it makes no difference to what matches."""

    salt: str | None = None
    """A tenant's secret: equal prompts of other tenants don't match. Only a digest of it is stored."""

    @classmethod
    def build(
        cls,
        *,
        num_layers: int,
        num_kv_heads: int | Sequence[int],
        head_dim: int | Sequence[int],
        value_head_dim: int | Sequence[int] | None = None,
        key_codec: str | Sequence[str] = "int8",
        value_codec: str | Sequence[str] = "int8",
        recent_window: int = 0,
        sinks: int = 0,
        states: Iterable[StateSpec] = (),
        checkpoint_slots: int = CHECKPOINT_SLOTS,
        model: ModelInfo | None = None,
        facts: Mapping[str, Any] | None = None,
        salt: str | None = None,
    ) -> Self:
        """Make a namespace of the shapes that `kvmmap.create` takes.

        Raises:
            ShapeMismatchError, DtypeError: as in `kvmmap.create`.
        """
        geometry = CacheGeometry.build(
            num_layers=num_layers,
            capacity=0,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            value_head_dim=value_head_dim,
            key_codec=key_codec,
            value_codec=value_codec,
            recent_window=recent_window,
            sinks=sinks,
            states=states,
            checkpoint_slots=checkpoint_slots,
        )
        return cls._of_geometry(geometry, model, facts, salt)

    @classmethod
    def of(cls, cache: CacheReader, *, facts: Mapping[str, Any] | None = None, salt: str | None = None) -> Self:
        """Make the namespace of a cache: its shapes, codecs and model, and facts that the cache does not record.

        Raises:
            ClosedError: the cache is closed.
        """
        return cls._of_geometry(cache.geometry, cache.model, facts, salt)

    @classmethod
    def _of_geometry(
        cls, geometry: CacheGeometry, model: ModelInfo | None, facts: Mapping[str, Any] | None, salt: str | None
    ) -> Self:
        return cls(
            layers=geometry.layers,
            model=model or ModelInfo(),
            facts=facts or {},
            recent_window=geometry.recent_window,
            sinks=geometry.sinks,
            states=geometry.states,
            checkpoint_slots=geometry.checkpoint_slots,
            salt=salt,
        )

    @cached_property
    def document(self) -> dict[str, Any]:
        """What is digested, as plain JSON. It does not contain the salt.

        Raises:
            MetadataError: the facts are no plain JSON, or the salt is no text.
        """
        model = self.model
        if not isinstance(self.facts, Mapping):
            raise MetadataError(f"the facts of a namespace are a mapping, not a {type(self.facts).__name__}")
        weights = {"fingerprint": model.fingerprint}
        if model.fingerprint is None:
            weights = {"name": model.name, "revision": model.revision}
        document: dict[str, Any] = {
            "weights": weights,
            "source_dtype": model.source_dtype,
            "rope": dict(model.rope),
            "facts": dict(self.facts),
            "layers": [
                [layer.num_kv_heads, layer.head_dim, layer.value_head_dim, layer.key_codec.name, layer.value_codec.name]
                for layer in self.layers
            ],
            "salt": None if self.salt is None else _digest_of_salt(self.salt),
        }
        if self.recent_window or self.sinks:
            document["recent"] = [self.recent_window, self.sinks]
        if self.states:
            document["states"] = [[state.layer, state.name, state.dtype, list(state.shape)] for state in self.states]
        Document(None, document).encode()
        return document

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits that differ between namespaces.

        Raises:
            MetadataError: the facts are no plain JSON.
        """
        return digest_of(self.document)

    @property
    def seed(self) -> bytes:
        """What the hashes of this namespace's prefixes begin with."""
        return bytes.fromhex(self.digest)

    @property
    def folder(self) -> str:
        """Name of the folder of its segments: the model's name, as far as a file name can have it, and the digest."""
        name = (self.model.name or "model").rstrip("/").rpartition("/")[2]
        return f"{re.sub('[^A-Za-z0-9._-]+', '-', name).strip('.-')[:64] or 'model'}-{self.digest[:16]}"

    @property
    def position_bytes(self) -> int:
        """Bytes of one position in all layers, with its token id."""
        return sum(layer.position_bytes for layer in self.layers) + 4

    @property
    def fixed_bytes(self) -> int:
        """Bytes that a segment takes at most besides its positions: its records, and a page for each array."""
        pages = sum(len(layer.slabs) + 1 for layer in self.layers) + 8
        geometry = CacheGeometry.build(**self.shape(0))
        return 4096 * pages + geometry.recent_bytes + geometry.checkpoint_slots * geometry.checkpoint_bytes

    def shape(self, capacity: int) -> dict[str, Any]:
        """Return the arguments of `kvmmap.create` that give a cache these layers."""
        slots = {"checkpoint_slots": self.checkpoint_slots} if self.states else {}
        return slots | {
            "num_layers": len(self.layers),
            "capacity": capacity,
            "recent_window": self.recent_window,
            "sinks": self.sinks,
            "states": self.states,
            "num_kv_heads": [layer.num_kv_heads for layer in self.layers],
            "head_dim": [layer.head_dim for layer in self.layers],
            "value_head_dim": [layer.value_head_dim for layer in self.layers],
            "key_codec": [layer.key_codec.name for layer in self.layers],
            "value_codec": [layer.value_codec.name for layer in self.layers],
        }


def check_digest(digest: Any) -> str:
    """Return the digest of a namespace as it was given.

    Raises:
        MetadataError: it is none.
    """
    if isinstance(digest, str) and re.fullmatch("[0-9a-f]{32}", digest):
        return digest
    raise MetadataError(f"give a Namespace, or the digest of one, 32 hexadecimal digits, not {digest!r}", actual=digest)


def digest_of(document: Mapping[str, Any]) -> str:
    """Return the digest of a namespace's document.

    Raises:
        MetadataError: it is no plain JSON.
    """
    try:
        text = json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        raise MetadataError(f"the facts of a namespace must be plain JSON: {error}") from error
    return _digest(text.encode())


def _digest_of_salt(salt: Any) -> str:
    try:
        if not isinstance(salt, str):
            raise TypeError(f"not a {type(salt).__name__}")
        return _digest(f"kvmmap salt\0{salt}".encode())
    except (TypeError, UnicodeEncodeError) as error:
        raise MetadataError(f"a salt is text that can be encoded as UTF-8: {error}") from None


def _digest(data: bytes) -> str:
    import hashlib  # it takes long to load

    # A cryptographic one: a caller who chooses facts or salts must not be able to reach another namespace.
    return hashlib.blake2b(data, digest_size=16).hexdigest()
