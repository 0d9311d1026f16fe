"""The library: matches, sessions, budget, and what happens when files or the index are damaged."""

from __future__ import annotations

import contextlib
import os
import signal
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from helpers.library_support import (
    DIM,
    HEADS,
    LAYERS,
    NAMESPACE,
    SHAPE,
    check_consistent,
    check_rows,
    compute,
    prompt,
    rows_of,
    say,
    text,
)
from helpers.support import run_python

import kvmmap
from kvmmap.format import WHOLE_CACHE, Extent, Section
from kvmmap.storage.file.mapped_file import read_superblock
from kvmmap.storage.posix import PosixFile


@pytest.fixture
def library(tmp_path: Path) -> Iterator[kvmmap.Library]:
    library = kvmmap.Library(tmp_path / "library")
    yield library
    if not library._closed:
        check_consistent(library)
    library.close()


# Matching


def test_an_empty_library_matches_nothing(library: kvmmap.Library) -> None:
    found = library.match(NAMESPACE, text(1000, 0))
    assert (found.length, found.chain, found.path, found.segment) == (0, (), None, None)
    with pytest.raises(kvmmap.CacheNotFoundError, match="nothing matched"):
        library.open(found)
    assert library.match(NAMESPACE, []).length == 0
    assert library.entries() == []


@pytest.mark.parametrize("length", [1, 63, 64, 65, 255, 256, 257, 700, 1024])
def test_the_longest_prefix_is_found(library: kvmmap.Library, length: int) -> None:
    whole = text(1024, 1)
    assert say(library, whole) == 0
    found = library.match(NAMESPACE, prompt(whole[:length], text(50, 2)))
    assert found.length == length
    with library.open(found) as cache:
        check_rows(cache, whole[:length])
    assert library.match(NAMESPACE, whole[:length]).length == length
    assert library.match(NAMESPACE, whole, limit=length - 1).length == length - 1


def test_a_session_continues_where_a_segment_ends(library: kvmmap.Library) -> None:
    first, second = text(300, 1), text(20, 2)
    say(library, first)
    (before,) = library.entries()
    assert say(library, prompt(first, second)) == 300
    (after,) = library.entries()
    assert (after.name, after.stop) == (before.name, 320)
    assert say(library, prompt(first, second)) == 320


def test_a_session_branches_off_in_the_middle(library: kvmmap.Library) -> None:
    first = text(700, 1)
    say(library, first)
    for seed, where in ((2, 650), (3, 300), (4, 256), (5, 100)):
        branch = prompt(first[:where], text(80, seed))
        assert say(library, branch) == where
        assert library.match(NAMESPACE, branch).length == where + 80
    assert library.match(NAMESPACE, first).length == 700
    assert len(library.entries()) == 5


def test_a_conversation_and_answers_that_are_made_again(library: kvmmap.Library) -> None:
    system = text(500, 0)
    history = system
    for turn in range(6):
        history = prompt(history, text(70 + turn, turn + 1))
        say(library, history)
    assert library.match(NAMESPACE, history).length == len(history)
    again = prompt(history[:-30], text(40, 99))
    assert say(library, again) == len(history) - 30
    assert library.match(NAMESPACE, prompt(history, [1])).length == len(history)


def test_two_sessions_at_once_on_one_prefix(library: kvmmap.Library) -> None:
    base = text(400, 0)
    say(library, base)
    one, two = prompt(base, text(50, 1)), prompt(base, text(60, 2))
    with library.session(NAMESPACE, one) as first, library.session(NAMESPACE, two) as second:
        assert (first.reused, second.reused) == (400, 400)
        assert first.continues
        assert not second.continues
        compute(first, one)
        compute(second, two)
        assert library.match(NAMESPACE, one).length == 400  # private until it is flushed
        first.flush()
        assert library.match(NAMESPACE, one).length == 450
        check_rows(second, two)
    for ids in (one, two):
        assert library.match(NAMESPACE, ids).length == len(ids)


