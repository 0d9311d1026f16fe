"""The command line with odd files, names, numbers and streams: one line, and an exit code that is true."""

from __future__ import annotations

import ctypes
import json
import os
import stat
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import click
import kvmmap_cli.commands.verify
import numpy as np
import pytest
from helpers.cli_support import DIM, HEADS, PLAIN, PROGRAM, click_run, expect_line, fill, in_terminal, run
from helpers.support import sweep
from kvmmap_cli.units import parse_age, parse_size

import kvmmap


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "cache.kvm"
    with kvmmap.create(path, num_layers=2, capacity=400, num_kv_heads=HEADS, head_dim=DIM) as cache:
        fill(cache, 300)
    return path


class PanicException(BaseException):  # as pyo3 names a panic in Rust
    pass


# Crashes


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nb"), KeyError("x"), PanicException("in Rust"), GeneratorExit(), AssertionError()]
)
def test_a_crash_is_not_a_damaged_cache(path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(kvmmap_cli.commands.verify, "render", fail)
    result = click_run("verify", path)
    expect_line(result, 70, "an error in kvmmap itself", type(error).__name__, "KVMMAP_TRACEBACK=1")
    monkeypatch.setenv("KVMMAP_TRACEBACK", "1")
    shown = click_run("verify", path)
    assert shown.exit_code == 70
    assert "Traceback" in shown.stderr


def test_an_error_without_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(kvmmap_cli.commands.verify, "render", fail)
    expect_line(click_run("verify", path), 2, "not enough memory")


# Files that are written


@pytest.mark.parametrize("command", [("report", "--output"), ("inspect", "--plot")])
def test_output_files(path: Path, tmp_path: Path, command: tuple[str, str]) -> None:
    """Pipes, devices and links stay what they are; a file is not replaced unasked."""
    name, option = command
    if name == "inspect":
        pytest.importorskip("matplotlib")
    ending = "html" if name == "report" else "svg"
    target = tmp_path / f"out.{ending}"

    def write(place: Path, *more: str) -> Any:
        return click_run(name, path, option, place, *more)

    assert write(target).exit_code == 0
    first = target.read_bytes()
    assert len(first) > 1000
    target.write_bytes(b"mine")
    target.chmod(0o640)
    expect_line(write(target), 2, "exists already", "give --overwrite")
    assert target.read_bytes() == b"mine"
    assert write(target, "--overwrite").exit_code == 0
    assert len(target.read_bytes()) > 1000
    assert stat.S_IMODE(target.stat().st_mode) == 0o640

    link = tmp_path / f"link.{ending}"
    link.symlink_to(target.name)
    expect_line(write(link), 2, "exists already")
    assert write(link, "--overwrite").exit_code == 0
    assert link.is_symlink()
    dangling = tmp_path / f"dangling.{ending}"
    dangling.symlink_to(f"new.{ending}")
    assert write(dangling).exit_code == 0
    assert dangling.is_symlink()
    assert (tmp_path / f"new.{ending}").is_file()

    null = tmp_path / f"null.{ending}"
    null.symlink_to("/dev/null")
    assert write(null).exit_code == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    full = tmp_path / f"full.{ending}"
    full.symlink_to("/dev/full")
    expect_line(write(full), 2, "/dev/full", "No space left")

    pipe = tmp_path / f"pipe.{ending}"
    os.mkfifo(pipe)
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()))
    reader.start()
    assert write(pipe).exit_code == 0
    reader.join(30)
    assert len(got[0]) > 1000
    assert pipe.is_fifo()

    folder = tmp_path / f"folder.{ending}"
    folder.mkdir()
    expect_line(write(folder), 2, "is a directory")
    expect_line(write(Path("")), 2)
    expect_line(click_run(name, path, option, ""), 2, f"{option} is empty" if name == "report" else "a picture ends in")
    expect_line(write(tmp_path / "none" / f"x.{ending}"), 2, "no such directory")
    expect_line(click_run(name, path, option, f"a\0b.{ending}"), 2, "null byte")
    hard = tmp_path / f"hard.{ending}"
    os.link(path, hard)
    expect_line(write(hard, "--overwrite"), 2, "is the cache itself")
    with kvmmap.open(hard) as cache:
        assert cache.verify().sound
    assert not list(tmp_path.glob(".kvmmap-*"))


