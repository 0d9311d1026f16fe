"""The report on a library: sizes and hits, its tree of segments, their ages, and what would go first."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from ..output import count, plain, size
from ..summary import percent
from . import charts
from .document import whole
from .markup import Markup, element, facts, join, table

if TYPE_CHECKING:
    from kvmmap.library import Choice, LibraryStats, Segment, StoredNamespace

MOST_SHOWN = 2000
"""Segments in the tree: a page of more would not be read."""

MOST_GOING = 50

AGES = ((60, "a minute"), (3600, "an hour"), (86400, "a day"), (7 * 86400, "a week"), (30 * 86400, "a month"))


@dataclass(frozen=True, slots=True, kw_only=True)
class LibraryFacts:
    """All that the report tells of."""

    path: str
    stats: LibraryStats
    namespaces: Sequence[StoredNamespace]
    entries: Sequence[Segment]
    going: Sequence[Choice]
    """What would go if a quarter were to be freed."""
    version: str
    made: datetime


def build(found: LibraryFacts) -> str:
    """Return the page."""
    name = os.path.basename(found.path.rstrip("/")) or found.path
    about = f"A library of {count(found.stats.segments, 'cache')}, {size(found.stats.bytes)} on disk"
    broken = sum(entry.broken is not None for entry in found.entries)
    state = element("span", f"{broken} of no use.", class_="bad") if broken else element("span", "All are sound.")
    return whole(name, about, join([f"{about}. ", state]), _sections(found), found.version, found.made)


def _sections(found: LibraryFacts) -> Iterator[tuple[str, Sequence[Markup]]]:
    yield "What it holds", [facts(_facts_of(found.stats)), _models(found.namespaces)]
    if found.entries:
        yield "The tree", list(_trees(found))
        yield "Ages", [_ages(found)]
        yield "What goes first", list(_going(found))


def _facts_of(stats: LibraryStats) -> Iterator[tuple[str, Markup | str]]:
    yield "segments", f"{stats.segments:,}"
    if stats.max_bytes:
        share = stats.bytes / stats.max_bytes
        meter = element("meter", percent(share), value=f"{min(share, 1):.4f}", aria_label="how full the library is")
        yield "on disk", join([f"{size(stats.bytes)} of {size(stats.max_bytes)} ", meter])
    else:
        yield "on disk", f"{size(stats.bytes)}, without a limit"
    yield "index", size(stats.index_bytes)
    yield "sessions", f"{stats.sessions:,}; {stats.hits:,} found a prefix"
    meter = element("meter", percent(stats.hit_rate), value=f"{stats.hit_rate:.4f}", aria_label="share reused")
    yield "reused", join([f"{stats.tokens_reused:,} positions of prompts, {percent(stats.hit_rate)} ", meter])
    yield "computed", f"{stats.tokens_computed:,} positions"
    yield "saved", f"{stats.seconds_saved:,.1f} s of computation"
    yield "evicted", f"{count(stats.evictions, 'segment')}, {size(stats.bytes_evicted)}"


def _models(namespaces: Sequence[StoredNamespace]) -> Markup:
    rows = [
        (
            namespace.model or "no name",
            namespace.digest[:16],
            f"{namespace.segments:,}",
            f"{namespace.positions:,}",
            size(namespace.bytes),
        )
        for namespace in namespaces
    ]
    return table("Namespaces", ("model", "digest", "segments", "positions", "on disk"), rows, words=2)


def _trees(found: LibraryFacts) -> Iterator[Markup]:
    children: dict[str | None, list[Segment]] = {}
    for entry in found.entries[:MOST_SHOWN]:
        children.setdefault(entry.parent, []).append(entry)
    longest = max(entry.stop for entry in found.entries)

    def branch(entries: Sequence[Segment]) -> Markup:
        items = []
        for entry in entries:
            inner = children.get(entry.name, [])
            items.append(element("li", *_segment(entry, longest), *([branch(inner)] if inner else [])))
        return element("ul", *items)

    roots = children.get(None, [])
    for namespace in found.namespaces:
        mine = [entry for entry in roots if entry.namespace == namespace.digest]
        if mine:
            yield element("h3", namespace.model or namespace.digest)
            yield element("div", branch(mine), class_="tree")
    if len(found.entries) > MOST_SHOWN:
        yield element("p", f"And {len(found.entries) - MOST_SHOWN:,} more: kvmmap library ls lists all.")


def _segment(entry: Segment, longest: int) -> Iterator[Markup]:
    told = [f"{count(entry.positions, 'position')} from {entry.start:,}", size(entry.bytes), count(entry.hits, "use")]
    told += [word for word, true in (("pinned", entry.pinned), ("being written", entry.writing)) if true]
    yield join([element("b", plain(entry.name[-8:])), f" {', '.join(told)}"])
    if entry.broken:
        yield join([" ", element("span", entry.broken, class_="bad")])
    what = f"positions {entry.start:,} to {entry.stop:,}"
    yield charts.strip(what, [("keys", entry.start, entry.positions, what)], longest)


def _ages(found: LibraryFacts) -> Markup:
    now = found.made.timestamp()
    rows, low = [], 0.0
    for high, name in (*AGES, (float("inf"), "")):
        some = [entry for entry in found.entries if low <= now - entry.used < high]
        label = f"within {name}" if name else "longer ago"
        rows.append((label, f"{len(some):,}", size(sum(entry.bytes for entry in some))))
        low = high
    return table("Last used", ("", "segments", "on disk"), rows)


def _going(found: LibraryFacts) -> Iterator[Markup]:
    yield element("p", "If a quarter of the library had to go, this would, in this order.")
    rows = [
        (choice.segment.name[-8:], choice.explanation.partition(") ")[2], size(choice.segment.bytes))
        for choice in found.going[:MOST_GOING]
    ]
    yield table("To be evicted first", ("segment", "because it is", "on disk"), rows, words=2)