def test_equal_prompts_at_once(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    with library.session(NAMESPACE, ids) as one, library.session(NAMESPACE, ids) as two:
        compute(one, ids)
        compute(two, ids)
    assert library.match(NAMESPACE, ids).length == 300
    tail = prompt(ids, text(9, 1))
    assert say(library, tail) == 300
    assert say(library, tail) == 309


def test_a_session_keeps_what_is_not_its_own(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    say(library, ids)
    with library.session(NAMESPACE, prompt(ids, [1, 2, 3])) as session:
        compute(session, prompt(ids, [1, 2, 3]))
        session.truncate(301)
        with pytest.raises(kvmmap.PositionOutOfRangeError, match="belong to the library"):
            session.truncate(299)
    assert library.match(NAMESPACE, prompt(ids, [1, 2, 3])).length == 301


def test_a_session_without_anything_new_leaves_nothing(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    with library.session(NAMESPACE, ids):
        pass
    assert library.entries() == []
    say(library, ids)
    with library.session(NAMESPACE, ids[:200]) as session:
        assert session.reused == 200
    with library.session(NAMESPACE, ids) as session:
        assert session.reused == 300
    assert [segment.stop for segment in library.entries()] == [300]
    assert len(list(Path(library.path).rglob("*.kvm"))) == 1


def test_what_a_session_discards_is_gone(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    with library.session(NAMESPACE, ids) as session:
        compute(session, ids)
        session.discard()
    assert library.entries() == []
    say(library, ids)
    longer = prompt(ids, text(50, 1))
    session = library.session(NAMESPACE, longer)
    compute(session, longer)
    session.discard()
    assert library.match(NAMESPACE, longer).length == 300


def test_positions_without_token_ids_do_not_count(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    keys, values = rows_of(ids)
    with library.session(NAMESPACE, ids) as session:
        session.extend(keys[:, :200], values[:, :200], ids[:200])
        session.extend(keys[:, 200:], values[:, 200:])
    assert library.match(NAMESPACE, ids).length == 200
    assert say(library, ids) == 200


def test_more_than_there_is_room_for_in_place(library: kvmmap.Library) -> None:
    ids = text(100, 0)
    say(library, ids, capacity=150)
    longer = prompt(ids, text(100, 1))
    with library.session(NAMESPACE, longer) as session:
        assert (session.reused, session.continues) == (100, False)
        compute(session, longer)
    with pytest.raises(kvmmap.ShapeMismatchError, match="the prompt alone"):
        library.session(NAMESPACE, longer, capacity=150)


# Namespaces

FACTS = {
    "weights": {"model": kvmmap.ModelInfo(name="org/tiny", fingerprint="abd")},
    "dtype": {"model": kvmmap.ModelInfo(name="org/tiny", fingerprint="abc", source_dtype="float16")},
    "rope": {"model": kvmmap.ModelInfo(name="org/tiny", fingerprint="abc", rope={"theta": 1e6})},
    "adapter": {"facts": {"adapter": {"name": "a", "scale": 2.0}}},
    "the adapter's scale": {"facts": {"adapter": {"name": "a", "scale": 1.0}}},
    "window": {"facts": {"windows": [None, 128]}},
    "codec": {"key_codec": "int8-rotated"},
    "value codec": {"value_codec": "int4-rotated"},
    "heads": {"num_kv_heads": 4, "head_dim": 4},
    "layers": {"num_layers": 3},
    "salt": {"salt": "tenant"},
    "another salt": {"salt": "other"},
    "an empty salt": {"salt": ""},
    "no fingerprint": {"model": kvmmap.ModelInfo(name="org/tiny")},
    "another revision": {"model": kvmmap.ModelInfo(name="org/tiny", revision="b")},
}


def test_a_namespace_that_differs_in_one_fact_never_matches(library: kvmmap.Library) -> None:
    ids = text(600, 0)
    base = {**SHAPE, "model": kvmmap.ModelInfo(name="org/tiny", fingerprint="abc")}
    assert kvmmap.Namespace.build(**base).digest == NAMESPACE.digest
    others = {name: kvmmap.Namespace.build(**base | fact) for name, fact in FACTS.items()}
    assert len({namespace.digest for namespace in others.values()} | {NAMESPACE.digest}) == len(FACTS) + 1
    say(library, ids)
    for name, namespace in others.items():
        assert library.match(namespace, ids).length == 0, name
    for namespace in (others["salt"], others["rope"]):
        assert say(library, ids, namespace) == 0
        assert library.match(namespace, ids).length == 600
    assert library.match(others["another salt"], ids).length == 0
    library.rebuild()
    assert library.match(others["salt"], ids).length == 600
    assert library.match(NAMESPACE, ids).length == 600
    assert b"tenant" not in b"".join(path.read_bytes() for path in Path(library.path).rglob("*") if path.is_file())


def test_weights_of_one_fingerprint_are_the_same_under_any_name() -> None:
    renamed = kvmmap.Namespace.build(
        **SHAPE, model=kvmmap.ModelInfo(name="local/copy", fingerprint="abc", revision="x")
    )
    assert renamed.digest == NAMESPACE.digest


def test_facts_that_are_no_json() -> None:
    for facts in ({"a": object()}, {"a": float("nan")}, {1: 2}):
        with pytest.raises(kvmmap.MetadataError):
            _ = kvmmap.Namespace.build(**SHAPE, facts=facts).digest


# Taking in


def test_put_takes_a_cache_in(library: kvmmap.Library, tmp_path: Path) -> None:
    ids = text(3000, 0)
    keys, values = rows_of(ids)
    notes = {"title": "a manual"}
    with kvmmap.create(tmp_path / "one.kvm", capacity=5000, **SHAPE, model=NAMESPACE.model, metadata=notes) as cache:
        cache.extend(keys, values, ids)
    segment = library.put(tmp_path / "one.kvm")
    assert (segment.stop, segment.namespace) == (3000, NAMESPACE.digest)
    with kvmmap.open(segment.path) as stored, kvmmap.open(tmp_path / "one.kvm") as cache:
        for copied, layer in zip(stored.layers, cache.layers, strict=True):
            for one, other in zip(copied.read_quantized(), layer.read_quantized(), strict=True):
                np.testing.assert_array_equal(one, other)
        check_rows(stored, ids)
        assert stored.metadata["title"] == "a manual"
    again = library.put(tmp_path / "one.kvm")
    assert again.name == segment.name
    assert len(library.entries()) == 1
    with kvmmap.QuantizedKvCache(LAYERS, 4000, HEADS, DIM, model=NAMESPACE.model) as memory:
        memory.extend(keys, values, ids)
        more = prompt(ids, [7])
        keys, values = rows_of(more, 3000)
        memory.extend(keys, values, [7])
        assert library.put(memory).stop == 3001
    assert library.match(NAMESPACE, more).length == 3001


def test_put_refuses_what_could_never_match(library: kvmmap.Library) -> None:
    keys, values = rows_of(text(10, 0))
    with kvmmap.QuantizedKvCache(LAYERS, 20, HEADS, DIM) as cache:
        with pytest.raises(kvmmap.UnknownTokensError):
            library.put(cache)
        cache.extend(keys, values)
        with pytest.raises(kvmmap.UnknownTokensError, match="position 0"):
            library.put(cache)
    with kvmmap.QuantizedKvCache(LAYERS, 20, HEADS, DIM) as cache:
        cache.extend(keys, values, text(10, 0))
        with pytest.raises(kvmmap.ShapeMismatchError, match="namespace"):
            library.put(cache, kvmmap.Namespace.build(**SHAPE | {"key_codec": "bf16"}))
    with pytest.raises(kvmmap.CacheNotFoundError):
        library.put("no/such.kvm")
    assert library.entries() == []


# Budget


def test_the_budget_is_kept(tmp_path: Path) -> None:
    limit = 1_500_000
    with kvmmap.Library(tmp_path / "library", limit) as library:
        for seed in range(12):
            say(library, text(1500, seed))
            assert disk_use(library) <= limit
        stats = library.stats()
        assert stats.bytes == disk_use(library) <= limit
        assert stats.evictions > 0
        assert stats.evictions + stats.segments == 12
        assert library.metrics()["evictions"] == stats.evictions
        kept = [seed for seed in range(12) if library.match(NAMESPACE, text(1500, seed)).length]
        assert kept == list(range(12 - stats.segments, 12))
        check_consistent(library)
    with kvmmap.Library(tmp_path / "library") as library:
        assert library.max_bytes == limit
        say(library, text(1500, 99))
        assert disk_use(library) <= limit


def disk_use(library: kvmmap.Library) -> int:
    return sum(path.stat().st_blocks * 512 for path in Path(library.path).rglob("*.kvm"))


def test_pins_are_kept_and_survive_the_index(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library", 700_000) as library:
        say(library, text(1500, 0))
        (pinned,) = library.entries()
        library.pin(pinned.name)
        for seed in range(1, 6):
            say(library, text(1500, seed))
        assert library.match(NAMESPACE, text(1500, 0)).length == 1500
        library.rebuild()
        assert library.entry(pinned.name).pinned
        for seed in range(6, 12):
            say(library, text(1500, seed))
        assert library.match(NAMESPACE, text(1500, 0)).length == 1500
        library.unpin(pinned.name)
        for seed in range(12, 18):
            say(library, text(1500, seed))
        assert library.match(NAMESPACE, text(1500, 0)).length == 0


def test_no_room(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "library", 500_000) as library:
        ids = text(1000, 0)
        say(library, ids)
        library.pin(library.entries()[0].name)
        with library.session(NAMESPACE, text(5000, 1)) as session:
            with pytest.raises(kvmmap.LibraryFullError, match="pinned") as caught:
                compute(session, text(5000, 1))
            assert isinstance(caught.value, OSError)
            assert session.seq_len == 0
        assert library.match(NAMESPACE, ids).length == 1000
        assert len(library.entries()) == 1


def test_a_segment_that_is_written_is_not_evicted(library: kvmmap.Library) -> None:
    say(library, text(300, 0))
    with library.session(NAMESPACE, prompt(text(300, 0), [5])) as session:
        assert session.continues
        assert library.evict(1) == []
        compute(session, prompt(text(300, 0), [5]))
    assert [choice.reason for choice in library.evict(1)] == ["room"]


def test_who_reads_a_segment_goes_on_reading(library: kvmmap.Library) -> None:
    ids = text(300, 0)
    say(library, ids)
    with library.open(library.match(NAMESPACE, ids)) as cache:
        library.evict(1)
        assert library.entries() == []
        check_rows(cache, ids)


def test_the_longest_unused_of_equals_goes_first(library: kvmmap.Library) -> None:
    for seed in range(3):
        say(library, text(300, seed))
    say(library, text(300, 0), limit=299)
    library.match(NAMESPACE, text(300, 1))  # is no use
    library.verify()
    names = [segment.stop for segment in library.entries()]
    dry = library.evict(1, dry_run=True)
    assert len(library.entries()) == len(names)
    gone = library.evict(library.stats().bytes - 1)
    assert [choice.segment.name for choice in gone] == [dry[0].segment.name]
    assert library.match(NAMESPACE, text(300, 1)).length == 0
    assert "saves" in gone[0].explanation
    assert "last" in gone[0].explanation


def test_time_to_live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with kvmmap.Library(tmp_path / "library", ttl=3600) as library:
        say(library, text(300, 0))
        say(library, text(300, 1))
        library.ttl(library.match(NAMESPACE, text(300, 1)).chain[-1].name, None)
        assert not library.evict(dry_run=True)
        later = time.time() + 3601
        monkeypatch.setattr(time, "time", lambda: later)
        assert [choice.reason for choice in library.evict(dry_run=True)] == ["expired"]
        assert [choice.reason for choice in library.evict()] == ["expired"]
        assert library.match(NAMESPACE, text(300, 1)).length == 300
        with pytest.raises(kvmmap.ShapeMismatchError):
            library.ttl(library.entries()[0].name, -1)


def test_removing(library: kvmmap.Library) -> None:
    say(library, text(300, 0))
    (segment,) = library.entries()
    with library.session(NAMESPACE, prompt(text(300, 0), [1])), pytest.raises(kvmmap.CacheLockedError):
        library.remove(segment.name)
    library.pin(segment.name)
    library.remove(segment.name[-6:])
    assert library.entries() == []
    assert not list(Path(library.path).rglob("*.kvm"))
    assert not list(Path(library.path).rglob("*.pin"))
    with pytest.raises(kvmmap.CacheNotFoundError, match="no segment"):
        library.remove(segment.name)


# Damage and crashes


def damage_index(folder: Path, how: str) -> None:
    path = folder / "index.sqlite3"
    if how == "deleted":
        path.unlink()
    elif how == "all deleted":
        for name in folder.glob("index.sqlite3*"):
            name.unlink()
    elif how == "cut off":
        os.truncate(path, 5000)
    elif how == "empty":
        os.truncate(path, 0)
    elif how == "overwritten":
        path.write_bytes(b"no database at all " * 1000)
    elif how == "another version":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 999")
        connection.close()
    elif how == "no tables":
        path.unlink()
        with sqlite3.connect(path) as connection:
            connection.execute("CREATE TABLE other (x)")
        connection.close()


@pytest.mark.parametrize(
    "how", ["deleted", "all deleted", "cut off", "empty", "overwritten", "another version", "no tables"]
)
@pytest.mark.parametrize("opened", [False, True])
def test_a_damaged_index_loses_no_cache(tmp_path: Path, how: str, opened: bool) -> None:
    folder = tmp_path / "library"
    library = kvmmap.Library(folder, 10**9)
    say(library, text(600, 0))
    say(library, prompt(text(600, 0)[:400], text(50, 1)))
    if not opened:
        library.close()
    damage_index(folder, how)
    if not opened:
        library = kvmmap.Library(folder)
    with library:
        assert library.match(NAMESPACE, text(600, 0)).length == 600
        assert library.match(NAMESPACE, prompt(text(600, 0)[:400], text(50, 1))).length == 450
        assert say(library, prompt(text(600, 0), [1, 2])) == 600
        check_consistent(library)
        assert library.max_bytes == 10**9


def test_the_index_is_deleted_while_a_session_is_open(tmp_path: Path) -> None:
    folder = tmp_path / "library"
    with kvmmap.Library(folder) as library:
        with library.session(NAMESPACE, text(300, 0)) as session:
            compute(session, text(300, 0))
            damage_index(folder, "all deleted")
            assert library.match(NAMESPACE, text(300, 0)).length == 0
        assert library.match(NAMESPACE, text(300, 0)).length == 300
        check_consistent(library)


def read_sections(path: Path) -> Mapping[tuple[int, int], Extent]:
    file = PosixFile.open(str(path), writable=False)
    with contextlib.closing(file):
        return read_superblock(file).sections


@pytest.mark.parametrize("what", ["superblock", "rows", "cut off", "gone", "no cache", "token ids"])
def test_a_damaged_segment(library: kvmmap.Library, what: str) -> None:
    ids = text(600, 0)
    say(library, ids)
    say(library, text(300, 1))
    path = Path(library.match(NAMESPACE, ids).path or "")
    sections = read_sections(path)
    if what == "gone":
        path.unlink()
    elif what == "no cache":
        path.write_bytes(b"something else" * 1000)
    elif what == "cut off":
        os.truncate(path, 10_000)
    else:
        offset = {
            "superblock": 200,
            "rows": sections[Section.KEY_CODES, 1].offset + 40,
            "token ids": sections[Section.TOKEN_IDS, WHOLE_CACHE].offset + 4 * 400,
        }[what]
        with path.open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 0x55]))
    if what == "token ids":
        assert library.match(NAMESPACE, ids).length == 400
        assert say(library, ids) in (0, 400)
        assert library.match(NAMESPACE, ids).length == 600
        return
    if what == "rows":
        with library.session(NAMESPACE, ids) as session, pytest.raises(kvmmap.CorruptCacheError):
            session.layers[1].read_keys()
        assert not all(report.sound for report in library.verify())
    assert say(library, ids) == 0
    assert library.match(NAMESPACE, ids).length == 600
    assert library.match(NAMESPACE, text(300, 1)).length == 300
    report = library.check()
    assert len(report.removed if what == "gone" else report.broken) <= 1
    if what != "gone":
        gone = library.evict(library.stats().bytes - 1)
        assert gone[0].reason in ("broken", "room")


WRITER = """
import os, signal, sys
import kvmmap
from helpers.library_support import *
library = kvmmap.Library(sys.argv[1])
ids = text(600, 0)
session = library.session(NAMESPACE, ids)
compute(session, ids)
if sys.argv[2] == "flushed":
    session.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("flushed", [False, True])
def test_a_process_that_dies_while_it_appends(tmp_path: Path, flushed: bool) -> None:
    folder = tmp_path / "library"
    with kvmmap.Library(folder) as library:
        done = run_python(WRITER, folder, "flushed" if flushed else "", check=False)
        assert done.returncode == -signal.SIGKILL
        assert library.match(NAMESPACE, text(600, 0)).length == (600 if flushed else 0)
        report = library.check()
        assert len(report.updated) == 1
        assert library.match(NAMESPACE, text(600, 0)).length == 600  # it had published all
        stats = library.stats()
        assert stats.bytes == disk_use(library)
        check_consistent(library)


def test_files_that_come_and_go(library: kvmmap.Library, tmp_path: Path) -> None:
    say(library, text(300, 0))
    (segment,) = library.entries()
    path = Path(segment.path)
    aside = tmp_path / "aside.kvm"
    path.rename(aside)
    assert library.check().removed == (segment.name,)
    assert library.match(NAMESPACE, text(300, 0)).length == 0
    aside.rename(path)
    assert library.check().added == (segment.name,)
    assert library.match(NAMESPACE, text(300, 0)).length == 300
    stray = path.with_name("stray.kvm")
    kvmmap.create(stray, capacity=10, **SHAPE).close()
    assert library.check().broken == ("stray",)
    assert library.check().broken == ("stray",)
    stray.unlink()


# Places


def test_places_that_are_no_library(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(kvmmap.NotACacheError, match="not a folder"):
        kvmmap.Library(tmp_path / "file")
    with pytest.raises(kvmmap.NotACacheError, match="other files"):
        kvmmap.Library(tmp_path)
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.Library(tmp_path / "x", 0)
    (tmp_path / "new").mkdir()
    kvmmap.Library(tmp_path / "new").close()
    (tmp_path / "new" / "library.json").write_text("{}")
    with pytest.raises(kvmmap.CorruptCacheError, match="settings"):
        kvmmap.Library(tmp_path / "new")
    (tmp_path / "new" / "library.json").write_text('{"version": 99}')
    with pytest.raises(kvmmap.VersionMismatchError):
        kvmmap.Library(tmp_path / "new")


def test_a_closed_library(tmp_path: Path) -> None:
    library = kvmmap.Library(tmp_path / "library")
    session = library.session(NAMESPACE, text(300, 0))
    library.close()
    library.close()
    assert repr(library).endswith("closed>")
    for call in (library.entries, library.stats, library.check, library.evict, lambda: library.match(NAMESPACE, [1])):
        with pytest.raises(kvmmap.ClosedError):
            call()
    compute(session, text(300, 0))
    session.close()
    with kvmmap.Library(tmp_path / "library") as library:
        assert library.match(NAMESPACE, text(300, 0)).length == 300


# Many at once


def test_threads(library: kvmmap.Library) -> None:
    base = text(300, 0)
    say(library, base)
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(4):
                ids = prompt(base, text(20, number), text(30, turn))
                say(library, ids)
                assert library.match(NAMESPACE, ids).length == len(ids)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


def test_a_forked_process_opens_its_own_index(library: kvmmap.Library) -> None:
    say(library, text(300, 0))
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = 0 if say(library, prompt(text(300, 0), [1])) == 300 else 2
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert library.match(NAMESPACE, prompt(text(300, 0), [1])).length == 301


def test_a_segment_whose_file_is_about_to_be_made_stays(library: kvmmap.Library) -> None:
    say(library, text(300, 0))
    number = library._index.namespace_id(NAMESPACE.digest)
    assert number is not None
    library._index.add("about-to-be-made", number, parent=0, start=0, size=0, ttl=0)
    segment = library.entry("about-to-be-made")
    assert [choice.segment.stop for choice in library.evict(1)] == [300]
    with pytest.raises(kvmmap.CacheLockedError):
        library.remove(segment.name)
    assert library.check().removed == ()
    library._index.end_writing(segment.name, 0)
    assert library.check().removed == (segment.name,)
