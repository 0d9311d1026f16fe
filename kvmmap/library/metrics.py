"""A library's counters: sums of this process, and sums of all processes, which are kept in the index."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass

from .matching import Match

COUNTED = (
    *("sessions", "hits", "tokens_reused", "tokens_computed", "seconds_saved", "segments_added", "bytes_added"),
    *("evictions", "bytes_evicted", "segments_fetched", "bytes_fetched", "fetch_failures"),
)
"""Names of what is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryStats:
    """Sizes of a library, and what all processes have counted since it was made."""

    segments: int
    """Segments in the index."""

    bytes: int
    """Their bytes on the disk, and what sessions have reserved."""

    max_bytes: int | None
    """The budget."""

    index_bytes: int
    """Bytes of the index on the disk; they are not part of the budget."""

    sessions: int
    """Sessions opened."""

    hits: int
    """Sessions that reused at least one position."""

    tokens_reused: int
    """Positions of prompts that were not computed."""

    tokens_computed: int
    """Positions of prompts that were."""

    seconds_saved: float
    """Time that computing the reused positions would have taken, by what was measured."""

    evictions: int
    """Segments removed for room, or because their time was over."""

    bytes_evicted: int
    """Their bytes."""

    @property
    def hit_rate(self) -> float:
        """Share of prompts' positions that were reused; 0 before the first session."""
        total = self.tokens_reused + self.tokens_computed
        return self.tokens_reused / total if total else 0.0

    @classmethod
    def of(
        cls, size: int, count: int, limit: int | None, totals: Mapping[str, float], index: Mapping[str, int]
    ) -> LibraryStats:
        """Make it of the index's sums."""
        numbers = {name: int(totals.get(name, 0)) for name in COUNTED}
        return cls(
            segments=count,
            bytes=size,
            max_bytes=limit,
            index_bytes=sum(index.values()),
            seconds_saved=totals.get("seconds_saved", 0.0),
            **{
                name: numbers[name]
                for name in ("sessions", "hits", "tokens_reused", "tokens_computed", "evictions", "bytes_evicted")
            },
        )


class Metrics:
    """Sums of one handle."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, float] = dict.fromkeys(COUNTED, 0)

    def session(self, match: Match, computed: int) -> None:
        """Count a session."""
        self.add(
            sessions=1,
            hits=int(match.length > 0),
            tokens_reused=match.length,
            tokens_computed=computed,
            seconds_saved=match.seconds,
        )

    def add(self, **amounts: float) -> None:
        """Add amounts by name."""
        with self._lock:
            for name, amount in amounts.items():
                self._values[name] += amount

    def values(self) -> dict[str, float]:
        """Return a copy of the sums."""
        with self._lock:
            return dict(self._values)
