"""Which segment goes when room is needed: the one that is worth least. Pure.

A segment is worth the seconds of computation that it saves per byte on the disk, times the square root of its uses, and
less the longer it was not used: the logarithm of its worth moves its last use within the span of the last uses of all
leaves. So nothing depends on the present time, and what a dry run says is what happens. Only leaves go, since segments
that continue another one need it.
"""

from __future__ import annotations

import bisect
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
"""Weight of worth against age: a segment worth e times as much is taken for younger by this part of the span."""


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


def rank(segment: Segment, span: float) -> float:
    """Return a number that is less, the sooner a segment goes.

    Args:
        segment: a leaf.
        span: seconds between the first and the last of the leaves' last uses.
    """
    value = worth(segment) * math.sqrt(1 + segment.hits)
    return segment.used + span * WEIGHT * math.log(max(value, 1e-30))


def next_to_go(leaves: Sequence[Segment]) -> Segment:
    """Return which of some leaves, the longest unused first, goes before the others."""
    some = leaves[:WINDOW]
    span = some[-1].used - some[0].used
    return min(some, key=lambda leaf: (leaf.broken is None, rank(leaf, span), leaf.used, leaf.id))


def choose(
    leaves: Sequence[Segment],
    need: int,
    now: float,
    may_go: Callable[[Segment], bool],
    parent_of: Callable[[Segment], Segment | None],
) -> list[Choice]:
    """Return what goes to make room: leaves, and then parents whose children have all gone.

    Args:
        leaves: all leaves that are not pinned.
        need: bytes to make room for.
        now: seconds since 1970.
        may_go: says whether a segment may go; not if somebody writes it.
        parent_of: returns a segment's parent.
    """
    waiting = sorted(leaves, key=_age)
    going: list[Choice] = []
    left: dict[int, int] = {}
    while waiting and need > 0:
        segment = next_to_go(waiting)
        waiting.remove(segment)
        if not may_go(segment):
            continue
        going.append(explain(segment, "broken" if segment.broken else "room", now))
        need -= segment.bytes
        parent = parent_of(segment)
        if parent is not None:
            left[parent.id] = left.get(parent.id, parent.children) - 1
            if not left[parent.id] and not parent.pinned:
                bisect.insort(waiting, parent, key=_age)
    return going


def _age(segment: Segment) -> tuple[float, int]:
    return segment.used, segment.id


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