def test_standard_output_as_a_file(path: Path) -> None:
    """/dev/null and /dev/stdout by their own names, as root or not."""
    before = os.stat("/dev/null")
    done = run("report", path, "-o", "/dev/null")
    assert done.returncode == 0, done.stderr
    assert os.path.samestat(before, os.stat("/dev/null"))
    done = run("report", path, "-o", "/dev/stdout")
    assert done.returncode == 0, done.stderr
    assert "<!DOCTYPE html>" in done.stdout


@pytest.mark.parametrize("ending", ["txt", "htm l", "kvmm", "zar", "safetensor", ""])
def test_misspelt_endings_ask(path: Path, tmp_path: Path, ending: str) -> None:
    target = tmp_path / (f"new.{ending}" if ending else "new")
    shape = ("--layers", 1, "--kv-heads", 1, "--head-dim", 8, "--capacity", 4)
    commands: dict[str, tuple[object, ...]] = {
        "create": ("create", target, *shape),
        "copy": ("copy", path, target),
        "export": ("export", path, target),
        "import": ("import", path, target),
        "fork": ("fork", path, target),
        "fetch": ("fetch", path, target),
        "repair": ("repair", path, target),
    }
    for name, args in commands.items():
        done = click_run(*args)
        expect_line(done, 2, f"{target} does not end in", "give --yes")
        assert not target.exists(), name
    expect_line(click_run("report", path, "-o", target), 2, "does not end in .html or .htm", "give --overwrite")
    assert not target.exists()
    assert click_run("export", path, target, "--yes").exit_code == 0
    with kvmmap.open(target) as cache:
        assert cache.seq_len == 300


def test_a_misspelt_ending_in_a_terminal(path: Path, tmp_path: Path) -> None:
    code, drawn = in_terminal("export", path, tmp_path / "new.txt", keys="n\n")
    assert code == 2
    assert "Make a .kvm file of that name?" in drawn
    assert "nothing was changed" in drawn
    assert not (tmp_path / "new.txt").exists()


