"""A library and what it is given: odd token ids, namespaces, settings, places, files that no library made, forks.

Either it works, or a typed error says what is wrong, and nothing stored changes.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.library_support import NAMESPACE, SHAPE, check_consistent, compute, prompt, rows_of, say, text

import kvmmap

IDS = text(300, 1)


@pytest.fixture
def library(tmp_path: Path) -> Iterator[kvmmap.Library]:
    library = kvmmap.Library(tmp_path / "library")
    say(library, IDS)
    yield library
    library.close()


# Token ids, limits, namespaces


@pytest.mark.parametrize(
    "ids",
    [
        IDS.tolist(),
        tuple(IDS.tolist()),
        IDS.astype(np.uint64),
        IDS.astype(">i4"),
        np.repeat(IDS, 2)[::2],
        np.frombuffer(IDS.astype(np.int32).tobytes(), np.int32),
    ],
    ids=["list", "tuple", "unsigned", "big-endian", "strided", "read-only"],
)
def test_token_ids_of_any_kind(library: kvmmap.Library, ids: Any) -> None:
    assert library.match(NAMESPACE, ids).length == 300
    with library.session(NAMESPACE, ids) as session:
        assert session.reused == 300


@pytest.mark.parametrize(
    "ids",
    [[-1, 2], [2**31], [2**70], [1.0], [True], None, "abc", {1, 2}, [[1, 2]], np.int64(3), iter([1])],
    ids=lambda ids: "iterator" if hasattr(ids, "__next__") else str(ids),
)
def test_what_are_no_token_ids(library: kvmmap.Library, ids: Any) -> None:
    for call in (library.match, library.session):
        with pytest.raises((kvmmap.DtypeError, kvmmap.ShapeMismatchError), match="token ids"):
            call(NAMESPACE, ids)


def test_tensors_are_token_ids(library: kvmmap.Library) -> None:
    torch = pytest.importorskip("torch")
    for dtype in (torch.int64, torch.int32):
        assert library.match(NAMESPACE, torch.tensor(IDS, dtype=dtype)).length == 300


@pytest.mark.parametrize("limit", [True, 1.5, "3"])
def test_limits_that_are_no_numbers(library: kvmmap.Library, limit: Any) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError, match="limit"):
        library.match(NAMESPACE, IDS, limit=limit)
    assert [library.match(NAMESPACE, IDS, limit=found).length for found in (-1, 0, 2**70)] == [0, 0, 300]


@pytest.mark.parametrize("digest", ["", "abc", "zz" * 16, "0" * 31, "É" * 32, b"0" * 32, None, 5])
def test_what_is_no_namespace(library: kvmmap.Library, digest: Any) -> None:
    with pytest.raises(kvmmap.MetadataError, match="32 hexadecimal digits"):
        library.match(digest, IDS)
    with pytest.raises(kvmmap.KvmmapError, match="Namespace"):
        library.session(digest, IDS)
    assert library.match(NAMESPACE.digest, IDS).length == 300
    assert library.match("0" * 32, IDS).length == 0


@pytest.mark.parametrize(
    "facts",
    [
        {"facts": [1]},
        {"facts": {1: 2}},
        {"facts": {"a": float("nan")}},
        {"facts": {"a": np.int64(1)}},
        {"facts": {"a": json.loads("[" * 150 + "]" * 150)}},
        {"salt": 5},
        {"salt": "\ud800"},
        {"model": kvmmap.ModelInfo(rope={"theta": np.float32(1)})},
    ],
    ids=["list", "numeric key", "nan", "numpy", "deep", "numeric salt", "surrogate salt", "numpy rope"],
)
def test_facts_that_can_not_be_digested(library: kvmmap.Library, facts: Any) -> None:
    with pytest.raises(kvmmap.MetadataError):
        library.session(kvmmap.Namespace.build(**SHAPE, **facts), [1, 2])
    assert len(library.namespaces()) == 1


@pytest.mark.parametrize("name", ["", "..", "../../etc/passwd", "x" * 5000, "模型/é \n\0", "\ud800", ".", "a/"])
def test_models_of_any_name(library: kvmmap.Library, name: str) -> None:
    namespace = kvmmap.Namespace.build(**SHAPE, model=kvmmap.ModelInfo(name=name))
    assert say(library, IDS, namespace) == 0
    assert say(library, IDS, namespace) == 300
    assert {path.parent.parent for path in Path(library.path).rglob("*.kvm")} == {Path(library.path) / "caches"}
    library.rebuild()
    assert library.match(namespace, IDS).length == 300


@pytest.mark.parametrize("name", ["", "x", "..", "a/b", None, 5])
def test_names_of_no_segment(library: kvmmap.Library, name: Any) -> None:
    for call in (library.entry, library.remove, library.pin, library.unpin):
        with pytest.raises(kvmmap.CacheNotFoundError, match="no segment"):
            call(name)


@pytest.mark.parametrize("metadata", [[1], "abc", {"a": object()}, {"a": float("nan")}, {"library": 1}])
def test_metadata_of_a_session(library: kvmmap.Library, metadata: Any) -> None:
    with pytest.raises(kvmmap.MetadataError):
        library.session(NAMESPACE, text(20, 2), metadata=metadata)
    assert library.check().segments == 1


# Settings and places


@pytest.mark.parametrize(
    "options",
    [
        *({"max_bytes": value} for value in (0, -1, "5", 1.5, True)),
        *({"ttl": value} for value in (-1, "5", float("nan"), float("inf"), True, 10**400)),
    ],
    ids=str,
)
def test_settings_that_are_refused(tmp_path: Path, options: Any) -> None:
    with pytest.raises(kvmmap.ShapeMismatchError):
        kvmmap.Library(tmp_path / "library", **options)
    assert not (tmp_path / "library").exists()


def test_settings_of_numpy(tmp_path: Path) -> None:
    kvmmap.Library(tmp_path / "library", np.int64(10**6), ttl=np.float64(3)).close()
    with kvmmap.Library(tmp_path / "library") as library:
        assert library.max_bytes == 10**6


@pytest.mark.parametrize("remote", ["", "nope", "nope://x/y", "s3://", "memory://", "file:///tmp/x", 5])
def test_a_store_that_is_none_is_not_remembered(tmp_path: Path, remote: Any) -> None:
    with pytest.raises(kvmmap.KvmmapError):
        kvmmap.Library(tmp_path / "library", remote=remote)
    with kvmmap.Library(tmp_path / "library") as library:
        assert library.remote is None
        assert say(library, IDS) == 0


@pytest.mark.parametrize(
    "change",
    [
        *({"number": value} for value in (5, "../../x", "", None)),
        *({"max_bytes": value} for value in ("x", -7, True, 1.5)),
        *({"ttl": value} for value in (-1, "x")),
        *({"remote": value} for value in (5, [])),
        {"version": "1"},
    ],
    ids=str,
)
def test_damaged_settings(library: kvmmap.Library, change: Any) -> None:
    path = Path(library.path) / "library.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(kvmmap.CorruptCacheError, match="settings are damaged"):
        kvmmap.Library(library.path)
    path.write_text("[" * 100_000)
    with pytest.raises(kvmmap.CorruptCacheError, match="settings are damaged"):
        kvmmap.Library(library.path)
    path.unlink()
    with kvmmap.Library(library.path) as again:
        assert again.match(NAMESPACE, IDS).length == 300


def test_settings_of_a_later_release(library: kvmmap.Library) -> None:
    path = Path(library.path) / "library.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    with kvmmap.Library(library.path) as again:
        assert again.match(NAMESPACE, IDS).length == 300
    path.write_text(json.dumps({"version": 99, "number": "another kind"}))
    with pytest.raises(kvmmap.VersionMismatchError, match="newer kvmmap"):
        kvmmap.Library(library.path)


def test_a_library_that_is_moved_while_it_is_open(library: kvmmap.Library, tmp_path: Path) -> None:
    os.rename(library.path, tmp_path / "moved")
    for call in (lambda: library.match(NAMESPACE, IDS), lambda: say(library, IDS), library.entries, library.check):
        with pytest.raises(kvmmap.CacheNotFoundError, match="moved or deleted while it was open"):
            call()
    assert not os.path.exists(library.path)
    with kvmmap.Library(tmp_path / "moved") as moved:
        assert say(moved, prompt(IDS, [1])) == 300
    os.rename(tmp_path / "moved", library.path)
    assert library.match(NAMESPACE, prompt(IDS, [1])).length == 301


def test_links_to_a_library_and_its_folders(library: kvmmap.Library, tmp_path: Path) -> None:
    os.symlink(library.path, tmp_path / "link")
    with kvmmap.Library(tmp_path / "link") as linked:
        assert say(linked, prompt(IDS, [1])) == 300
    assert library.match(NAMESPACE, prompt(IDS, [1])).length == 301
    shutil.move(Path(library.path) / "caches", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", Path(library.path) / "caches")
    assert say(library, prompt(IDS, [1, 2])) == 301
    assert library.check().broken == ()


def test_files_that_no_library_made_stay(library: kvmmap.Library) -> None:
    (segment,) = library.entries()
    folder = Path(segment.path).parent
    (folder / "text.kvm").write_text("no cache")
    (folder / "empty.kvm").touch()
    (folder / "folder.kvm").mkdir()
    kvmmap.create(folder / "plain.kvm", capacity=10, **SHAPE).close()
    os.mkfifo(folder / "pipe.kvm")
    os.symlink("/nonexistent", folder / "dangling.kvm")
    os.symlink(folder / "loop.kvm", folder / "loop.kvm")
    (folder.parent / "note.kvm").touch()
    (folder.parent / "note.txt").touch()
    names = sorted(path.name for path in folder.parent.rglob("*") if path.name != Path(segment.path).name)
    for report in (library.check(), library.rebuild()):
        assert sorted(report.broken) == ["empty", "plain", "text"]
        assert report.removed == ()
    assert library.match(NAMESPACE, IDS).length == 300
    assert [choice.segment.name for choice in library.evict(1, dry_run=True)] == [segment.name]
    assert [choice.segment.name for choice in library.evict(1)] == [segment.name]
    assert sorted(path.name for path in folder.parent.rglob("*")) == names
    library.remove("text")  # what is asked for by name goes
    assert not (folder / "text.kvm").exists()


# Processes


def test_a_library_is_not_pickled(library: kvmmap.Library) -> None:
    for call in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(kvmmap.KvmmapError, match="open it by its path"):
            call(library)


@pytest.mark.parametrize("new", [0, 10])
@pytest.mark.parametrize("continues", [True, False])
def test_a_forked_process_closes_a_session(library: kvmmap.Library, new: int, continues: bool) -> None:
    ids = prompt(IDS if continues else IDS[:200], text(10, 2))
    session = library.session(NAMESPACE, ids)
    assert session.continues == continues
    compute(session, ids[: session.reused + new])
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            session.close()
            code = int(say(library, prompt(text(20, 8))) != 0)
        finally:
            sys.stdout.flush()
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0
    assert library.entry(session.name).writing
    session.extend(*rows_of(ids, session.seq_len), ids[session.seq_len :])
    session.close()
    assert library.match(NAMESPACE, ids).length == len(ids)
    library.check()
    check_consistent(library)


def test_a_budget_that_another_handle_sets(library: kvmmap.Library) -> None:
    assert library.max_bytes is None
    with kvmmap.Library(library.path, 400_000, ttl=1000) as other:
        assert library.max_bytes == 400_000
        for seed in range(20):
            say(library, text(300, 100 + seed))
            assert library.stats().bytes <= 400_000
        assert library.stats().evictions > 0
        assert {entry.ttl for entry in library.entries()} == {1000}
        assert library.max_bytes == other.max_bytes
    path = Path(library.path) / "library.json"
    good = path.read_text()
    for damaged in ("{", json.dumps(json.loads(good) | {"version": 99}), json.dumps({"version": 1, "number": "0" * 8})):
        path.write_text(damaged)
        assert library.max_bytes == 400_000
        assert say(library, text(300, 500)) in (0, 300)
    path.unlink()
    assert library.max_bytes == 400_000
    path.write_text(json.dumps(json.loads(good) | {"max_bytes": 500_000}))
    assert library.max_bytes == 500_000
