"""Creating and replacing files: links keep their targets, and temporary files of dead creators are removed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.support import check_filled, make_file

import kvmmap
from kvmmap.storage.posix import PosixFile


@pytest.fixture
def link(tmp_path: Path) -> Path:
    """A link to a cache of 5 positions in another folder."""
    (tmp_path / "disk").mkdir()
    make_file(tmp_path / "disk" / "cache.kvm", 5).close()
    place = tmp_path / "link.kvm"
    place.symlink_to(tmp_path / "disk" / "cache.kvm")
    return place


REPLACEMENTS: dict[str, tuple[Callable[[Path], object], int]] = {
    "resize": (lambda link: kvmmap.resize(link, 50), 5),
    "compact": (lambda link: kvmmap.compact(link), 5),
    "create": (lambda link: make_file(link, 3, overwrite=True).close(), 3),
    "copy": (lambda link: kvmmap.copy(make_other(link), link, overwrite=True), 7),
}


def make_other(link: Path) -> Path:
    make_file(link.with_name("other.kvm"), 7).close()
    return link.with_name("other.kvm")


@pytest.mark.parametrize("name", REPLACEMENTS)
def test_the_target_of_a_link_is_replaced_not_the_link(link: Path, name: str) -> None:
    replace, length = REPLACEMENTS[name]
    replace(link)
    assert link.is_symlink()
    assert not link.resolve().is_symlink()
    for place in (link, link.resolve()):
        with kvmmap.open(place) as cache:
            check_filled(cache, length)
            assert cache.path == str(link.resolve())
    assert [entry.name for entry in link.resolve().parent.iterdir()] == ["cache.kvm"]


def test_a_link_is_removed_not_its_target(link: Path) -> None:
    target = link.resolve()
    kvmmap.remove(link)
    assert not link.is_symlink()
    assert target.exists()


def test_a_link_to_nothing(tmp_path: Path) -> None:
    link = tmp_path / "link.kvm"
    link.symlink_to(tmp_path / "target.kvm")
    with pytest.raises(kvmmap.CacheExistsError):
        make_file(link)
    make_file(link, 3, overwrite=True).close()
    assert link.is_symlink()
    assert (tmp_path / "target.kvm").is_file()


LEFT = [
    ".cache.kvm.0123456789ab.tmp",
    "cache.kvm.0123456789ab.partial",
    ".cache.kvm.0123456789ab.partial.0123456789ab.tmp",
]
OTHERS = [
    ".other.kvm.0123456789ab.tmp",
    "cache.kvm.0123456789abcdef01234567.partial",  # a copy that will be gone on with
    ".cache.kvm.0123456789aX.tmp",
    "xcache.kvm.0123456789ab.partial",
    ".cacheXkvm.0123456789ab.tmp",
]


@pytest.mark.parametrize("how", ["create", "overwrite", "resize", "import"])
def test_temporary_files_of_dead_creators_are_removed(tmp_path: Path, how: str) -> None:
    path = tmp_path / "cache.kvm"
    if how in ("overwrite", "resize"):
        make_file(path, 5).close()
    for name in [*LEFT, *OTHERS]:
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - 1000,) * 2)
    if how == "resize":
        kvmmap.resize(path, 50)
    elif how == "import":
        make_file(tmp_path / "source.kvm", 2).close()
        kvmmap.export_tensors(tmp_path / "source.kvm", tmp_path / "t.safetensors")
        kvmmap.import_tensors(tmp_path / "t.safetensors", path)
    else:
        make_file(path, 5, overwrite=how == "overwrite").close()
    left = {entry.name for entry in tmp_path.iterdir()}
    assert left & {*LEFT, *OTHERS} == {*OTHERS}


def test_temporary_files_of_live_creators_stay(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    maker = PosixFile.create_beside(str(path))
    os.utime(maker.path, (time.time() - 10_000,) * 2)
    young = tmp_path / LEFT[0]
    young.write_bytes(b"just made")
    make_file(path, 5).close()
    assert os.path.exists(maker.path)
    assert young.exists()
    maker.discard()


def test_the_temporary_file_of_a_killed_creator_is_removed(tmp_path: Path) -> None:
    """The creator is killed with SIGKILL."""
    path = tmp_path / "cache.kvm"
    child = os.fork()
    if child == 0:
        PosixFile.create_beside(str(path))
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    os.utime(left, (time.time() - 1000,) * 2)
    make_file(path, 5).close()
    assert [entry.name for entry in tmp_path.iterdir()] == ["cache.kvm"]