@pytest.mark.parametrize("length", [245, 255])
@pytest.mark.parametrize("letter", ["n", "漢"])
def test_reports_and_pictures_of_long_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int, letter: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = letter * ((length - 4) // len(letter.encode()))
    name += "x" * (length - 4 - len(name.encode())) + ".kvm"
    kvmmap.create(name, num_layers=1, capacity=4, num_kv_heads=1, head_dim=8).close()
    result = click_run("report", name)
    assert result.exit_code == 0, result.stderr
    pages = [entry for entry in tmp_path.iterdir() if entry.suffix == ".html"]
    assert len(pages) == 1
    pytest.importorskip("matplotlib")
    assert click_run("inspect", name, "--plot", f"{name[:-4][:80]}.png").exit_code == 0
    assert not list(tmp_path.glob(".*"))


ODD_NAMES = [
    *("a\nb\x1b[2J.kvm", "\udcff\udcfe.kvm", "\\frac{$.kvm"),
    *sweep("run_$1_$2.kvm", "漢字 العربية ไทย 🙂.kvm", "%s{0}<b>&amp;.kvm", "-x.kvm"),
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_odd_names(tmp_path: Path, name: str) -> None:
    """In messages, tables, JSON, pages and pictures; nothing acts on the terminal, and matplotlib warns of nothing."""
    place = tmp_path / name
    with kvmmap.create(tmp_path / "plain.kvm", num_layers=1, capacity=8, num_kv_heads=HEADS, head_dim=DIM) as cache:
        fill(cache, 5)
    os.rename(tmp_path / "plain.kvm", place)
    file = str(place)
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
    for args in (("inspect", file), ("inspect", tmp_path), ("verify", file), ("inspect", "--stats", "--heatmap", file)):
        result = click_run(args[0], *args[1:-1], "--", args[-1])
        assert (result.exit_code, result.stderr) == (0, "")
        assert shown in result.stdout
        assert "\x1b" not in result.stdout
    assert os.path.basename(json.loads(click_run("inspect", "--json", file).stdout)["path"]) == name
    expect_line(click_run("verify", f"{file}.no"), 2, shown)
    page = tmp_path / "page.html"
    result = click_run("report", file, "-o", page)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "\x1b" not in page.read_text(encoding="utf-8")
    pytest.importorskip("matplotlib")
    for ending in ("png", "svg"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = click_run("inspect", "--plot", f"{tmp_path}/out.{ending}", file)
        assert (result.exit_code, result.stderr) == (0, "")
        assert (tmp_path / f"out.{ending}").stat().st_size > 1000


def test_an_odd_name_as_a_process(tmp_path: Path) -> None:
    kvmmap.create(tmp_path / "a.kvm", num_layers=1, capacity=1, num_kv_heads=1, head_dim=1).close()
    odd = tmp_path / "\udcff.kvm"
    os.rename(tmp_path / "a.kvm", odd)
    done = subprocess.run([PROGRAM, "verify", odd], capture_output=True, env=PLAIN, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\udcff.kvm: sound" in done.stdout


# Numbers


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "-inf", "1e400", "0", "x", "", "1e9", "9" * 400])
def test_intervals_that_are_none(path: Path, text: str) -> None:
    expect_line(click_run("inspect", "--watch", f"--interval={text}", path), 2, "--interval", "seconds")


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "x", ""])
def test_other_seconds(path: Path, text: str) -> None:
    for args in (("truncate", path, 5, "--yes"), ("resize", path, 500), ("compact", path)):
        expect_line(click_run(*args, f"--timeout={text}"), 2, "--timeout", "seconds")
    expect_line(click_run("bench", f"--seconds={text}"), 2, "--seconds", "seconds")


TOO_LONG = ("9" * 400, "9" * 5000, "1" + "0" * 30, "9" * 30 + "P")


def test_sizes_and_ages_of_any_length(tmp_path: Path) -> None:
    for text in (
        "9" * 400,
        "9" * 5000,
        "1" + "0" * 30,
        "9" * 30 + "P",
        "1.",
        ".5",
        "-5",
        "1e5",
        "1e400",
        "inf",
        "nan",
        "٣",
        "5KM",
    ):
        with pytest.raises(click.BadParameter):
            parse_size(text)
        expect_line(click_run("gc", tmp_path, f"--max-bytes={text}"), 2, "--max-bytes")
        expect_line(click_run("gc", tmp_path, f"--older-than={text}d"), 2, "--older-than")
    assert parse_size("8388607T") == 8388607 * 2**40
    assert parse_size("0.1K") == 102
    assert parse_age("0.5h") == 1800.0


@pytest.mark.parametrize("text", ["0-99999999999", "9" * 5000, "5-3", "1,", "", "-1", "0-70000", "٣", "0-65535," * 3])
def test_layers_that_are_none(path: Path, tmp_path: Path, text: str) -> None:
    expect_line(click_run("copy", path, tmp_path / "b.kvm", f"--layers={text}"), 2, "--layers")
    expect_line(click_run("inspect", path, f"--layer={text}"), 2)


# Streams and terminals


@pytest.mark.parametrize("columns", [1, 5, 7, 10])
def test_pictures_in_narrow_terminals(path: Path, columns: int) -> None:
    env = {"TERM": "dumb", "LC_ALL": "C"} if columns == 7 else {}
    code, drawn = in_terminal("inspect", "--heatmap", "--stats", "--tokens", path, columns=columns, **env)
    assert code == 0, drawn
    assert "Traceback" not in drawn
    assert "kvmmap: " not in drawn


