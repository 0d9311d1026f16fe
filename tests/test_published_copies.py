"""Published lengths count in the inode that recorded them alone: a copy made beside a writer is its last commit."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.cli_support import click_run
from helpers.support import check_filled, fill, make_file, rows

import kvmmap
from kvmmap.format import HOME_BYTES, WHOLE_CACHE, Extent, Section
from kvmmap.storage.file.mapped_file import open_file, read_superblock
from kvmmap.storage.posix import PosixFile

COMMITTED, PUBLISHED = 300, 500


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A file that a writer has open, with positions that are published and not committed."""
    path = tmp_path / "cache.kvm"
    with make_file(path, COMMITTED) as cache:
        cache.flush()
        fill(cache, PUBLISHED)
        yield path


def by_rewriting(source: Path, target: Path) -> None:
    target.write_bytes(source.read_bytes())


def by_another_device(source: Path, target: Path) -> None:
    """Move a file through another device, as mv and backups do: the result is a new inode."""
    elsewhere = Path("/dev/shm") / f"{os.getpid()}.kvm"
    shutil.copy2(source, elsewhere)
    shutil.move(elsewhere, target)


COPIES: dict[str, Callable[[Path, Path], object]] = {
    "cp": lambda source, target: subprocess.run(["cp", source, target], check=True),
    "cp -a": lambda source, target: subprocess.run(["cp", "-a", source, target], check=True),
    "cp --reflink": lambda source, target: subprocess.run(["cp", "--reflink=auto", source, target], check=True),
    "copyfile": shutil.copyfile,
    "bytes": by_rewriting,
    "another device": by_another_device,
    "tar": lambda source, target: subprocess.run(
        f'tar -C "{source.parent}" -cf - {source.name} | tar -xOf - > "{target}"', shell=True, check=True
    ),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_the_last_commit(live: Path, how: str) -> None:
    copy = live.with_name("copy.kvm")
    COPIES[how](live, copy)
    with kvmmap.open(live) as original, kvmmap.open(copy) as cache:
        check_filled(original, PUBLISHED)
        check_filled(cache, COMMITTED)
        assert cache.facts()["state"] == "interrupted"
        assert cache.verify().sound
    assert click_run("inspect", copy, "--json").exit_code == 0
    with kvmmap.open(copy, "a") as cache:
        check_filled(cache, COMMITTED)
        fill(cache, 700)
        with kvmmap.open(copy) as reader:
            check_filled(reader, 700)


def test_gc_removes_a_copy(live: Path) -> None:
    shutil.copyfile(live, live.with_name("copy.kvm"))
    assert click_run("gc", live.parent, "--max-bytes", "0", "--yes").exit_code == 0
    assert [path.name for path in live.parent.iterdir()] == [live.name]


def test_a_copy_of_two_moments_returns_no_mixed_rows(tmp_path: Path) -> None:
    """The head of the file before a truncation, its rows from after it."""
    path, copy = tmp_path / "cache.kvm", tmp_path / "copy.kvm"
    with make_file(path, COMMITTED) as cache:
        cache.flush()
        fill(cache, PUBLISHED)
        before = path.read_bytes()
        cache.truncate(400)
        fill(cache, 450)
        other = -rows(2, 100, 2, 8, seed=7)
        cache.extend(other, other)
        after = path.read_bytes()
        with contextlib.closing(open_file(str(path), writable=False)) as file:
            half = read_superblock(file).sections[16, 1].offset  # layer 1 from another moment than layer 0
        copy.write_bytes(before[:half] + after[half:])
    with kvmmap.open(copy) as cache:
        check_filled(cache, COMMITTED)


def test_what_keeps_the_inode_keeps_published_lengths(live: Path) -> None:
    moved, linked = live.with_name("moved.kvm"), live.with_name("linked.kvm")
    live.rename(moved)
    os.link(moved, linked)
    for path in (moved, linked):
        with kvmmap.open(path) as cache:
            check_filled(cache, PUBLISHED)
    moved.rename(live)


def test_a_killed_writer_leaves_what_it_published(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    child = os.fork()
    if child == 0:
        cache = make_file(path, PUBLISHED)
        assert len(cache) == PUBLISHED
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with kvmmap.open(path) as cache:
        check_filled(cache, PUBLISHED)
    copy = path.with_name("copy.kvm")
    shutil.copyfile(path, copy)
    with kvmmap.open(copy) as cache:
        assert len(cache) == 0
    with kvmmap.open(path, "a") as cache:
        check_filled(cache, PUBLISHED)


NEW_FILES: dict[str, Callable[[Path], object]] = {
    "resize": lambda path: kvmmap.resize(path, 900),
    "compact and resize": lambda path: (kvmmap.compact(path), kvmmap.resize(path, 900)),
    "overwrite": lambda path: kvmmap.copy(path, path.with_name("x.kvm")) and path.with_name("x.kvm").replace(path),
    "fork": lambda path: (kvmmap.fork(path, path.with_name("f.kvm")).close(), path.with_name("f.kvm").replace(path)),
}


@pytest.mark.parametrize("how", NEW_FILES)
def test_a_new_inode_publishes_for_itself(tmp_path: Path, how: str) -> None:
    path = tmp_path / "cache.kvm"
    make_file(path, 300).close()
    NEW_FILES[how](path)
    with kvmmap.open(path, "a") as cache, kvmmap.open(path) as reader:
        fill(cache, 600)
        reader.refresh()
        check_filled(reader, 600)


def test_an_inode_number_that_is_used_again(tmp_path: Path) -> None:
    """Restored in the place of the original, a copy may get the very number of its inode."""
    path = tmp_path / "cache.kvm"
    seen = set()
    for _ in range(20):
        path.write_bytes(b"")
        with contextlib.closing(PosixFile.open(str(path), writable=False)) as file:
            seen.add(file.inode_id())
        path.unlink()
    assert len(seen) == 20


def test_a_file_of_an_earlier_writer(live: Path) -> None:
    """It leaves the word 0: its lengths count as they did."""
    with contextlib.closing(open_file(str(live), writable=True)) as file:
        extent = read_superblock(file).live_record
        file.write((extent.offset + extent.size - 8,), (bytes(8),))
    with kvmmap.open(live) as cache:
        check_filled(cache, PUBLISHED)


def test_a_record_that_fills_its_page(tmp_path: Path) -> None:
    path, copy = tmp_path / "cache.kvm", tmp_path / "copy.kvm"
    with kvmmap.create(path, num_layers=504, capacity=2, num_kv_heads=1, head_dim=1) as cache:
        with contextlib.closing(open_file(str(path), writable=False)) as file:
            superblock = read_superblock(file)
        cache.push_step(rows(504, 1, 1), rows(504, 1, 1))
        with kvmmap.open(path) as reader:
            assert len(reader) == 1
        shutil.copy(path, copy)
        with kvmmap.open(copy) as reader:
            assert len(reader) == 0
    # In files of earlier writers another section begins where the word would be.
    live, sections = superblock.live_record, dict(superblock.sections)
    sections[Section.METADATA, WHOLE_CACHE] = Extent(live.offset + 4096, 4096)
    assert live.size == 4096 + HOME_BYTES
    assert replace(superblock, sections=sections).live_record.size == 4096


@pytest.mark.parametrize("seed", range(3))
def test_copies_beside_a_writer_that_truncates(tmp_path: Path, seed: int) -> None:
    """Really copied while it runs: what a copy serves is a commit, or is refused; and verify sees the rest."""
    path = tmp_path / "cache.kvm"
    child = os.fork()
    if child == 0:
        try:
            with make_file(path, 200) as cache:
                generator = iter(range(seed, 10**6))
                while True:
                    cache.truncate(next(generator) % 150 + 50)
                    fill(cache, 250)
                    if next(generator) % 3 == 0:
                        cache.flush()
        finally:
            os._exit(1)
    try:
        while not path.exists():
            time.sleep(0.01)
        for number in range(10):
            copy = tmp_path / f"copy{number}.kvm"
            shutil.copyfile(path, copy)
            with contextlib.suppress(kvmmap.CorruptCacheError), kvmmap.open(copy) as cache:
                # Fill makes each position's rows from its number alone, so any commit is a prefix of them.
                check_filled(cache, cache.facts()["committed_len"])
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
