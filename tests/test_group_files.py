"""Zarr groups among other programs and files: attributes of others, links, odd names, locks of copies, workers."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import zarr
from helpers.objects import new_place
from helpers.support import check_filled, fill, make_file, rows

import kvmmap
from kvmmap.storage.objects.lock import LOCK_KEY
from kvmmap.storage.zarr.placement import create_group, open_locked


@pytest.fixture
def group(tmp_path: Path) -> Path:
    return tmp_path / "prompt.zarr"


def attributes(group: Path) -> dict[str, Any]:
    found = dict(zarr.open_group(group, mode="r").attrs)
    found.pop("kvmmap")
    return found


ATTRIBUTES = {"title": "a prompt", "tags": ["x", {"y": None}], "é": 1.5, "kvmmap_like": {"version": 7}}


def test_attributes_of_others_survive_commits(group: Path) -> None:
    make_file(group, 300).close()
    zarr.open_group(group, mode="r+").attrs.update(ATTRIBUTES)
    assert attributes(group) == ATTRIBUTES
    with kvmmap.open(group, "a") as cache:
        fill(cache, 310)
        cache.flush()
        cache.truncate(305)
        cache.metadata = {"mine": 1}
    assert attributes(group) == ATTRIBUTES
    with kvmmap.open(group) as cache:
        check_filled(cache, 305)
        assert cache.metadata == {"mine": 1}
        assert cache.verify().sound


def test_attributes_set_beside_an_open_writer_survive(group: Path) -> None:
    with make_file(group, 300) as cache:
        cache.flush()
        for number in range(3):
            zarr.open_group(group, mode="r+").attrs["number"] = number
            fill(cache, 301 + number)
            cache.flush()
            assert attributes(group) == {"number": number}
        zarr.open_group(group, mode="r+").attrs["number"] = "truncating"
        cache.truncate(100)
        zarr.open_group(group, mode="r+").attrs["number"] = "closing"
    assert attributes(group) == {"number": "closing"}
    with kvmmap.open(group) as cache:
        check_filled(cache, 100)


@pytest.mark.filterwarnings("ignore:Consolidated metadata")
def test_consolidated_metadata_survives(group: Path) -> None:
    make_file(group, 300).close()
    zarr.consolidate_metadata(group)
    with kvmmap.open(group, "a") as cache:
        fill(cache, 310)
    assert zarr.open_consolidated(group)["layers/0/key_codes"].shape[0] == cache.capacity
    assert json.loads((group / "zarr.json").read_text())["consolidated_metadata"]["metadata"]


def test_another_commit_is_still_told_from_attributes() -> None:
    """A root of another writer is not mistaken for one of ours with other attributes."""
    place = new_place()
    with kvmmap.QuantizedKvCache(1, 10, 1, 8) as memory:
        writer = create_group(place, memory.geometry, memory.storage.document)
    cache = kvmmap.QuantizedKvCache.of_storage(writer)
    thief = kvmmap.QuantizedKvCache.of_storage(open_locked(place, break_lock=True))
    thief.push_step(rows(1, 1, 8), rows(1, 1, 8))
    thief.flush()
    cache.push_step(rows(1, 1, 8, seed=5), rows(1, 1, 8, seed=5))
    with pytest.raises(kvmmap.CacheChangedError, match="another writer"):
        cache.flush()
    cache.close()
    thief.close()


# Links


@pytest.mark.parametrize("ending", ["kvm", "zarr"])
def test_remove_of_a_link_removes_the_link(tmp_path: Path, ending: str) -> None:
    real, link = tmp_path / f"real.{ending}", tmp_path / f"link.{ending}"
    make_file(real, 300).close()
    link.symlink_to(real)
    with kvmmap.open(link, "a") as cache:
        fill(cache, 301)
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.remove(link)
    assert link.is_symlink()
    kvmmap.remove(link)
    assert not os.path.lexists(link)
    with kvmmap.open(real) as cache:
        check_filled(cache, 301)


def test_links_on_the_way(tmp_path: Path) -> None:
    """A linked folder above a group is no link to it, and links within it are removed and not followed."""
    (tmp_path / "real").mkdir()
    (tmp_path / "folder").symlink_to("real")
    make_file(tmp_path / "folder" / "a.zarr", 5).close()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("kept")
    (tmp_path / "real" / "a.zarr" / "layers" / "elsewhere").symlink_to(tmp_path / "kept")
    kvmmap.remove(tmp_path / "folder" / "a.zarr")
    assert not (tmp_path / "real" / "a.zarr" / "zarr.json").exists()
    assert (tmp_path / "kept" / "file").read_text() == "kept"


def test_a_link_to_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link.zarr"
    link.symlink_to(tmp_path / "nothing.zarr")
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.open(link)
    with pytest.raises(kvmmap.NotACacheError, match="not there"):
        make_file(link, 1)
    assert link.is_symlink()


def test_overwriting_a_link_replaces_the_target(tmp_path: Path) -> None:
    make_file(tmp_path / "real.zarr", 5).close()
    (tmp_path / "link.zarr").symlink_to("real.zarr")
    make_file(tmp_path / "link.zarr", 7, overwrite=True).close()
    assert (tmp_path / "link.zarr").is_symlink()
    with kvmmap.open(tmp_path / "real.zarr") as cache:
        check_filled(cache, 7)


# Hard links


def test_a_copy_by_hard_links_is_a_cache_of_its_own(tmp_path: Path) -> None:
    """As `cp -l` and backups make them: neither its lock nor its rows are the other's."""
    first, second = tmp_path / "a.zarr", tmp_path / "b.zarr"
    make_file(first, 300).close()
    shutil.copytree(first, second, copy_function=os.link)
    assert os.path.samefile(first / LOCK_KEY, second / LOCK_KEY)
    with kvmmap.open(first, "a") as one, kvmmap.open(second, "a") as other:
        fill(one, 310)
        other.truncate(10)
        fill(other, 20)
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(first, "a")
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(second, "a")
    for path, length in ((first, 310), (second, 20)):
        with kvmmap.open(path) as cache:
            check_filled(cache, length)
            assert cache.verify().sound