@pytest.mark.parametrize("width", range(1, 60))
def test_pictures_of_every_width(path: Path, width: int) -> None:
    """What is drawn where the terminal is narrower than pictures take is folded, and not an error."""
    from kvmmap_cli.pictures import heat_maps, histograms

    with kvmmap.open(path) as cache:
        for layers in (None, [0]):
            for colours in (True, False):
                assert list(heat_maps(kvmmap.report.scale_grids(cache, width, layers), width, colours=colours))
        found = kvmmap.report.statistics(cache)
        assert list(histograms(found.keys, found.values, width))


@pytest.mark.parametrize("closed", ["0", "1", "012"])
def test_closed_streams(path: Path, tmp_path: Path, closed: str) -> None:
    redirections = " ".join(f"{number}>&-" for number in closed)

    def shell(*args: object) -> subprocess.CompletedProcess[str]:
        line = " ".join([str(PROGRAM), *map(str, args), redirections])
        return subprocess.run(["sh", "-c", line], capture_output=True, text=True, env=PLAIN, timeout=60, check=False)

    for args, code in (
        (("inspect", path), 0),
        (("truncate", path, 5), 2),
        (("compact", path), 0),
    ):
        done = shell(*args)
        assert done.returncode == code, (args, done.stderr)
        assert "Traceback" not in done.stderr
        if code == 2 and "2" not in closed:
            assert done.stderr.startswith("kvmmap: ")
    with kvmmap.open(path) as cache:
        assert (cache.seq_len, cache.verify().sound) == (300, True)


def test_output_that_can_not_be_written(path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [PROGRAM, "inspect", path], stdout=full, stderr=subprocess.PIPE, text=True, env=PLAIN, check=False
        )
    assert done.returncode == 2
    assert done.stderr.startswith("kvmmap: No space left")
    assert done.stderr.count("\n") == 1


# Folders, links and names


def test_a_folder_named_by_a_dot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expect_line(click_run("inspect", "."), 2, "no caches (*.kvm, *.zarr) in . (")
    expect_line(click_run("inspect", "..", "."), 2, "in .., . (") if not any(tmp_path.parent.rglob("*.kvm")) else None


