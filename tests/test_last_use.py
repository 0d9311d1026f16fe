"""When a cache was last used: reading rows, attending and appending count; looking at it does not."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_support import click_run
from helpers.support import fill, make_file, rows

import kvmmap
from kvmmap.storage.file import last_use
from kvmmap.storage.file.last_use import UseRecorder
from kvmmap.storage.posix import PosixFile

DAY = 86400.0


def age(path: Path, days: float) -> None:
    then = time.time() - days * DAY
    os.utime(path, (then, then))


def days_unused(path: Path) -> float:
    with kvmmap.open(path, record_use=False) as cache:
        used = cache.facts()["last_use_ns"] / 1e9
    return (time.time() - used) / DAY


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed cache of 600 positions that was last used 30 days ago."""
    path = tmp_path / "cache.kvm"
    make_file(path, 600).close()
    age(path, 30)
    return path


def read_late(path: Path, use: Callable[[kvmmap.QuantizedKvCache], object], mode: str = "r") -> None:
    """Use a handle whose use at opening was long ago."""
    with kvmmap.open(path, mode) as cache:  # type: ignore[arg-type]
        age(path, 30)
        cache.storage.holder._use.due = 0.0  # type: ignore[attr-defined]  # as if a minute had gone by
        use(cache)
        assert days_unused(path) < 1


USES: dict[str, Callable[[Path], object]] = {
    "open for reading": lambda path: kvmmap.open(path).close(),
    "open for appending": lambda path: kvmmap.open(path, "a").close(),
    "read rows": lambda path: read_late(path, lambda cache: cache.layers[0].read_keys()),
    "read token ids": lambda path: read_late(path, lambda cache: cache.token_ids),
    "attend": lambda path: read_late(path, lambda cache: cache.layers[1].attend(rows(1, 2, 8))),
    "append": lambda path: read_late(path, lambda cache: fill(cache, 601), "a"),
    "fork": lambda path: kvmmap.fork(path, path.with_name("fork.kvm")).close(),
    "truncate": lambda path: read_late(path, lambda cache: cache.truncate(500), "a"),
}
LOOKS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: click_run("inspect", path),
    "inspect many": lambda path: click_run("inspect", path, path),
    "inspect layer": lambda path: click_run("inspect", path, "--json"),
    "verify": lambda path: click_run("verify", path),
    "tokens": lambda path: click_run("tokens", path),
    "report": lambda path: click_run("report", path, "-o", path.with_suffix(".html")),
    "diff": lambda path: click_run("diff", path, path),
    "copy": lambda path: click_run("copy", path, path.with_name("other.kvm")),
    "export": lambda path: click_run("export", path, path.with_suffix(".safetensors")),
    "gc": lambda path: click_run("gc", path.parent, "--max-bytes", "1G"),
    "gc --dry-run": lambda path: click_run("gc", path.parent, "--max-bytes", "0", "--dry-run"),
    "find": lambda path: kvmmap.find(path.parent),
    "repair": lambda path: click_run("repair", path, path.with_name("repaired.kvm")),
    "every row": lambda path: look(path),
    "a lock refused": lambda path: refused(path),
}


def look(path: Path) -> None:
    with kvmmap.open(path, record_use=False) as cache:
        kvmmap.report.statistics(cache)
        cache.verify()
        cache.layers[0].attend(rows(1, 2, 8))


def refused(path: Path) -> None:
    with kvmmap.open(path, "a", record_use=False):
        age(path, 30)
        with pytest.raises(kvmmap.CacheLockedError):
            kvmmap.open(path, "a")
    age(path, 30)


@pytest.mark.parametrize("name", USES)
def test_a_use_counts(path: Path, name: str) -> None:
    assert days_unused(path) > 29
    USES[name](path)
    assert days_unused(path) < 1


@pytest.mark.skipif(sys.platform != "linux", reason="O_NOATIME is Linux's")
@pytest.mark.parametrize("name", LOOKS)
def test_inspection_does_not_count_as_use(path: Path, name: str) -> None:
    result = LOOKS[name](path)
    assert getattr(result, "exit_code", 0) == 0
    assert days_unused(path) > 29


