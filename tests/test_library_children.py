"""Segments of a library that continue a part of another: what departs is stored once, and the parent outlives it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.library_support import NAMESPACE, check_consistent, check_rows, prompt, say, text

import kvmmap
from kvmmap.storage.file.child import MAX_FILES


@pytest.fixture
def library(tmp_path: Path) -> Iterator[kvmmap.Library]:
    with kvmmap.Library(tmp_path / "library") as library:
        yield library
        check_consistent(library)


def parents(path: str) -> list[int]:
    with kvmmap.open(path, record_use=False) as cache:
        return [parent.stop for parent in kvmmap.report.inspect(cache).parents]


def test_what_departs_is_a_child(library: kvmmap.Library) -> None:
    document, questions = text(900, 0), [text(30, number + 1) for number in range(3)]
    say(library, prompt(document, questions[0]))
    for question in questions[1:]:
        assert say(library, prompt(document, question)) == 900
    root, *children = sorted(library.entries(), key=lambda entry: entry.start)
    assert [(entry.parent, entry.start, entry.stop) for entry in children] == [(root.name, 900, 930)] * 2
    assert parents(children[0].path) == [900]
    for question in questions:
        found = library.match(NAMESPACE, prompt(document, question))
        assert found.length == 930
        with library.open(found) as cache:
            check_rows(cache, prompt(document, question))
    deeper = prompt(document, questions[1][:10], text(400, 9))
    assert say(library, deeper) == 910
    found = library.match(NAMESPACE, deeper)
    assert [segment.start for segment in found.chain] == [0, 900, 910]
    assert say(library, prompt(deeper, text(5, 10))) == 1310  # in place, at the end of a child
    library.rebuild()
    assert library.match(NAMESPACE, prompt(deeper, text(5, 10))).length == 1315


def test_a_session_does_not_go_back_beyond_its_match(library: kvmmap.Library) -> None:
    say(library, text(600, 0))

    with library.session(NAMESPACE, prompt(text(300, 0), text(100, 1))) as session:
        assert session.reused == 300
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            session.truncate(299)


def test_long_chains_end_in_a_whole_file(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    for number in range(MAX_FILES + 2):
        ids = prompt(ids[: len(ids) - 20], text(50, number + 1))
        say(library, ids)
    found = library.match(NAMESPACE, ids)
    assert found.length == len(ids)
    assert 0 < len(found.chain) < MAX_FILES
    assert max(entry.depth for entry in library.entries()) <= MAX_FILES
    with library.open(found) as cache:
        check_rows(cache, ids)


def test_a_parent_that_is_gone_is_computed_again(library: kvmmap.Library) -> None:
    say(library, prompt(text(600, 0), text(30, 1)))
    say(library, prompt(text(600, 0), text(30, 2)))
    root = min(library.entries(), key=lambda entry: entry.start)
    Path(root.path).unlink()
    assert say(library, prompt(text(600, 0), text(30, 2), text(30, 3))) == 0
    found = library.match(NAMESPACE, prompt(text(600, 0), text(30, 2), text(30, 3)))
    with library.open(found) as cache:
        check_rows(cache, prompt(text(600, 0), text(30, 2), text(30, 3)))
    library.check()
    for entry in sorted(library.entries(), key=lambda entry: -entry.depth):
        if entry.broken:
            library.remove(entry.name)