def without_permission() -> None:
    """Drop the capabilities that let root read everything, for the program that is started next."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP


@pytest.mark.skipif(sys.platform != "linux", reason="capabilities are Linux's")
def test_folders_that_can_not_be_read(path: Path, tmp_path: Path) -> None:
    shut = tmp_path / "shut"
    shut.mkdir()
    (shut / "inner.kvm").write_bytes(path.read_bytes())

    def as_user(*args: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROGRAM, *map(str, args)],
            capture_output=True,
            text=True,
            env=PLAIN,
            preexec_fn=without_permission,
            check=False,
        )

    try:
        shut.chmod(0)
        done = as_user("inspect", shut)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == f"kvmmap: {shut}: Permission denied\n"
        done = as_user("inspect", tmp_path)
        assert done.returncode == 2
        assert done.stderr == f"kvmmap: {shut}: Permission denied\n"
        assert "1 cache, 300 positions" in done.stdout
        done = as_user("gc", tmp_path, "--max-bytes", "1G")
        assert done.returncode == 2
        assert f"{shut}: Permission denied" in done.stderr
        assert "nothing to remove: 1 cache" in done.stdout
    finally:
        shut.chmod(0o700)


def test_one_file_is_counted_once(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    each = os.stat(path).st_blocks * 512
    twice = click_run("inspect", path, path, f"{tmp_path}/./cache.kvm", "cache.kvm", tmp_path, ".")
    assert twice.stdout.splitlines()[-1].startswith("1 cache, 300 positions")
    assert twice.stdout.count("cache.kvm") == 1
    os.link(path, tmp_path / "hard.kvm")
    (tmp_path / "soft.kvm").symlink_to("cache.kvm")
    linked = click_run("inspect", tmp_path)
    assert linked.stdout.splitlines()[-1].startswith("1 cache, 300 positions")
    assert [name in linked.stdout for name in ("cache.kvm", "hard.kvm", "soft.kvm")] == [True] * 3
    then = time.time() - 86400
    os.utime(path, (then, then))
    dry = click_run("gc", tmp_path, "--max-bytes", str(each // 2), "--dry-run")
    assert "would remove 1 cache, " in dry.stdout
    assert "the same file" in dry.stdout
    assert click_run("gc", tmp_path, "--max-bytes", str(each), "--yes").stdout.startswith(
        "nothing to remove: 1 cache, "
    )
    assert click_run("gc", tmp_path, "--max-bytes", str(each // 2), "--yes").exit_code == 0
    assert not path.exists()
    assert not (tmp_path / "hard.kvm").exists()


def test_gc_does_not_change_its_own_order(tmp_path: Path) -> None:
    """What --dry-run names is what goes; looking at caches every night keeps none of them."""
    for number in range(4):
        with kvmmap.create(
            tmp_path / f"{number}.kvm", num_layers=1, capacity=300, num_kv_heads=HEADS, head_dim=64
        ) as cache:
            cache.extend(*(np.ones((1, 300, HEADS, 64), np.float32),) * 2)
        then = time.time() - 86400 * (10 + number)
        os.utime(tmp_path / f"{number}.kvm", (then, then))
    each = os.stat(tmp_path / "0.kvm").st_blocks * 512
    for _ in range(3):
        dry = click_run("gc", tmp_path, "--max-bytes", str(each * 2), "--dry-run").stdout
        assert [f"{number}.kvm" in dry for number in range(4)] == [False, False, True, True]
        for command in (
            ("inspect", tmp_path),
            ("verify", tmp_path / "3.kvm"),
            ("inspect", "--stats", tmp_path / "2.kvm"),
        ):
            assert click_run(*command).exit_code == 0
    assert "nothing to remove" in click_run("gc", tmp_path, "--older-than", "20d", "--yes").stdout
    assert click_run("gc", tmp_path, "--older-than", "11.5d", "--yes").exit_code == 0
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["0.kvm", "1.kvm"]


def test_errors_of_the_system_name_their_file(path: Path, tmp_path: Path) -> None:
    import resource

    def few_bytes() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    for args, named in (
        (("copy", path, tmp_path / "b.kvm"), "b.kvm"),
        (("export", path, tmp_path / "b.safetensors"), "b.safetensors"),
        (("resize", path, 100_000), "cache.kvm"),
        (("create", tmp_path / "c.kvm", "--like", path), "c.kvm"),
        (("fork", path, tmp_path / "f.kvm"), "f.kvm"),
        (("report", path, "-o", tmp_path / "r.html"), "r.html"),
    ):
        done = subprocess.run(
            [PROGRAM, *map(str, args)],
            capture_output=True,
            text=True,
            env=PLAIN,
            preexec_fn=few_bytes,
            timeout=60,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert "File too large" in done.stderr
        assert named in done.stderr
        assert done.stderr.count("\n") == 1
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache.kvm"]


def test_home_and_localhost(path: Path, tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    for spelling in ("~/cache.kvm", f"file://{path}", f"file://localhost{path}"):
        assert run("verify", spelling, **home).returncode == 0
    assert run("report", "~/cache.kvm", "-o", "~/page.html", **home).returncode == 0
    assert (tmp_path / "page.html").exists()
    expect_line(run("create", "", "--like", path), 2, "empty")
    expect_line(run("copy", path, ""), 2)
    expect_line(run("verify", ""), 2, "empty")
