"""Which segment goes when room is needed: the one that is worth least. Pure.

What was used lately is likely to be used again, so the longest unused goes first, unless it is worth more than others:
its last use is then taken to be later than it was, by a part of the span between the first and the last of the leaves'
last uses. That part grows with the number of segments that ever continued it, if they came often enough for the next
one to be expected well within the span: this tells a document that is asked about again and again from a conversation
that was long and is over. It also grows with the seconds of computation that it saves per byte on the disk. Nothing
depends on the present time, so what a dry run says is what happens.

A segment with states loses its old checkpoints first: they are most of its bytes, and rarely needed again.

Only leaves go, since segments that continue another one need it. `benchmarks/bench_library_policy.py` compares this
with the longest unused first, and with what a clairvoyant would do.
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

BRANCH_WEIGHT = 0.8
"""Part of the span that a segment gains which was continued very often; half of it if it was by four segments, and
nothing if it was by two, as an answer that was generated again."""

EXPECTED = 0.3
"""Part of the span, within which the next segment that continues it must be expected: else the bytes are of more use to
others until then."""

WORTH_WEIGHT = 0.0625
"""Part of the span that a segment gains which saves e times as many seconds per byte as another."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A segment that goes, or would go, and why."""

    segment: Segment
    reason: str
    """"broken", "expired", "room", or "checkpoints": the segment stays, and loses all but its last checkpoint."""
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
    often = max(0.0, 1 - 2 / segment.branches) if segment.branches else 0.0
    if segment.used - segment.created >= EXPECTED * span * segment.branches:
        often = 0.0
    gain = BRANCH_WEIGHT * often + WORTH_WEIGHT * math.log(max(worth(segment), 1e-30))
    return segment.used + span * gain


def next_to_go(leaves: Sequence[Segment]) -> Segment:
    """Return which of some leaves, the longest unused first, goes before the others."""
    some = leaves[:WINDOW]
    span = some[-1].used - some[0].used
    return min(some, key=lambda leaf: (leaf.broken is None, rank(leaf, span), leaf.used, leaf.id))


def loses_checkpoints(segment: Segment) -> bool:
    """True if old checkpoints of a segment go before the segment itself."""
    return segment.broken is None and segment.spare_bytes > 0


def choose(
    leaves: Sequence[Segment],
    need: int,
    now: float,
    may_go: Callable[[Segment], bool],
    parent_of: Callable[[Segment], Segment | None],
) -> list[Choice]:
    """Return what goes to make room: leaves, and then parents whose children have all gone; of each its old
    checkpoints first.

    Args:
        leaves: all leaves that are not pinned.
        need: bytes to make room for.
        now: seconds since 1970.
        may_go: says whether a segment may go; not while a writer has it open.
        parent_of: returns a segment's parent.
    """
    waiting = sorted(leaves, key=_age)
    going: list[Choice] = []
    left: dict[int, int] = {}
    thinner: set[int] = set()
    while waiting and need > 0:
        segment = next_to_go(waiting)
        waiting.remove(segment)
        if not may_go(segment):
            continue
        if loses_checkpoints(segment) and segment.id not in thinner:
            thinner.add(segment.id)
            going.append(explain(segment, "checkpoints", now))
            need -= segment.spare_bytes
            bisect.insort(waiting, segment, key=_age)
            continue
        going.append(explain(segment, "broken" if segment.broken else "room", now))
        need -= segment.bytes - (segment.spare_bytes if segment.id in thinner else 0)
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
    uses = f"was continued by {segment.branches} segment{'s' if segment.branches != 1 else ''}"
    why = {
        "broken": f"is of no use: {segment.broken}",
        "expired": f"was not used for {age:,.0f} s, and is kept for {segment.ttl or 0:,.0f}",
        "room": f"worth least: was last used {age:,.0f} s ago, saves {per_gib:.3g} s of computation per GiB, {uses}",
        "checkpoints": f"keeps its last checkpoint; older ones go, {segment.spare_bytes:,} bytes: it was last used "
        f"{age:,.0f} s ago, saves {per_gib:.3g} s of computation per GiB, {uses}",
    }[reason]
    return Choice(
        segment=segment,
        reason=reason,
        worth=per_gib,
        age=age,
        explanation=f"{segment.name} ({segment.positions:,} positions, {segment.bytes:,} bytes) {why}",
    )
