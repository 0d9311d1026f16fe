"""Which segment goes when room is needed: the one that is worth least. Pure.

A segment is worth the seconds of computation that it saves per byte on the disk, times how often it was used, and less
the longer it was not used: by half for every `HALF_LIFE` of the time since the oldest leaf was used. Only leaves go,
since segments that continue another one need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .segment import Segment

WINDOW = 256
"""Leaves, the longest unused ones, among which the one that is worth least is looked for. What was used more recently
than all of these stays, whatever it is worth: it is likely to be used again soon."""

SECONDS_UNMEASURED = 1e-3
"""Time to compute a position where none was measured."""

WEIGHT = 0.125
"""Weight of worth against age: a segment worth e times as much is taken for younger by this part of the ages' range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A segment that goes, or would go, and why."""

    segment: Segment
    reason: str
    """"broken", "expired" or "room"."""
    worth: float
    """Seconds of computation that a use of it saves, per GiB."""
    age: float
    """Seconds since its last use."""
    explanation: str
    """The same in a sentence."""


def worth(segment: Segment) -> float:
    """Return the seconds of computation that a use of a segment saves, per byte on the disk."""
    seconds = segment.seconds or segment.positions * SECONDS_UNMEASURED
    return seconds / max(segment.bytes, 1)


def rank(segment: Segment, now: float, oldest: float) -> float:
    """Return a number that is less, the sooner a segment goes.

    Args:
        segment: a leaf.
        now: seconds since 1970.
        oldest: age of the oldest leaf, in seconds.
    """
    age = max(0.0, now - segment.used)
    value = worth(segment) * math.sqrt(1 + segment.hits)
    return WEIGHT * math.log(max(value, 1e-30)) - age / max(oldest, 1e-9)


def order(leaves: Sequence[Segment], now: float) -> list[Segment]:
    """Return leaves in the order in which they go."""
    oldest = max((now - leaf.used for leaf in leaves), default=0.0)
    return sorted(leaves, key=lambda leaf: (leaf.broken is None, rank(leaf, now, oldest), leaf.used, leaf.id))


def choose(
    leaves: Sequence[Segment],
    need: int,
    now: float,
    may_go: Callable[[Segment], bool],
    parent_of: Callable[[Segment], Segment | None],
) -> list[Choice]:
    """Return what goes to make room: leaves, and then parents whose children have all gone.

    Args:
        leaves: the longest unused leaves.
        need: bytes to make room for.
        now: seconds since 1970.
        may_go: says whether a segment may go; not if somebody writes it.
        parent_of: returns a segment's parent.
    """
    waiting, going, found = list(leaves), [], 0
    left: dict[int, int] = {}
    while waiting and found < need:
        segment = order(waiting, now)[0]
        waiting.remove(segment)
        if not may_go(segment):
            continue
        going.append(explain(segment, "broken" if segment.broken else "room", now))
        found += segment.bytes
        parent = parent_of(segment)
        if parent is not None:
            left[parent.id] = left.get(parent.id, parent.children) - 1
            if not left[parent.id] and not parent.pinned:
                waiting.append(parent)
    return going


def explain(segment: Segment, reason: str, now: float) -> Choice:
    """Return a choice with its explanation."""
    age = max(0.0, now - segment.used)
    per_gib = worth(segment) * 2**30
    uses = f"used {segment.hits} time{'s' if segment.hits != 1 else ''}"
    why = {
        "broken": f"is of no use: {segment.broken}",
        "expired": f"was not used for {age:,.0f} s, and is kept for {segment.ttl or 0:,.0f}",
        "room": f"worth least: saves {per_gib:.3g} s of computation per GiB, {uses}, last {age:,.0f} s ago",
    }[reason]
    return Choice(
        segment=segment,
        reason=reason,
        worth=per_gib,
        age=age,
        explanation=f"{segment.name} ({segment.positions:,} positions, {segment.bytes:,} bytes) {why}",
    )
