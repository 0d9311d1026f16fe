"""What a group's root says of states and their checkpoints, as JSON. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ...format import num_slots
from ...geometry import CacheGeometry
from ...state_spec import StateSpec


class GroupCheckpoint(NamedTuple):
    """What a checkpoint slot holds."""

    position: int
    """Positions that its states have seen."""
    pinned: bool
    digests: tuple[int, ...]
    """xxh3_64 of each tensor, in the order of the states."""


def encode_states(geometry: CacheGeometry, checkpoints: Sequence[GroupCheckpoint | None]) -> dict[str, Any]:
    """Return the root's facts on states; none where there are none."""
    if not geometry.states:
        return {}
    return {
        "states": [[spec.layer, spec.name, spec.dtype, list(spec.shape)] for spec in geometry.states],
        "checkpoint_slots": geometry.checkpoint_slots,
        "checkpoints": [_encode(found) for found in checkpoints],
    }


def _encode(found: GroupCheckpoint | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "position": found.position,
        "pinned": found.pinned,
        "digests": [f"{digest:016x}" for digest in found.digests],
    }


def decode_states(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `CacheGeometry` that the facts on states give.

    Raises:
        KeyError, TypeError, ValueError, KvmmapError: they make no sense.
    """
    if "states" not in facts:
        return {}
    states = tuple(StateSpec(layer, name, dtype, tuple(shape)) for layer, name, dtype, shape in facts["states"])
    return {"states": states, "checkpoint_slots": facts["checkpoint_slots"]}


def decode_checkpoints(facts: dict[str, Any], geometry: CacheGeometry) -> tuple[GroupCheckpoint | None, ...]:
    """Return the checkpoints of the facts; raises as `decode_states`."""
    found = tuple(_decode(entry, len(geometry.states)) for entry in facts.get("checkpoints", ()))
    if len(found) != num_slots(geometry):
        raise ValueError(f"there are {len(found)} checkpoint slots for {num_slots(geometry)}")
    return found


def _decode(entry: dict[str, Any] | None, num_states: int) -> GroupCheckpoint | None:
    if entry is None:
        return None
    position, pinned, digests = entry["position"], entry["pinned"], entry["digests"]
    if type(position) is not int or position < 0 or type(pinned) is not bool or len(digests) != num_states:
        raise ValueError("a checkpoint makes no sense")
    return GroupCheckpoint(position, pinned, tuple(int(digest, 16) for digest in digests))
