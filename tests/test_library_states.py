"""The library with caches that have states: what matches is the last checkpoint."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np
import pytest
from helpers.library_support import SHAPE, check_consistent, check_rows, compute, prompt, rows_of, text

import kvmmap
from kvmmap.library import Session
from kvmmap.storage.file.thinning import drop_old_checkpoints

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


def make(path: Path, ids: np.ndarray, *checkpoints: int, pinned: int = 0) -> kvmmap.QuantizedKvCache:
    """Make a cache with checkpoints at some positions, open for appending."""
    cache = kvmmap.create(path, capacity=9000, **SHAPE, states=STATES)
    for stop in (*checkpoints, len(ids)):
        start = cache.seq_len
        keys, values = rows_of(ids[:stop], start)
        cache.extend(keys, values, ids[start:stop])
        if stop in checkpoints:
            cache.write_states(state_of(ids[:stop]))
            cache.checkpoint(pin=stop == pinned)
    return cache


def test_put_takes_checkpoints_and_rows_up_to_the_last(tmp_path: Path) -> None:
    ids = text(500, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        with make(tmp_path / "a.kvm", ids, 100, 300, 400, pinned=100) as cache:
            segment = library.put(cache)
        assert (segment.stop, segment.checkpoints) == (400, (100, 300, 400))
        for length, expected in ((500, 400), (399, 300), (299, 100), (99, 0)):
            assert library.match(NAMESPACE, ids[:length]).length == expected
        # Another one that begins alike: only what is new of it.
        other = prompt(ids[:350], text(100, 1))
        with make(tmp_path / "b.kvm", other, 200, 300, 420) as cache:
            segment = library.put(cache)
        assert (segment.start, segment.stop) == (300, 420)
        assert library.match(NAMESPACE, other).length == 420
        assert library.match(NAMESPACE, other[:419]).length == 300
        assert converse(library, prompt(other[:420], [1, 2])) == 420
        assert library.put(tmp_path / "a.kvm").stop == 400
        assert len(library.entries()) == 2
        check_consistent(library)


def test_put_of_more_pinned_checkpoints_than_a_child_can_pin(tmp_path: Path) -> None:
    ids = text(500, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        converse(library, ids[:100], 100)
        with kvmmap.create(tmp_path / "a.kvm", capacity=900, **SHAPE, states=STATES, checkpoint_slots=8) as cache:
            keys, values = rows_of(ids)
            for stop in range(50, 501, 50):
                cache.extend(keys[:, stop - 50 : stop], values[:, stop - 50 : stop], ids[stop - 50 : stop])
                cache.write_states(state_of(ids[:stop]))
                cache.checkpoint(pin=stop in (50, 150, 200, 250, 300, 350))
            segment = library.put(cache, NAMESPACE)
        assert segment.checkpoints is not None
        assert segment.checkpoints[-1] == segment.stop == 500
        assert library.match(NAMESPACE, ids).length == 500


def test_put_refuses_what_can_never_be_continued(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library") as library:
        with (
            make(tmp_path / "a.kvm", text(10, 0)) as cache,
            pytest.raises(kvmmap.NoCheckpointError, match="checkpoint"),
        ):
            library.put(cache)
        with (
            make(tmp_path / "b.kvm", text(10, 0), 10) as cache,
            pytest.raises(kvmmap.ShapeMismatchError, match="states"),
        ):
            library.put(cache, kvmmap.Namespace.build(**SHAPE))
        assert library.entries() == []


def test_a_child_begins_where_its_parent_has_no_checkpoint_any_more(tmp_path: Path) -> None:
    ids = text(900, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        converse(library, ids[:300], 100)
        assert converse(library, prompt(ids[:150], text(30, 1))) == 100
        converse(library, ids, *range(310, 900, 40))  # the parent drops its checkpoint at 100
        parent = next(entry for entry in library.entries() if entry.parent is None)
        assert parent.checkpoints is not None
        assert 100 not in parent.checkpoints
        asked = prompt(ids[:130], text(40, 2))
        found = library.match(NAMESPACE, asked)
        assert found.length == 100
        assert converse(library, asked) == 100
        (segment,) = library.match(NAMESPACE, asked).chain[1:]
        assert (segment.parent, segment.start, segment.stop) == (parent.name, 100, 170)
        check_consistent(library)
        before = {(entry.name, entry.parent, entry.start, entry.checkpoints) for entry in library.entries()}
        assert library.rebuild().broken == ()
        assert {(entry.name, entry.parent, entry.start, entry.checkpoints) for entry in library.entries()} == before


def test_a_checkpoint_that_the_index_has_and_the_file_has_not(tmp_path: Path) -> None:
    ids = text(400, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        converse(library, ids, 100, 200)
        (entry,) = library.entries()
        drop_old_checkpoints(entry.path)
        assert library.match(NAMESPACE, ids[:250]).length == 200  # the index was not told
        assert converse(library, prompt(ids[:250], [1, 2])) == 0
        assert library.match(NAMESPACE, ids).length == 400


def test_old_checkpoints_are_evicted_before_their_segment(tmp_path: Path) -> None:
    states = (kvmmap.StateSpec(0, "recurrent", "float32", (64, 1024)),)
    namespace = kvmmap.Namespace.build(**SHAPE, states=states)
    ids = text(400, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        for seed in range(2):
            with library.session(namespace, text(400, seed)) as session:
                for stop in (100, 200, 300, 400):
                    extend(session, text(400, seed)[:stop])
                    session.write_states([np.full((64, 1024), stop, np.float32)])
                    session.checkpoint(pin=stop == 100)
        size = library.stats().bytes
        spare = 2 * (64 * 1024 * 4 + 4096)
        assert [entry.spare_bytes for entry in library.entries()] == [spare, spare]
        planned = library.evict(size - 1, dry_run=True)
        gone = library.evict(size - 1)
        assert [choice.segment.name for choice in planned] == [choice.segment.name for choice in gone]
        assert [choice.reason for choice in (*planned, *gone)] == ["checkpoints", "checkpoints"]
        assert f"{spare:,} bytes" in gone[0].explanation
        assert library.stats().bytes <= size - spare
        assert library.stats().bytes == sum(
            path.stat().st_blocks * 512 for path in (tmp_path / "library").rglob("*.kvm")
        )
        assert [library.match(namespace, ids[:length]).length for length in (399, 400)] == [100, 400]
        with library.open(library.match(namespace, ids)) as cache:
            assert cache.verify().sound
            np.testing.assert_array_equal(cache.read_states(400)[0, "recurrent"], np.full((64, 1024), 400, np.float32))
            check_rows(cache, ids)
        # The rest: what was thinned goes next, whole, and then the other one loses its old checkpoints.
        planned = library.evict(1, dry_run=True)
        gone = library.evict(1)
        assert [(choice.reason, choice.segment.name) for choice in planned] == [
            (choice.reason, choice.segment.name) for choice in gone
        ]
        assert sorted(choice.reason for choice in gone) == ["checkpoints", "room", "room"]
        assert library.stats().bytes == 0


def test_checkpoints_of_a_segment_that_is_written_stay(tmp_path: Path) -> None:
    ids = text(400, 0)
    with kvmmap.Library(tmp_path / "library") as library:
        converse(library, ids, 100, 200, 300)
        with library.session(NAMESPACE, prompt(ids, [1])) as session:
            assert session.continues
            assert library.evict(1) == []
            assert [found.position for found in session.checkpoints] == [100, 200, 300, 400]


def test_the_best_checkpoint_of_all_segments_matches(tmp_path: Path) -> None:
    random = Random(5)
    parts = [text(length, length) for length in (20, 90, 256)]

    def draw() -> np.ndarray:
        return prompt(*[parts[random.randrange(len(parts))] for _ in range(random.randrange(1, 6))])

    hits = 0
    with kvmmap.Library(tmp_path / "library") as library:
        for step in range(30):
            asked = draw()
            found = library.match(NAMESPACE, asked)
            known = []
            for entry in library.entries():
                with kvmmap.open(entry.path) as cache:
                    ids = cache.token_ids
                known += [
                    (point, entry.name)
                    for point in entry.checkpoints or ()
                    if point <= len(asked) and np.array_equal(ids[:point], asked[:point])
                ]
            best = max([point for point, _ in known], default=0)
            assert found.length == best
            assert not best or (best, found.chain[-1].name) in known
            hits += best > 0
            stops = {random.randrange(1, len(asked) + 1) for _ in range(random.randrange(3))}
            assert converse(library, asked, *stops) == best
            if step % 10 == 9:
                assert library.rebuild().broken == ()
        check_consistent(library)
    assert hits > 8


def test_checkpoints_decide_what_is_fetched(tmp_path: Path) -> None:
    ids, options = text(900, 0), {"remote": f"memory://{tmp_path.name}", "write_through": False, "follow_every": None}
    with kvmmap.Library(tmp_path / "one", **options) as one, kvmmap.Library(tmp_path / "two", **options) as two:
        converse(one, ids[:600], 520)
        one.push()
        two.pull()
        assert converse(two, prompt(ids[:519], text(100, 1))) == 0  # nothing there can be continued so early
        assert two.metrics()["segments_fetched"] == 0
        assert converse(two, prompt(ids[:590], text(100, 1))) == 520
        assert two.metrics()["segments_fetched"] == 1
