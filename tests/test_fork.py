"""Forks: the same rows in a new file, created beside a writer, damage included; and removing a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from crash.machine import Machine
from helpers.support import check_filled, fill, make_file, run_python

import kvmmap


def flip(path: Path, needle: bytes) -> None:
    """Change one byte where `needle` lies."""
    data = bytearray(path.read_bytes())
    at = data.find(needle)
    assert at > 0
    data[at] ^= 1
    path.write_bytes(data)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A closed cache of 700 positions: two complete blocks and a tail."""
    path = tmp_path / "source.kvm"
    model = kvmmap.ModelInfo(name="some/model")
    make_file(path, 700, model=model, metadata={"title": "x"}).close()
    return path


@pytest.mark.parametrize("length", [None, 0, 1, 255, 256, 512, 513, 699, 700])
def test_a_fork_has_the_same_prefix_and_is_independent(source: Path, tmp_path: Path, length: int | None) -> None:
    before = source.read_bytes()
    kept = 700 if length is None else length
    with kvmmap.fork(source, tmp_path / "fork.kvm", length=length) as fork:
        check_filled(fork, kept)
        assert (fork.capacity, fork.metadata, fork.model) == (1000, {"title": "x"}, kvmmap.ModelInfo(name="some/model"))
        assert fork.facts()["committed_len"] == kept
        assert fork.verify().sound
        fill(fork, 800)
    assert source.read_bytes() == before
    with kvmmap.open(tmp_path / "fork.kvm") as fork:
        check_filled(fork, 800)
        assert fork.verify().sound
    assert (tmp_path / "fork.kvm").stat().st_mode & 0o777 == 0o600


def test_another_capacity_and_other_geometry(tmp_path: Path) -> None:
    path, fork_path = tmp_path / "a.kvm", tmp_path / "b.kvm"
    with kvmmap.create(path, num_layers=3, capacity=600, num_kv_heads=[1, 3, 2], head_dim=[5, 7, 64]) as cache:
        keys = [
            np.random.default_rng(i).standard_normal((600, h, d)) for i, (h, d) in enumerate([(1, 5), (3, 7), (2, 64)])
        ]
        keys = [key.astype(np.float32) for key in keys]
        cache.extend(keys, keys)
    for capacity in (600, 601, 5000):
        with kvmmap.fork(path, fork_path, capacity=capacity) as fork, kvmmap.open(path) as cache:
            assert fork.capacity == capacity
            assert kvmmap.report.compare(cache, fork).same
            assert fork.verify().sound
        kvmmap.remove(fork_path)
    with pytest.raises(kvmmap.CapacityExceededError):
        kvmmap.fork(path, fork_path, capacity=599)
    assert not fork_path.exists()


def test_rows_beyond_the_prefix_are_not_forked(source: Path, tmp_path: Path) -> None:
    with kvmmap.open(source) as cache:
        secret = cache.layers[0].key_codes[300].tobytes()
    kvmmap.fork(source, tmp_path / "fork.kvm", length=290).close()
    assert secret in source.read_bytes()
    assert secret not in (tmp_path / "fork.kvm").read_bytes()


def test_a_fork_beside_a_writer_has_what_is_published(tmp_path: Path) -> None:
    path = tmp_path / "source.kvm"
    with make_file(path, 300) as writer:
        writer.flush()
        fill(writer, 650)
        with kvmmap.fork(path, tmp_path / "fork.kvm") as fork:
            check_filled(fork, 650)
            assert fork.facts()["committed_len"] == 650
            assert fork.verify().sound
        fill(writer, 660)
        check_filled(writer, 660)


def test_rows_truncated_while_they_are_copied(source: Path, tmp_path: Path) -> None:
    with kvmmap.open(source, "a") as writer, pytest.raises(kvmmap.CacheChangedError):
        kvmmap.fork(source, tmp_path / "fork.kvm", progress=lambda done, total: writer.truncate(10))
    assert [path.name for path in tmp_path.iterdir()] == ["source.kvm"]


