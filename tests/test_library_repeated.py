"""Prompts that are asked again: what the library has already is not stored once more."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.library_support import NAMESPACE, check_consistent, compute, prompt, rows_of, text

import kvmmap
from kvmmap.storage.posix import PosixFile


@pytest.fixture
def library(tmp_path: Path) -> Iterator[kvmmap.Library]:
    with kvmmap.Library(tmp_path / "library") as library:
        yield library
        check_consistent(library)


def ask(library: kvmmap.Library, ids: np.ndarray, answer: np.ndarray | None = None, **more: Any) -> int:
    """Have a session as a model does, which computes the last position of a prompt again; return what was reused."""
    with library.session(NAMESPACE, ids, limit=len(ids) - 1, **more) as session:
        compute(session, ids if answer is None else prompt(ids, answer))
        return session.reused


def segments(library: kvmmap.Library) -> list[tuple[int, int]]:
    return [(entry.start, entry.stop) for entry in library.entries()]


def files(library: kvmmap.Library) -> int:
    return len(list(Path(library.path).rglob("*.kvm")))


@pytest.mark.parametrize("length", [2, 5, 9, 256, 257, 700])
def test_the_same_prompt_leaves_nothing(library: kvmmap.Library, length: int) -> None:
    ids = text(length, 1)
    assert ask(library, ids) == 0
    size = library.stats().bytes
    for _ in range(3):
        assert ask(library, ids) == length - 1
    assert segments(library) == [(0, length)]
    assert (files(library), library.stats().bytes) == (1, size)
    assert library.entries()[0].hits == 3
    assert library.match(NAMESPACE, ids).length == length


def test_a_part_of_a_prompt_leaves_nothing(library: kvmmap.Library) -> None:
    ids = text(700, 1)
    ask(library, ids)
    for length in (3, 500, 512, 699):
        assert ask(library, ids[:length]) == length - 1
    assert segments(library) == [(0, 700)]


def test_the_same_answer_leaves_nothing_and_another_one_does(library: kvmmap.Library) -> None:
    ids = text(300, 1)
    ask(library, ids, text(20, 2))
    assert ask(library, ids, text(20, 2)) == 299
    assert ask(library, ids, text(10, 2)) == 299
    assert segments(library) == [(0, 320)]
    assert ask(library, ids, text(30, 2)[:25]) == 299  # these begin otherwise
    assert segments(library) == [(0, 320), (299, 325)]
    ask(library, ids, text(30, 2)[:25])
    assert segments(library) == [(0, 320), (299, 325)]


def test_a_branch_that_is_asked_again(library: kvmmap.Library) -> None:
    first, second = text(600, 1), prompt(text(600, 1)[:400], text(100, 2))
    ask(library, first)
    ask(library, second)
    before = segments(library)
    for ids in (second, second[:450], first, second[:403]):
        assert ask(library, ids) == len(ids) - 1
    assert segments(library) == before


def test_nothing_is_synced_for_a_prompt_that_was_asked_before(
    library: kvmmap.Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    sync = PosixFile.sync
    monkeypatch.setattr(PosixFile, "sync", lambda file: (synced.append(file.path), sync(file))[1])
    ask(library, text(300, 1))
    assert synced
    synced.clear()
    ask(library, text(300, 1))
    assert not synced


def test_what_was_flushed_stays(library: kvmmap.Library) -> None:
    ids = text(300, 1)
    ask(library, ids)
    with library.session(NAMESPACE, ids, limit=299) as session:
        compute(session, ids)
        session.flush()
        name = session.name
    assert library.entry(name).stop == 300


def test_other_segments_may_go_while_a_prompt_is_asked_again(library: kvmmap.Library) -> None:
    ids = text(300, 1)
    ask(library, ids)
    with library.session(NAMESPACE, ids, limit=299) as session:
        compute(session, ids)
        parent = session.parent
        assert parent is not None
        Path(library.entry(parent).path).unlink()
    library.check()
    assert library.match(NAMESPACE, ids).length == 0
    assert ask(library, ids) == 0
    assert library.match(NAMESPACE, ids).length == 300


def test_positions_without_token_ids_are_no_repetition(library: kvmmap.Library) -> None:
    ids = text(300, 1)
    ask(library, ids)
    with library.session(NAMESPACE, ids, limit=299) as session:
        compute(session, ids)
        keys = values = np.ones((2, 1, 2, 8), np.float32)
        session.extend(keys, values)
    assert library.match(NAMESPACE, ids).length == 300
    assert library.match(NAMESPACE, prompt(ids, [1])).length == 300


def test_put_of_what_is_there_leaves_nothing(library: kvmmap.Library, tmp_path: Path) -> None:
    ids = text(300, 1)
    ask(library, ids)
    with kvmmap.create(
        tmp_path / "cache.kvm", num_layers=2, num_kv_heads=2, head_dim=8, capacity=400, model=NAMESPACE.model
    ) as cache:
        cache.extend(*rows_of(ids[:200]), ids[:200])
        found = library.put(cache, NAMESPACE)
    assert (found.start, found.stop, segments(library)) == (0, 300, [(0, 300)])
