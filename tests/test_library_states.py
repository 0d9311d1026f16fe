"""The library with caches that have states: what matches is the last checkpoint."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.library_support import SHAPE, check_rows, compute, prompt, text

import kvmmap
from kvmmap.library import Session

STATES = (kvmmap.StateSpec(0, "recurrent", "float32", (2, 4)),)
NAMESPACE = kvmmap.Namespace.build(**SHAPE, states=STATES)


def state_of(ids: np.ndarray) -> list[np.ndarray]:
    return [np.full((2, 4), float(np.sum(ids) % 1000003), np.float32)]


def converse(library: kvmmap.Library, ids: np.ndarray, *checkpoints: int) -> int:
    """Have a session that makes checkpoints at some positions and at its end; return what it reused."""
    with library.session(NAMESPACE, ids) as session:
        assert isinstance(session, Session)
        reused = session.reused
        check_rows(session, ids[:reused])
        if reused:
            np.testing.assert_array_equal(next(iter(session.read_states().values())), state_of(ids[:reused])[0])
        for stop in sorted({*checkpoints, len(ids)}):
            if stop > session.seq_len:
                extend(session, ids[:stop])
                session.write_states(state_of(ids[:stop]))
                session.checkpoint()
        return reused


def extend(session: Session, ids: np.ndarray) -> None:
    before = session.reused
    session.reused = session.seq_len
    compute(session, ids)
    session.reused = before


def test_the_last_checkpoint_counts(tmp_path: Path) -> None:
    ids = text(600, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        assert converse(library, ids, 200, 400) == 0
        for length, expected in ((600, 600), (599, 400), (400, 400), (399, 200), (200, 200), (199, 0)):
            found = library.match(NAMESPACE, prompt(ids[:length], [1, 2]))
            assert (found.length, found.common) == (expected, length)
        assert converse(library, prompt(ids, [7])) == 600
        assert converse(library, prompt(ids[:450], [7])) == 400
        library.rebuild()
        assert library.match(NAMESPACE, prompt(ids[:399], [1])).length == 200
        assert library.match(NAMESPACE, prompt(ids[:450], [7, 8])).length == 451


def test_states_are_part_of_the_namespace(tmp_path: Path) -> None:
    other = kvmmap.Namespace.build(**SHAPE, states=(kvmmap.StateSpec(0, "recurrent", "float32", (2, 5)),))
    windowed = kvmmap.Namespace.build(**SHAPE, recent_window=64, sinks=4)
    plain = kvmmap.Namespace.build(**SHAPE)
    assert len({namespace.digest for namespace in (NAMESPACE, other, windowed, plain)}) == 4
    with kvmmap.Library(tmp_path / "library") as library:
        with library.session(windowed, text(300, 0)) as session:
            compute(session, text(300, 0))
            assert session.geometry.recent_window == 64
        assert library.match(windowed, text(300, 0)).length == 300
        assert library.match(plain, text(300, 0)).length == 0


def test_put_refuses_states(tmp_path: Path) -> None:
    with (
        kvmmap.Library(tmp_path / "library") as library,
        kvmmap.create(tmp_path / "a.kvm", capacity=100, **SHAPE, states=STATES) as cache,
    ):
        from helpers.library_support import rows_of

        cache.extend(*rows_of(text(10, 0)), text(10, 0))
        with pytest.raises(kvmmap.UnsupportedModelError, match="states"):
            library.put(cache)
