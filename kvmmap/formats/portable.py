"""The portable form: what rows must be, and what a cache says of its model, so that several programs go on from it.

Rows are those of a transformers checkpoint: keys after RoPE, in the checkpoint's order, nothing rotated besides. The
metadata's "portable" says which member of a model family made them (docs/format.md, *The portable form*).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xxhash

from ..errors import ModelMismatchError
from ..geometry import LayerGeometry

KEY = "portable"
"""The metadata's key."""

VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberFacts:
    """What any program can tell of a model: the same for a checkpoint, and for each GGUF file made of it."""

    layers: tuple[LayerGeometry, ...]
    """Shapes alone count."""

    rope_theta: float

    norms: tuple[np.ndarray[Any, np.dtype[np.float32]], ...]
    """The weights of each layer's first norm, f32 [hidden_size]; none if they can't be had."""

    def portable_id(self) -> str | None:
        """Return the identity of the model's family member, None if its norms aren't known.

        XXH3 with 128 bits of a line of JSON, {"layers": [[heads, head_dim, value_head_dim], ...], "rope_theta": ...},
        and of the norms' weights as bfloat16, which is what checkpoints of any dtype agree in.
        """
        if not self.norms:
            return None
        shapes = [list(layer.dims) for layer in self.layers]
        digest = xxhash.xxh3_128(json.dumps({"layers": shapes, "rope_theta": self.rope_theta}).encode() + b"\n")
        for norm in self.norms:
            bits = np.ascontiguousarray(norm, "<f4").view("<u4")
            digest.update(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())
        return digest.hexdigest()


def portable_notes(program: str, portable_id: str | None, weights: str) -> dict[str, Any]:
    """Return what the metadata's "portable" holds.

    Args:
        program: what made the rows, such as "llama.cpp".
        portable_id: the model's, by `MemberFacts.portable_id` or given by the user.
        weights: the type of the weights, such as "Q4_1" or "bfloat16".
    """
    return {"version": VERSION, "id": portable_id, "program": program, "weights": weights}


def check_member(metadata: Mapping[str, Any], portable_id: str | None, path: str | None) -> None:
    """Refuse rows of another member of a model family, where both are known.

    Raises:
        ModelMismatchError: they differ.
    """
    notes = metadata.get(KEY)
    known = notes.get("id") if isinstance(notes, Mapping) else None
    if known is not None and portable_id is not None and known != portable_id:
        raise ModelMismatchError(
            f"{path or 'the cache'} was made by another model: its portable id was {known} and is {portable_id}. "
            "Keys and "
            "values mean nothing to any but the model that made them",
            expected={"portable_id": known},
            actual={"portable_id": portable_id},
            path=path,
        )
