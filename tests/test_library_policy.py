"""The eviction policy: what a segment's uses, branches and worth make of its place in the order."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.library_support import say, text

import kvmmap
from kvmmap.library import policy
from kvmmap.library.segment import Segment

SPAN = 100.0


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    """One that was made and used 100 seconds after the longest unused one."""
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, text(300, 0))
        (found,) = library.entries()
    return dataclasses.replace(found, created=0.0, used=100.0, seconds=1.0, bytes=1 << 20)


def gain(segment: Segment, **changes: Any) -> float:
    """Return how much later a segment goes than another one that differs only in these."""
    return policy.rank(dataclasses.replace(segment, **changes), SPAN) - policy.rank(segment, SPAN)


def test_branches_count_if_more_are_to_be_expected(segment: Segment) -> None:
    assert [gain(segment, branches=count, used=100.0) for count in (0, 1, 2, 3)] == [0, 0, 0, 0]
    gains = [gain(segment, branches=count) for count in (4, 10, 100)]
    assert gains == pytest.approx([40, 64, 78.4])
    # As many over a longer time: the next one is not to be expected soon.
    rare = dataclasses.replace(segment, created=-1000.0)
    assert gain(rare, branches=10) == 0
    assert gain(rare, branches=100) == pytest.approx(78.4)


def test_worth_counts_by_its_magnitude(segment: Segment) -> None:
    assert gain(segment, seconds=2.718281828) == pytest.approx(6.25)
    assert gain(segment, bytes=segment.bytes * 2) == pytest.approx(-4.33, abs=0.01)


def test_what_is_of_no_use_goes_first(segment: Segment) -> None:
    old = dataclasses.replace(segment, id=1, used=0.0)
    broken = dataclasses.replace(segment, id=2, used=90.0, broken="damaged")
    assert policy.next_to_go([old, broken, segment]) is broken
    assert policy.next_to_go([old, segment]) is old


def test_an_index_that_was_rebuilt(segment: Segment) -> None:
    """Then a segment is made after its last use, as far as is known."""
    assert gain(segment, created=1e9, branches=4) == pytest.approx(40)


@pytest.mark.parametrize("kind", ["chat", "documents", "agents"])
def test_traces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly ever does it save less than the longest unused first, on traces that it was not fitted to."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[1] / "benchmarks")])
    from library_traces import TRACES, rates

    for seed in (21, 22, 23):
        requests = TRACES[kind](seed, 800)
        for budget in (100_000, 300_000):
            found = dict(rates(requests, budget))
            assert found["kvmmap"] > found["LRU"] - 0.002
            assert found["kvmmap"] <= found["clairvoyant"] + 0.01
