"""The tree of segments: children, what they need of their parents, and chains that get too long."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.library_support import NAMESPACE, check_consistent, check_rows, compute, prompt, say, text

import kvmmap


def by_stop(library: kvmmap.Library) -> dict[int, kvmmap.library.Segment]:
    return {entry.stop: entry for entry in library.entries()}


def test_a_branch_stores_only_what_follows(tmp_path: Path) -> None:
    base = text(2000, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, base)
        say(library, prompt(base[:1500], text(20, 1)))
        found = by_stop(library)
        parent, child = found[2000], found[1520]
        assert (child.parent, child.start, child.depth, child.positions) == (parent.name, 1500, 2, 20)
        assert parent.children == parent.branches == 1
        assert child.bytes < parent.bytes / 2
        with kvmmap.open(child.path) as cache:
            check_rows(cache, prompt(base[:1500], text(20, 1)))
        with pytest.raises(kvmmap.KvmmapError, match="continue it"):
            library.remove(parent.name)
        before = {entry.name: (entry.parent, entry.start, entry.stop) for entry in library.entries()}
        library.rebuild()
        assert {entry.name: (entry.parent, entry.start, entry.stop) for entry in library.entries()} == before
        check_consistent(library)


def test_leaves_go_first(tmp_path: Path) -> None:
    base = text(1000, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, base)
        for seed in range(1, 4):
            say(library, prompt(base, text(80, seed)), limit=1000 if seed == 1 else None)
        dry = [choice.segment.stop for choice in library.evict(1, dry_run=True)]
        gone = [choice.segment.stop for choice in library.evict(1)]
        assert dry == gone
        assert gone[-1] >= 1000
        assert library.entries() == []
        assert not list(Path(library.path).rglob("*.kvm"))


def test_a_chain_that_gets_too_long_is_copied(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library") as library:
        ids = text(400, 0)
        say(library, ids)
        depths = []
        for turn in range(1, 12):
            ids = prompt(ids[:-5], text(100, turn))
            assert say(library, ids) == len(ids) - 100
            depths.append(by_stop(library)[len(ids)].depth)
        assert max(depths) == 8
        assert 1 in depths
        for stop in (200, 400, len(ids)):
            assert library.match(NAMESPACE, ids[:stop]).length == stop
        check_consistent(library)
        library.rebuild()
        assert library.match(NAMESPACE, ids).length == len(ids)
        check_consistent(library)


def test_a_few_common_ids_make_no_family(tmp_path: Path) -> None:
    """What departs within the first positions of a segment continues that one's parent, and has a copy of these."""
    base = text(700, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, base)
        for seed in (2, 3, 4):
            # The first one is appended to the base.
            assert say(library, prompt(base[:600], text(5, 1), text(300, seed))) == (600 if seed == 2 else 605)
        for seed in (2, 3, 4):
            assert library.match(NAMESPACE, prompt(base[:600], text(5, 1), text(300, seed))).length == 905
        root = next(entry for entry in library.entries() if entry.parent is None)
        assert [(entry.parent, entry.start) for entry in library.entries()][1:] == [(root.name, 600)] * 3
        check_consistent(library)


def test_a_parent_that_is_damaged_takes_its_children_along(tmp_path: Path) -> None:
    base = text(700, 0)
    branch = prompt(base[:600], text(100, 1))
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, base)
        say(library, branch)
        say(library, text(300, 5))
        segments = {entry.name: entry for entry in library.entries()}
        parent = Path(next(entry.path for entry in segments.values() if entry.children))
        parent.write_bytes(b"no cache")
        assert say(library, branch) == 0
        library.verify()
        assert len(library.check().broken) == 2
        assert library.match(NAMESPACE, branch).length == 700
        assert library.match(NAMESPACE, text(300, 5)).length == 300
        gone = library.evict(library.stats().bytes - 1)
        assert gone[0].reason == "broken"


def test_two_children_of_one_busy_segment(tmp_path: Path) -> None:
    """A child at a segment's end, and then the segment grows by the same: the longer one is found."""
    base = text(300, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        say(library, base)
        more = prompt(base, text(200, 1))
        with library.session(NAMESPACE, more[:320]) as busy:
            assert busy.continues
            assert say(library, more) == 300
            compute(busy, more[:320])
        assert library.match(NAMESPACE, more).length == 500
        assert library.match(NAMESPACE, more[:320]).length == 320
        assert say(library, prompt(more, [1])) == 500
        check_consistent(library)
