"""Rotary embeddings whose frequencies depend on the length of the sequence: which stored keys are valid in which.

With RoPE of the types "dynamic" and "longrope", transformers rotates the keys of a pass by frequencies that depend on
how long the sequence is by then. A key that was rotated by others than those of a new pass is not what prefilling would
give. So each position has a *regime*: 0 for the frequencies of the original length, else a number that says which
others.

Knows configs and rotary modules; nothing of caches and files.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .models import text_config

MIXED = -1
"""The regime of positions of which it is not recorded: valid in no sequence."""

_MOST_RUNS = 64  # regimes that are recorded: with "dynamic" each further token of a long sequence has its own


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthDependence:
    """How a model's frequencies depend on the length."""

    dynamic: bool
    """True if they change with each length beyond the original one, False if they change once."""

    original: int
    """The length up to which they are the original ones."""

    def regime(self, length: int, longest: int | None = None) -> int:
        """Return the regime of a pass.

        Args:
            length: of the sequence, with the new tokens.
            longest: the length that the model's rotary module has frequencies for before the pass.
        """
        if not self.dynamic:
            return int(length > self.original)
        longest = self.original if longest is None else longest
        if length > longest:
            longest = length
        elif length < self.original:
            longest = self.original
        return longest if longest > self.original else 0


def length_dependence(config: Any) -> LengthDependence | None:
    """Return how a model's frequencies depend on the length, None if they don't."""
    config = text_config(config)
    for settings in _settings(getattr(config, "rope_parameters", None) or {}):
        kind = str(settings.get("rope_type") or settings.get("type"))
        made_for = getattr(config, "max_position_embeddings", None)
        if "dynamic" in kind and isinstance(made_for, int):
            return LengthDependence(dynamic=True, original=made_for)
        if kind == "longrope":
            original = settings.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None) or made_for
            return LengthDependence(dynamic=False, original=int(original or 0))
    return None


def _settings(parameters: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """RoPE settings: one for all layers, or one for each kind of layers."""
    yield parameters
    yield from (value for value in parameters.values() if isinstance(value, Mapping))


def longest_of(model: Any) -> int | None:
    """Return the length that a model's rotary modules have frequencies for, None if it is not known."""
    if not isinstance(model, torch.nn.Module):
        return None
    found = [
        int(value)
        for module in model.modules()
        if hasattr(module, "max_seq_len_cached")
        for name, value in vars(module).items()
        if name.endswith("max_seq_len_cached")
    ]
    return max(found, default=None)


def extended(runs: Sequence[Sequence[int]], start: int, regime: int) -> list[list[int]]:
    """Return runs of positions with one regime, [first position, regime], with those from `start` on in a new one."""
    kept = cut(runs, start)
    if not kept or kept[-1][1] != regime:
        kept.append([start, regime if len(kept) < _MOST_RUNS else MIXED])
    return kept


def cut(runs: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Return the runs of the first `length` positions."""
    return [[start, regime] for start, regime in runs if start < length]


def valid(runs: Sequence[Sequence[int]], length: int, regime: int) -> int:
    """Return how many of `length` positions, from the first on, have a regime."""
    return next((start for start, found in runs if found != regime), length)
