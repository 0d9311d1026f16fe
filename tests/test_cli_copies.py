"""The commands `kvmmap export`, `import`, `copy` and `fetch`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli_support import run_here
from helpers.seaweed import BUCKET, Server
from helpers.support import check_filled, make_file
from test_cli import in_terminal, run

import kvmmap


@pytest.fixture
def source(tmp_path: Path) -> Path:
    make_file(tmp_path / "a.kvm", 600).close()
    return tmp_path / "a.kvm"


def test_export_and_import(source: Path, tmp_path: Path) -> None:
    done = run_here("export", source, tmp_path / "b.zarr", "--compressor", "zstd")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"{tmp_path}/b.zarr: 600 positions, 56.2 KiB, verified\n"
    done = run_here("import", tmp_path / "b.zarr", tmp_path / "c.kvm", "--capacity", 700)
    assert done.returncode == 0, done.stderr
    with kvmmap.open(tmp_path / "c.kvm") as cache:
        check_filled(cache, 600)
        assert cache.capacity == 700
    done = run_here("export", tmp_path / "c.kvm", tmp_path / "d.safetensors", "--dtype", "int8", "--layers", "1")
    assert done.returncode == 0, done.stderr
    done = run_here("import", tmp_path / "d.safetensors", tmp_path / "e.kvm")
    assert done.returncode == 0, done.stderr
    with kvmmap.open(tmp_path / "e.kvm") as cache:
        assert (cache.num_layers, cache.seq_len) == (1, 600)
    done = run_here("copy", source, tmp_path / "f.kvm", "--start", 10, "--stop", 20, "--no-verify")
    assert done.stderr == f"{tmp_path}/f.kvm: 10 positions, 960 B\n"
    assert run_here("verify", tmp_path / "b.zarr").returncode == 0
    shown = run_here("inspect", tmp_path / "b.zarr")
    assert shown.returncode == 0, shown.stderr
    assert "zarr" in shown.stdout


def test_errors_are_one_line(source: Path, tmp_path: Path) -> None:
    for arguments, code, what in (
        (("export", source, source), 2, "exists already"),
        (("export", tmp_path / "none.kvm", tmp_path / "b.zarr"), 2, "no such file"),
        (("copy", source, tmp_path / "b.kvm", "--layers", "x"), 2, "must be like"),
        (("copy", source, tmp_path / "b.kvm", "--layers", "0-5"), 2, "layer 2 does not exist"),
        (("copy", source, "ftp://host/b.zarr"), 2, "no such kind of URL"),
        (("import", source, tmp_path / "b.kvm", "--capacity", "5"), 2, "capacity is 5"),
    ):
        done = run(*arguments)
        assert done.returncode == code
        assert done.stderr.startswith("kvmmap: ")
        assert what in done.stderr
        assert done.stderr.count("\n") == 1
    data = bytearray(source.read_bytes())
    with kvmmap.open(source) as cache:
        data[data.find(cache.layers[1].key_codes[300].tobytes())] ^= 1
    source.write_bytes(data)
    done = run_here("export", source, tmp_path / "b.zarr")
    assert done.returncode == 1
    assert "layer 1 is damaged in positions [256, 512)" in done.stderr


def test_a_progress_bar_in_a_terminal(source: Path, tmp_path: Path) -> None:
    code, drawn = in_terminal("export", source, tmp_path / "b.zarr", patience=0)
    assert code == 0
    assert "copying" in drawn


def test_an_object_store(source: Path, tmp_path: Path, s3: Server) -> None:
    url = f"s3://{BUCKET}/at-a-shell/prompt.zarr"
    done = run_here("export", source, url, **s3.environment())
    assert done.returncode == 0, done.stderr
    done = run_here("fetch", url, tmp_path / "b.kvm", **s3.environment())
    assert done.stderr == f"{tmp_path}/b.kvm: 600 positions\n"
    with kvmmap.open(tmp_path / "b.kvm") as cache:
        check_filled(cache, 600)
    assert run_here("verify", url, **s3.environment()).returncode == 0
    done = run_here("inspect", url, **s3.environment())
    assert done.returncode == 0, done.stderr
    assert "600 of 1,000 positions" in done.stdout
    told = json.loads(run_here("inspect", "--json", url, **s3.environment()).stdout)
    with kvmmap.open(source) as cache:
        local = json.loads(run_here("inspect", "--json", source).stdout)
        assert (told["seq_len"], told["layers"]) == (cache.seq_len, local["layers"])
    assert run_here("inspect", "--stats", "--tokens", url, **s3.environment()).returncode == 0
    done = run_here("fetch", "s3://nonesuch/x.zarr", tmp_path / "c.kvm", **s3.environment())
    assert done.returncode == 2
    assert "no such bucket" in done.stderr


def test_many_in_an_object_store(source: Path, tmp_path: Path, s3: Server) -> None:
    base = f"s3://{BUCKET}/many-at-a-shell"
    names = ["a.zarr", "b.zarr", "old/a.zarr", "old/older/c.zarr"]
    for number, name in enumerate(names):
        kvmmap.copy(source, f"{base}/{name}", stop=100 + number)

    def found(*arguments: str) -> list[str]:
        done = run_here("inspect", "--json", *arguments, **s3.environment())
        assert done.returncode == 0, done.stderr
        return [told["path"].removeprefix(f"{base}/") for told in json.loads(done.stdout)]

    assert found(f"{base}/") == names
    assert found(f"{base}/old/") == names[2:]
    assert found(f"{base}/*.zarr") == names[:2]
    assert found(f"{base}/*/a.zarr") == names[2:3]
    assert found(f"{base}/**/*.zarr") == names
    assert found(f"{base}/[bc].zarr", f"{base}/b.zarr", str(source)) == [str(source), "b.zarr"]
    assert kvmmap.find(base) == [f"{base}/{name}" for name in names]
    assert f"{base}/a.zarr" in kvmmap.find(f"s3://{BUCKET}")
    kvmmap.copy(source, f"{base}/old/gone.zarr")
    kvmmap.remove(f"{base}/old/gone.zarr")  # this server keeps its folders
    assert kvmmap.find(base) == [f"{base}/{name}" for name in names]
    table = run_here("inspect", f"{base}/", **s3.environment())
    assert "4 caches, 406 positions" in table.stdout
    for path, what in (
        (f"{base}/none/", "no caches"),
        (f"{base}/*.kvm", "no caches"),
        ("s3://nonesuch/", "no such bucket"),
        ("ftp://host/", "no such kind of URL"),
        (f"{base}/none.zarr", "no such object"),
    ):
        done = run_here("inspect", path, **s3.environment())
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert what in done.stderr