def test_every_command_that_takes_a_cache_is_listed() -> None:
    """A new command that only looks must open with record_use=False; these don't, or open no cache that exists."""
    commands = {path.stem for path in (Path(__file__).parent.parent / "cli/kvmmap_cli/commands").glob("[a-z]*.py")}
    uses = {"truncate", "resize", "compact", "fork"}
    others = {"bench", "create", "completion", "import", "fetch", "library"}
    assert commands - uses - others <= {name.split()[0] for name in LOOKS}


def test_gc_removes_what_its_dry_run_named(tmp_path: Path) -> None:
    for name, days in (("cold", 3), ("cool", 2), ("hot", 40)):
        make_file(tmp_path / f"{name}.kvm", 600).close()
        age(tmp_path / f"{name}.kvm", days)
    with kvmmap.open(tmp_path / "hot.kvm") as cache:
        cache.layers[0].attend(rows(1, 2, 8))
    keep = str(int(2.5 * (tmp_path / "hot.kvm").stat().st_blocks * 512))
    for _ in range(3):
        told = click_run("gc", tmp_path, "--max-bytes", keep, "--dry-run").stdout
        assert "cold.kvm" in told
        assert "would remove 1 cache" in told
        click_run("verify", tmp_path / "cold.kvm")
    assert click_run("gc", tmp_path, "--max-bytes", keep, "--yes").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cool.kvm", "hot.kvm"]


def test_caches_expire_though_gc_runs_every_night(tmp_path: Path) -> None:
    path = tmp_path / "cache.kvm"
    make_file(path, 5).close()
    for night in range(1, 30):
        age(path, night)
        click_run("gc", tmp_path, "--older-than", "30d", "--yes")
        assert path.exists()
        status = path.stat()
        assert time.time() - max(status.st_atime, status.st_mtime) > (night - 0.1) * DAY
    age(path, 31)
    click_run("gc", tmp_path, "--older-than", "30d", "--yes")
    assert not path.exists()


def test_reading_changes_nothing_in_the_file(path: Path) -> None:
    before, written = path.read_bytes(), path.stat().st_mtime_ns
    with kvmmap.open(path) as cache:
        cache.layers[0].read_keys()
    assert (path.read_bytes(), path.stat().st_mtime_ns) == (before, written)


def test_a_use_is_stored_once_a_minute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored: list[int] = []
    monkeypatch.setattr(last_use.PosixFile, "set_access_time", lambda file, time: stored.append(time))
    with kvmmap.open(path) as cache:
        for _ in range(100):
            cache.layers[0].read_keys()
        assert len(stored) == 1
        later = time.monotonic() + 61
        monkeypatch.setattr(last_use.time, "monotonic", lambda: later)
        for _ in range(100):
            cache.layers[0].read_keys()
    assert len(stored) == 2


def test_a_file_that_may_not_be_changed_is_read(path: Path) -> None:
    path.chmod(0o400)
    with kvmmap.open(path) as cache:
        cache.layers[0].read_keys()
    assert days_unused(path) < 1  # its owner may store the time all the same


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_users_file_is_read(path: Path) -> None:
    path.chmod(0o444)
    folder = os.open(path.parent, os.O_RDONLY)  # the folders above are closed to others
    child = os.fork()
    if child == 0:
        code = 1
        try:
            path.parent.chmod(0o755)
            os.fchdir(folder)
            os.setgid(12345)
            os.setuid(12345)
            file = PosixFile.open(path.name, writable=False)
            UseRecorder(file).record()
            file.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    os.close(folder)


READ_ONLY = """
set -e
mount -t tmpfs none "$1"
cp "$2" "$1/cache.kvm"
touch -d 2001-01-01 "$1/cache.kvm"
mount -o remount,ro "$1"
"$3" -W error -c '
import sys, kvmmap
with kvmmap.open(sys.argv[1]) as cache:
    cache.layers[0].read_keys()
    assert cache.facts()["last_use_ns"] < 1e18
    print(cache.seq_len)
' "$1/cache.kvm"
"""


def test_a_read_only_file_system(namespace: list[str], path: Path, tmp_path: Path) -> None:
    (tmp_path / "mounted").mkdir()
    done = subprocess.run(
        [*namespace, "sh", "-c", READ_ONLY, "sh", tmp_path / "mounted", path, sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "600\n"), done.stderr


def test_resizing_is_a_use(path: Path) -> None:
    kvmmap.resize(path, 700)
    assert days_unused(path) < 1
    with kvmmap.open(path) as cache:
        np.testing.assert_array_equal(cache.token_ids, np.arange(600))