def opens_and_closes(group: Path, errors: list[Exception]) -> None:
    try:
        kvmmap.open(group, "a", timeout=20).close()
    except Exception as error:
        errors.append(error)


def test_who_waits_for_a_group_that_is_removed_is_told(group: Path) -> None:
    for _ in range(10):
        cache = make_file(group, 5)
        found: list[Exception] = []
        thread = threading.Thread(target=opens_and_closes, args=(group, found))
        thread.start()
        cache.close()
        try:
            kvmmap.remove(group, timeout=20)
        finally:
            thread.join()
        assert not [error for error in found if not isinstance(error, kvmmap.CacheNotFoundError)]
        with pytest.raises(kvmmap.CacheNotFoundError):
            kvmmap.open(group)
        shutil.rmtree(group, ignore_errors=True)


# Names


@pytest.mark.parametrize("name", [b"caf\xe9", b"\xff\xfe", b"a\xc3", b"\xed\xa0\x80", "é".encode()])
def test_groups_with_names_that_are_not_utf8(tmp_path: Path, name: bytes) -> None:
    folder = os.path.join(os.fsencode(tmp_path), name)
    os.mkdir(folder)
    for path in (os.path.join(folder, name + b".zarr"), os.fsdecode(os.path.join(folder, name + b"2.zarr"))):
        make_file(path, 300, metadata={"a": 1}).close()  # type: ignore[arg-type]
        with kvmmap.open(path, "a") as cache:
            fill(cache, 310)
            with pytest.raises(kvmmap.CacheLockedError):
                kvmmap.open(path, "a")
        with kvmmap.open(path) as cache:
            check_filled(cache, 310)
            assert cache.verify().sound
            assert os.fsencode(cache.path) == os.fsencode(path)  # type: ignore[type-var]
        assert os.fsdecode(path) in kvmmap.find(tmp_path)
        kvmmap.copy(path, os.fsencode(path) + b".kvm")  # type: ignore[arg-type]
        kvmmap.copy(os.fsencode(path) + b".kvm", os.fsencode(path) + b".back.zarr")  # type: ignore[arg-type]
        with kvmmap.open(os.fsencode(path) + b".back.zarr") as cache:  # type: ignore[arg-type]
            check_filled(cache, 310)
        kvmmap.remove(path)
        assert not os.path.exists(path)