def test_damage_in_the_source_is_detected_in_the_fork(source: Path, tmp_path: Path) -> None:
    with kvmmap.open(source) as cache:
        needle = cache.layers[1].key_codes[100].tobytes()
    flip(source, needle)
    with kvmmap.fork(source, tmp_path / "fork.kvm", length=600) as fork:
        (damage,) = fork.verify().damages
        assert (damage.layer, damage.start, damage.stop) == (1, 0, 256)
    with pytest.raises(kvmmap.CorruptCacheError, match="a fork of 0 positions") as caught:
        kvmmap.fork(source, tmp_path / "cut.kvm", length=200)
    assert (caught.value.layer, caught.value.position) == (1, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fork.kvm", "source.kvm"]


def test_a_damaged_block_of_token_ids_is_not_forked(source: Path, tmp_path: Path) -> None:
    flip(source, np.arange(512, 600, dtype="<i4").tobytes())
    kvmmap.fork(source, tmp_path / "fork.kvm", length=512).close()
    with pytest.raises(kvmmap.CorruptCacheError, match="token ids"):
        kvmmap.fork(source, tmp_path / "cut.kvm", length=600)


def test_what_can_not_be_forked(source: Path, tmp_path: Path) -> None:
    with pytest.raises(kvmmap.CacheExistsError):
        kvmmap.fork(source, source)
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.fork(tmp_path / "nothing.kvm", tmp_path / "fork.kvm")
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.fork(source, tmp_path / "nowhere" / "fork.kvm")
    for length in (-1, 701):
        with pytest.raises(kvmmap.PositionOutOfRangeError):
            kvmmap.fork(source, tmp_path / "fork.kvm", length=length)
    (tmp_path / "text").write_text("no cache")
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.fork(tmp_path / "text", tmp_path / "fork.kvm")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.kvm", "text"]


def test_an_interrupted_fork_leaves_nothing(source: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kvmmap.fork(source, tmp_path / "fork.kvm", progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["source.kvm"]


@pytest.fixture(params=["btrfs", "xfs"])
def reflinking(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system that can share blocks."""
    make = shutil.which(f"mkfs.{request.param}")
    if make is None or os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip(f"needs root and mkfs.{request.param}")
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    with image.open("wb") as file:
        file.truncate(320 << 20)
    subprocess.run([make, "-q", image], check=True, capture_output=True)
    mounted = subprocess.run(["mount", "-o", "loop", image, folder], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"can't mount {request.param} here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def test_a_fork_shares_its_rows_where_the_file_system_can(reflinking: Path) -> None:
    source = reflinking / "source.kvm"
    x = np.random.default_rng(0).standard_normal((4, 20_000, 2, 128), dtype=np.float32)
    with kvmmap.create(source, num_layers=4, capacity=30_000, num_kv_heads=2, head_dim=128) as cache:
        cache.extend(x, x)
    os.sync()
    free = os.statvfs(reflinking).f_bavail * os.statvfs(reflinking).f_frsize
    with kvmmap.fork(source, reflinking / "fork.kvm", length=19_999, capacity=40_000) as fork:
        os.sync()
        used = free - os.statvfs(reflinking).f_bavail * os.statvfs(reflinking).f_frsize
        assert used < fork.memory_bytes / 20
        fork.push_step(x[:, 0], x[:, 0])
        assert fork.verify().sound
    with kvmmap.open(source) as cache:
        assert cache.verify().sound
        assert len(cache.layers[0].key_codes) == 20_000


# remove


def test_remove(source: Path, tmp_path: Path) -> None:
    with kvmmap.open(source) as reader:
        kvmmap.remove(source)
        assert not source.exists()
        check_filled(reader, 700)
    with pytest.raises(kvmmap.CacheNotFoundError):
        kvmmap.remove(source)
    (tmp_path / "text").write_text("no cache")
    with pytest.raises(kvmmap.NotACacheError):
        kvmmap.remove(tmp_path / "text")
    assert (tmp_path / "text").exists()


def test_a_cache_that_is_being_written_is_not_removed(source: Path) -> None:
    with kvmmap.open(source, "a"):
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.remove(source)
        told = run_python(
            "import kvmmap, sys\ntry: kvmmap.remove(sys.argv[1])\nexcept kvmmap.CacheLockedError: print('locked')",
            source,
        )
        assert told.stdout == "locked\n"
        assert source.exists()
    kvmmap.remove(source)


@pytest.mark.parametrize("length", [512, 600])
def test_a_flushed_fork_survives_power_loss(tmp_path: Path, length: int) -> None:
    """Of whole blocks as well, whose commit comes from the source."""
    machine = Machine(str(tmp_path / "machine"))
    os.makedirs(machine.folder)
    path, fork_path = Path(machine.folder) / "a.kvm", Path(machine.folder) / "b.kvm"
    with machine.running():
        make_file(path, length).close()
        fork = kvmmap.fork(path, fork_path)
        fork.flush()
        images = [machine.disk.power_loss(Random(seed)) for seed in range(20)]
        fork.close()
        machine.boot += 1
        for image in images:
            (tmp_path / "b.kvm").write_bytes(image["b.kvm"])
            with kvmmap.open(tmp_path / "b.kvm") as found:
                check_filled(found, length)
                assert found.verify().sound
