"""The facts that `inspect` shows about a cache's states and checkpoints, and how those of two caches differ."""

from __future__ import annotations

from dataclasses import dataclass

from ..cache import QuantizedKvCache


@dataclass(frozen=True, slots=True, kw_only=True)
class StateReport:
    """One state tensor."""

    layer: int
    """The layer that it belongs to."""

    name: str
    """Its name within the layer."""

    dtype: str
    """Such as "float32"."""

    shape: tuple[int, ...]
    """Its axes."""

    bytes: int
    """Bytes of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointReport:
    """One checkpoint."""

    position: int
    """Positions that its states have seen."""

    pinned: bool
    """True if it is not replaced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatesReport:
    """The states of a cache, and their checkpoints."""

    tensors: tuple[StateReport, ...]
    """In the order in which they are stored."""

    checkpoint_bytes: int
    """Bytes of one checkpoint's tensors."""

    checkpoint_slots: int
    """Checkpoints that are kept."""

    checkpoints: tuple[CheckpointReport, ...]
    """By ascending position."""

    rows_beyond_checkpoint: int
    """Positions that have rows, and are not shown because no checkpoint has their states."""


def inspect_states(cache: QuantizedKvCache) -> StatesReport | None:
    """Report on the states of an open cache; None if it has none."""
    if not cache.states:
        return None
    return StatesReport(
        tensors=tuple(
            StateReport(layer=spec.layer, name=spec.name, dtype=spec.dtype, shape=spec.shape, bytes=spec.nbytes)
            for spec in cache.states
        ),
        checkpoint_bytes=cache.checkpoint_bytes,
        checkpoint_slots=cache.checkpoint_slots,
        checkpoints=tuple(
            CheckpointReport(position=found.position, pinned=found.pinned) for found in cache.checkpoints
        ),
        rows_beyond_checkpoint=cache.rows_beyond_checkpoint,
    )


def first_different_checkpoint(a: QuantizedKvCache, b: QuantizedKvCache) -> int | None:
    """Return the first position at which both have a checkpoint, with other states; None if there is none."""
    mine, others = (cache.storage.checkpoints for cache in (a, b))
    both = {found.position for found in a.checkpoints} & {found.position for found in b.checkpoints}
    return next((position for position in sorted(both) if mine.digests(position) != others.digests(position)), None)
