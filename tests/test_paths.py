"""Paths as callers write them: home directories, file: URLs, and what can't be a path."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

import kvmmap
from kvmmap.paths import place_text

SHAPE = {"num_layers": 1, "capacity": 8, "num_kv_heads": 1, "head_dim": 8}


@pytest.mark.parametrize("ending", ["kvm", "zarr"])
def test_every_way_to_write_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    plain = str(tmp_path / f"a b.{ending}")
    kvmmap.create(plain, **SHAPE).close()
    for spelling in (
        plain,
        Path(plain),
        os.fsencode(plain),
        f"file://{plain}",
        f"FILE://{plain}",
        f"file://localhost{plain}",
        f"file://LocalHost{plain}",
        f"~/a b.{ending}",
        f"file://~/a b.{ending}",
    ):
        with kvmmap.open(spelling) as cache:
            assert cache.path is not None
            assert os.path.samefile(cache.path.removeprefix("file://"), plain)
    kvmmap.create(f"~/new.{ending}", **SHAPE).close()
    kvmmap.copy(f"~/new.{ending}", f"file://localhost{tmp_path}/copied.{ending}")
    assert sorted(kvmmap.find("~")) == sorted(map(str, tmp_path.glob(f"*.{ending}")))
    assert sorted(kvmmap.find(f"file://localhost{tmp_path}")) == sorted(kvmmap.find(tmp_path))
    kvmmap.remove(f"~/new.{ending}")
    assert not (tmp_path / f"new.{ending}").exists()


def test_every_way_to_write_the_path_of_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kvmmap.create("~/a.kvm", **SHAPE).close()
    kvmmap.export_tensors("~/a.kvm", "~/a.safetensors")
    kvmmap.import_tensors(f"file://localhost{tmp_path}/a.safetensors", "~/b.kvm")
    assert {path.name for path in tmp_path.iterdir()} == {"a.kvm", "b.kvm", "a.safetensors"}


def test_a_tilde_that_is_a_name_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    kvmmap.create("./~/a.kvm", **SHAPE).close()
    Path("~a.kvm").write_bytes(Path("~/a.kvm").read_bytes())
    assert place_text("~a.kvm") == "~a.kvm"
    assert place_text("~/a.kvm") == "~/a.kvm"
    assert place_text("~nobody-of-this-name/a.kvm") == "~nobody-of-this-name/a.kvm"
    assert place_text("s3://~/a") == "s3://~/a"


@pytest.mark.parametrize(
    "path", ["", b"", "a\0b.kvm", "\ud800.kvm", "file://", "\0", "file://a\0", "~\0/x.kvm", "\0.zarr"]
)
def test_what_can_not_be_a_path_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.chdir(tmp_path)
    kvmmap.create("ok.kvm", **SHAPE).close()
    kvmmap.export_tensors("ok.kvm", "ok.safetensors")
    before = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()}
    for act in (
        lambda: kvmmap.create(path, **SHAPE),
        lambda: kvmmap.create(path, overwrite=True, **SHAPE),
        lambda: kvmmap.open(path),
        lambda: kvmmap.open(path, "a"),
        lambda: kvmmap.remove(path),
        lambda: kvmmap.resize(path, 3),
        lambda: kvmmap.compact(path),
        lambda: kvmmap.fork("ok.kvm", path),
        lambda: kvmmap.fork(path, "x.kvm"),
        lambda: kvmmap.repair("ok.kvm", path),
        lambda: kvmmap.repair(path, "x.kvm"),
        lambda: kvmmap.copy("ok.kvm", path),
        lambda: kvmmap.copy(path, "x.kvm"),
        lambda: kvmmap.fetch(path, "x.kvm"),
        lambda: kvmmap.find(path),
        lambda: kvmmap.find_temporary(path),
        lambda: kvmmap.remove_temporary(path, older_than=0),
        lambda: kvmmap.export_tensors("ok.kvm", path),
        lambda: kvmmap.export_tensors(path, "x.safetensors"),
        lambda: kvmmap.import_tensors(path, "x.kvm"),
        lambda: kvmmap.import_tensors("ok.safetensors", path),
    ):
        with pytest.raises(kvmmap.NotACacheError):
            act()
    assert {entry.name: entry.read_bytes() for entry in tmp_path.iterdir()} == before


def test_only_temporary_files_are_removed_as_such(tmp_path: Path) -> None:
    path = tmp_path / "a.kvm"
    with kvmmap.create(path, **SHAPE) as cache:
        cache.extend(np.ones((1, 2, 1, 8), np.float32), np.ones((1, 2, 1, 8), np.float32))
    with pytest.raises(kvmmap.NotACacheError, match="not the name of a temporary file"):
        kvmmap.remove_temporary(path, older_than=0)
    assert path.exists()


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        kvmmap.find(tmp_path / "none")
    seen: list[OSError] = []
    assert kvmmap.find(tmp_path / "none", on_error=seen.append) == []
    assert [error.filename for error in seen] == [str(tmp_path / "none")]
