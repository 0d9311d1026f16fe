"""Names of temporary files, of caches with names of every length and script."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_support import click_run
from hypothesis import given
from hypothesis import strategies as st

import kvmmap
from kvmmap.storage.temporary import is_temporary, left_over_names, partial_path, temporary_path

STAMP = "0123456789abcdef01234567"
NAMES = st.binary(min_size=1, max_size=243).filter(lambda data: not {0, 47} & set(data)).map(os.fsdecode)


def size(path: str) -> int:
    return len(os.fsencode(os.path.basename(path)))


@given(NAMES, st.sampled_from(["", ".kvm", ".safetensors"]))
def test_names_fit_and_are_recognised(name: str, ending: str) -> None:
    path = f"/folder/{name}{ending}"
    parts = [partial_path(path), partial_path(path, STAMP)]
    temporary = [temporary_path(path), *map(temporary_path, parts)]
    assert all(os.path.dirname(made) == "/folder" and size(made) <= 255 for made in [*parts, *temporary])
    pattern = left_over_names(path)
    assert pattern.fullmatch(os.path.basename(temporary[0]))
    assert pattern.fullmatch(os.path.basename(temporary[1]))
    assert pattern.fullmatch(os.path.basename(parts[0]))
    assert not pattern.fullmatch(os.path.basename(parts[1]))
    assert left_over_names(parts[0]).pattern == pattern.pattern
    if ending:
        assert all(is_temporary(os.path.basename(made)) for made in [*parts, *temporary])


def test_long_names_that_begin_alike_are_kept_apart() -> None:
    one, other = ("/a/" + "x" * 240 + end + ".kvm" for end in "12")
    assert partial_path(one, STAMP) != partial_path(other, STAMP)
    assert not left_over_names(one).fullmatch(os.path.basename(temporary_path(other)))


@pytest.mark.parametrize("name", ["a.kvm", "a.tmp", ".a.tmp", "a.partial", ".a.kvm.tmp", ".a.txt.0123456789ab.tmp", ""])
def test_other_names_are_not_recognised(name: str) -> None:
    assert not is_temporary(name)


@pytest.mark.parametrize("length", [199, 200, 201, 222, 223, 230, 231, 245, 250, 255])
@pytest.mark.parametrize("letter", ["n", "é", "漢"])
def test_names_of_every_legal_length(tmp_path: Path, length: int, letter: str) -> None:
    """Everything that makes a file can make it, and leaves nothing beside it."""

    def named(kind: str, ending: str) -> Path:
        room = length - len(ending) - 1
        one = len(os.fsencode(letter))
        return tmp_path / (kind + letter * (room // one) + "x" * (room % one) + ending)

    source = named("s", ".kvm")
    with kvmmap.create(source, num_layers=1, capacity=8, num_kv_heads=1, head_dim=8) as cache:
        cache.extend(np.ones((1, 3, 1, 8), np.float32), np.ones((1, 3, 1, 8), np.float32))
    kvmmap.copy(source, named("c", ".kvm"))
    kvmmap.fork(source, named("f", ".kvm")).close()
    kvmmap.repair(source, named("r", ".kvm"))
    kvmmap.resize(source, 16)
    kvmmap.copy(source, named("z", ".zarr"))
    kvmmap.export_tensors(source, named("t", ".safetensors"))
    kvmmap.import_tensors(named("t", ".safetensors"), named("i", ".kvm"))
    made = {named(kind, ".kvm") for kind in "scfri"} | {named("z", ".zarr"), named("t", ".safetensors")}
    assert set(tmp_path.iterdir()) == made


def test_gc_removes_temporary_files_of_the_dead_and_no_others(tmp_path: Path) -> None:
    path = str(tmp_path / "cache.kvm")
    dead = [temporary_path(path), partial_path(path), partial_path(path, STAMP), temporary_path(partial_path(path))]
    held = partial_path(path, STAMP[::-1])
    kvmmap.create(held, num_layers=1, capacity=8, num_kv_heads=1, head_dim=8).close()
    mine = [str(tmp_path / name) for name in ("a.partial", ".b.tmp", ".c.txt.0123456789ab.tmp")]
    link = temporary_path(path)
    os.symlink(mine[0], link)
    young = partial_path(path, "f" * 24)
    for name in [*dead, *mine, young]:
        Path(name).write_bytes(b"x" * 5000)
    with kvmmap.open(held, "a"):
        for name in [*dead, *mine, held]:
            os.utime(name, (time.time() - 2 * 86400,) * 2)
        result = click_run("gc", tmp_path, "--max-bytes", "1G", "--yes")
        assert result.exit_code == 0, result.stderr
        assert "removed 4 files" in result.stdout
        assert {str(entry) for entry in tmp_path.iterdir()} == {*mine, young, link, held}


def test_gc_removes_what_a_killed_report_left(tmp_path: Path) -> None:
    cache, page = tmp_path / "cache.kvm", tmp_path / "page.html"
    kvmmap.create(cache, num_layers=1, capacity=8, num_kv_heads=1, head_dim=8).close()
    killed = (
        "import os, signal; from kvmmap_cli.main import main; "
        "os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL); main()"
    )
    done = subprocess.run([sys.executable, "-c", killed, "report", cache, "-o", page], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = (entry for entry in tmp_path.iterdir() if entry != cache)
    assert is_temporary(left.name)
    assert click_run("gc", tmp_path, "--max-bytes", "1G", "--yes").exit_code == 0
    assert left.exists()  # its writer may be alive
    os.utime(left, (time.time() - 2 * 86400,) * 2)
    assert click_run("gc", tmp_path, "--max-bytes", "1G", "--yes").exit_code == 0
    assert list(tmp_path.iterdir()) == [cache]
