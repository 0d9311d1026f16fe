"""The `kvmmap` command: its output, its exit codes, and no tracebacks."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.cli_support import (
    DIM,
    HEADS,
    LAYERS,
    LENGTH,
    PLAIN,
    PROGRAM,
    click_run,
    expect_line,
    fill,
    flip,
    in_terminal,
    offset_of,
    run,
    run_here,
    told,
)

import kvmmap


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed cache of 700 positions: two complete blocks and a tail."""
    path = tmp_path / "prompt.kvm"
    model = kvmmap.ModelInfo(name="some/model", revision="abc123", source_dtype="bfloat16", rope={"theta": 1e5})
    with kvmmap.create(
        path,
        num_layers=LAYERS,
        capacity=1000,
        num_kv_heads=HEADS,
        head_dim=DIM,
        model=model,
        metadata={"title": "a licence", "list": [1, 2]},
    ) as cache:
        fill(cache, LENGTH)
    return path


# inspect


def test_inspect_shows_every_fact(path: Path) -> None:
    result = run_here("inspect", path)
    assert (result.returncode, result.stderr) == (0, "")
    for words in (
        "4 layers",
        "700 of 1,000 positions",
        "70 %",
        "700 recorded",
        "3.20: f32 would reserve",
        "in a sparse file of",
        "state        closed",
        "committed    700 positions; commit ",
        "format version 1",
        "some/model",
        "revision abc123",
        "title: a licence",
        "int8-row",
    ):
        assert words in result.stdout
    assert result.stdout.splitlines()[-1].split()[:4] == ["0-3", "2", "16", "int8-row"]


def test_inspect_json_matches_the_api(path: Path) -> None:
    result = run_here("inspect", "--json", path)
    assert (result.returncode, result.stderr) == (0, "")
    with kvmmap.open(path) as cache:
        report = kvmmap.report.inspect(cache)
        assert json.loads(result.stdout) == report.to_dict()
        assert report.seq_len == cache.seq_len == LENGTH
        assert report.memory_bytes == cache.memory_bytes == sum(layer.memory_bytes for layer in report.layers)
        assert report.compression_ratio == cache.compression_ratio
        assert report.stored_bytes * report.capacity == report.memory_bytes * report.seq_len
    assert report.file_bytes == path.stat().st_size
    assert report.disk_bytes == path.stat().st_blocks * 512
    assert report.commit is not None
    assert (report.commit.state, report.commit.uncommitted, report.commit.writer_pid) == ("closed", 0, None)


def test_a_report_in_memory_has_no_file() -> None:
    report = kvmmap.report.inspect(kvmmap.QuantizedKvCache(2, 8, HEADS, DIM))
    assert (report.kind, report.path, report.commit, report.file_bytes) == ("memory", None, None, None)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.fixture
def writer(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that appended 50 positions to the cache and has not committed them."""
    program = f"""
import kvmmap, numpy, sys
cache = kvmmap.open({str(path)!r}, "a")
rows = numpy.ones(({LAYERS}, 50, {HEADS}, {DIM}), numpy.float32)
cache.extend(rows, rows)
print("ready", flush=True)
sys.stdin.read()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=PLAIN
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def test_a_cache_that_is_being_written(path: Path, writer: subprocess.Popen[str]) -> None:
    seen = run_here("inspect", path)
    assert seen.returncode == 0
    assert "750 of 1,000 positions" in seen.stdout
    assert f"open for writing by process {writer.pid}" in seen.stdout
    assert "700 positions, and 50 more not yet" in seen.stdout
    checked = run_here("verify", path)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "not checked: 50 positions not yet committed, [700, 750)" in checked.stdout
    commit = json.loads(run_here("inspect", "--json", path).stdout)["commit"]
    assert (commit["state"], commit["uncommitted"], commit["writer_pid"]) == ("open for writing", 50, writer.pid)
    assert json.loads(run_here("verify", "--json", path).stdout)["unverified"] == 50

    writer.kill()
    writer.wait()
    seen = run_here("inspect", path)
    assert f"interrupted: not closed by process {writer.pid}" in seen.stdout
    assert "750 of 1,000 positions" in seen.stdout


def test_layers_of_one_shape_share_a_row(tmp_path: Path) -> None:
    path = tmp_path / "mixed.kvm"
    heads = [2, 1, 1, 2, 1, 1]
    kvmmap.create(path, num_layers=6, capacity=10, num_kv_heads=heads, head_dim=8, value_head_dim=4).close()
    rows = [line.split()[:6] for line in run_here("inspect", path).stdout.splitlines()[-2:]]
    assert rows == [["0,", "3", "2", "8,", "values", "4"], ["1-2,", "4-5", "1", "8,", "values", "4"]]


def test_an_empty_cache(tmp_path: Path) -> None:
    path = tmp_path / "empty.kvm"
    kvmmap.create(path, num_layers=1, capacity=0, num_kv_heads=1, head_dim=1).close()
    assert "nothing is reserved" in run_here("inspect", path).stdout
    assert run_here("verify", path).returncode == 0


def test_control_characters_in_a_file_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "evil.kvm"
    notes = {"[bold]k\x1b]0;x\x07": "\x1b[31m\x9b2J\u202e\n" + "long " * 1000, **{f"n{i}": i for i in range(50)}}
    model = kvmmap.ModelInfo(name="\x1b[2J")
    kvmmap.create(path, num_layers=1, capacity=1, num_kv_heads=1, head_dim=1, metadata=notes, model=model).close()
    result = run_here("inspect", path)
    assert result.returncode == 0
    assert all(c.isprintable() or c == "\n" for c in result.stdout)
    assert "[bold]k\\x1b" in result.stdout
    assert "46 more: --json shows all" in result.stdout
    assert len(result.stdout.splitlines()) < 24
    assert json.loads(run_here("inspect", "--json", path).stdout)["metadata"] == notes


@pytest.mark.parametrize("columns", [80, 120])
def test_inspect_fits_a_terminal(path: Path, columns: int) -> None:
    code, drawn = in_terminal("inspect", path, columns=columns, NO_COLOR="1", TERM="dumb")
    assert code == 0
    lines = drawn.replace("\r\n", "\n").splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= columns


def test_inspect_statistics(path: Path) -> None:
    result = run_here("inspect", "--stats", path)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == f"{path}: 4 layers, 700 positions"
    assert [line.split()[0] for line in lines[4:8]] == ["0", "1", "2", "3"]
    for words in ("zero rows", "scale, p99", "saturation", "entropy", "error bound", "codes of keys", "-127"):
        assert words in result.stdout
    with kvmmap.open(path) as cache:
        found = told("inspect", "--stats", path)["statistics"]
        assert found == json.loads(json.dumps(kvmmap.report.statistics(cache).to_dict()))


def test_inspect_of_some_layers(path: Path) -> None:
    one = run_here("inspect", "--layer", "2", path).stdout
    assert one.splitlines()[0] == f"{path}: layer 2 of 4, 2 KV heads x 16, int8-row, 700 positions"
    assert "rows 1,400 1,400 positions times heads" in " ".join(one.split())
    some = told("inspect", "--layer", "3,0-1", path)
    assert [layer["index"] for layer in some["layers"]] == [0, 1, 3]
    assert [layer["index"] for layer in some["statistics"]["layers"]] == [0, 1, 3]
    for layers, words in (("4", "layer 4 does not exist"), ("x", "no list of layers"), ("2-1", ""), ("-1", "")):
        expect_line(run_here("inspect", "--layer", layers, path), 2, words)


def test_heat_maps_without_colours(path: Path) -> None:
    lines = run_here("inspect", "--heatmap", path).stdout.splitlines()
    assert lines[2] == "layer  scales by head, then by position, 0 to 700"
    assert [line[:4] for line in lines[4:8]] == ["  0 ", "  1 ", "  2 ", "  3 "]
    assert max(map(len, lines[1:])) <= 80
    alone = run_here("inspect", "--heatmap", "--layer", "1", path).stdout.splitlines()
    assert "head  scales by position, 0 to 700" in alone


def test_heat_maps_in_a_terminal(path: Path) -> None:
    code, drawn = in_terminal("inspect", "--heatmap", path, columns=100, COLORTERM="truecolor")
    assert code == 0
    assert "▀" in drawn
    assert "\x1b[38;2;" in drawn
    code, drawn = in_terminal("inspect", "--heatmap", path, NO_COLOR="1")
    assert code == 0
    assert "▀" not in drawn


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_plots(path: Path, tmp_path: Path, ending: str) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / f"out.{ending}"
    result = run_here("inspect", "--plot", picture, path)
    assert (result.returncode, result.stderr) == (0, "")
    starts = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}
    assert picture.read_bytes().startswith(starts[ending])
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([picture.name, path.name])
    if ending == "svg":
        assert "svg" in picture.read_text()


def test_plots_that_can_not_be(path: Path, tmp_path: Path) -> None:
    expect_line(run_here("inspect", "--plot", tmp_path / "out.txt", path), 2, "ends in .png, .svg, .pdf")
    expect_line(run_here("inspect", "--plot", tmp_path / "no" / "out.png", path), 2, "no such directory")
    empty = tmp_path / "empty.kvm"
    kvmmap.create(empty, num_layers=1, capacity=9, num_kv_heads=1, head_dim=8).close()
    assert run_here("inspect", "--plot", tmp_path / "out.png", "--stats", "--heatmap", empty).returncode == 0


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A tokenizer of 700 words, whose ids are their numbers."""
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel({f"word{i}": i for i in range(LENGTH)} | {"?": LENGTH}, unk_token="?")
    folder = tmp_path / "model"
    folder.mkdir()
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder


def test_inspect_tokens(path: Path, tokenizer: Path) -> None:
    plain = run_here("inspect", "--tokens", path).stdout
    assert "tokens 0 to 47\n0 1 2 3 " in plain
    assert "tokens 652 to 699\n652 653 " in plain
    for named in (tokenizer, tokenizer / "tokenizer.json"):
        assert "\nword0 word1 word2 " in run_here("inspect", "--tokens", "--tokenizer", named, path).stdout
    found = told("inspect", "--tokenizer", tokenizer, path)
    assert found["token_ids"] == list(range(LENGTH))
    assert str(found["text"]).startswith("word0 word1")
    broken = tokenizer / "broken.json"
    broken.write_text("{}")
    expect_line(run_here("inspect", "--tokenizer", broken, path), 2, "not a tokenizer")
    expect_line(run_here("inspect", "--tokenizer", "no/such", path), 2, "no/such")


# Many caches


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three caches below one directory, and what is none."""
    folder = tmp_path / "caches"
    (folder / "deep").mkdir(parents=True)
    for name, length in (("b", 30), ("a", 10), ("deep/c", 20)):
        with kvmmap.create(
            folder / f"{name}.kvm", num_layers=LAYERS, capacity=100, num_kv_heads=HEADS, head_dim=DIM
        ) as cache:
            fill(cache, length)
    (folder / "notes.txt").write_text("no cache")
    (folder / ".b.kvm.0123456789ab.tmp").write_text("left over")
    return folder


def test_a_directory_is_a_table(folder: Path) -> None:
    result = run_here("inspect", folder)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [f"{folder}/{name}.kvm" for name in ("a", "b", "deep/c")]
    assert lines[-1].startswith("3 caches, 60 positions, ")
    assert [line.split()[1] for line in run_here("inspect", "--sort", "length", folder).stdout.splitlines()[1:4]] == [
        "30",
        "20",
        "10",
    ]
    for sort in ("size", "time"):
        assert len(run_here("inspect", "--sort", sort, folder).stdout.splitlines()) == 5


def test_several_paths_and_patterns(folder: Path) -> None:
    named = run_here("inspect", folder / "a.kvm", folder / "b.kvm").stdout
    assert named.splitlines()[-1].startswith("2 caches, 40 positions, ")
    assert run_here("inspect", folder / "*.kvm").stdout == named
    assert "3 caches" in run_here("inspect", f"{folder}/**/*.kvm").stdout
    found = json.loads(run_here("inspect", "--json", folder).stdout)
    assert [entry["seq_len"] for entry in found] == [10, 30, 20]
    assert found[0]["path"] == f"{folder}/a.kvm"


def test_unreadable_caches_among_others(folder: Path) -> None:
    (folder / "a.kvm").write_bytes((folder / "b.kvm").read_bytes()[:-5000])
    result = run_here("inspect", folder)
    assert result.returncode == 1
    assert f"{folder}/a.kvm: " in result.stdout
    assert result.stdout.splitlines()[-1].startswith("2 caches, 50 positions, ")
    assert result.stdout.splitlines()[-1].endswith("; 1 can't be read")
    assert "cut off" in json.loads(run_here("inspect", "--json", folder).stdout)[0]["error"]
    (folder / "a.kvm").write_text("no cache at all")
    assert run_here("inspect", folder).returncode == 2


def test_missing_paths(tmp_path: Path) -> None:
    expect_line(run_here("inspect", tmp_path), 2, "no caches", str(tmp_path))
    expect_line(run_here("inspect", tmp_path / "*.kvm"), 2, "no caches")
    expect_line(run_here("inspect", "--stats", tmp_path), 2, "--stats is for one cache")


# watch


def watch_lines(path: Path, *args: str) -> Iterator[str]:
    """Yield the lines of `inspect --watch`, and end it with Ctrl-C."""
    command = [PROGRAM, "inspect", "--watch", "--interval", "0.05", *args, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=PLAIN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield from process.stdout
        finally:
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 130
            assert process.stderr.read() == ""


def test_watch_prints_changes(path: Path) -> None:
    lines = watch_lines(path)
    assert next(lines) == "700 positions, 0.0 a second, closed\n"
    with kvmmap.open(path, "a") as cache:
        assert "open for writing by process" in next(lines)
        fill(cache, 5)
        assert next(lines).startswith("705 positions, ")
        cache.truncate(100)
        assert next(lines).startswith("100 positions, ")
    assert "closed" in next(lines)
    kvmmap.compact(path)  # a writer for a moment, which may be seen or not
    with kvmmap.open(path, "a") as cache:
        assert "open for writing" in next(lines)
        cache.truncate(3)
        assert any(line.startswith("3 positions, ") for line in lines)  # of the file that has taken the path
    lines.close()  # type: ignore[attr-defined]


def test_watch_as_json_lines(path: Path) -> None:
    lines = watch_lines(path, "--json")
    assert json.loads(next(lines))["seq_len"] == 700
    lines.close()  # type: ignore[attr-defined]


def test_watch_in_a_terminal(path: Path) -> None:
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(PROGRAM, ["kvmmap", "inspect", "--watch", str(path)], PLAIN | {"COLUMNS": "80", "LINES": "24"})
    drawn = b""
    while b"Ctrl-C ends" not in drawn:
        drawn += os.read(fd, 65536)
    os.write(fd, b"\x03")
    while True:
        try:
            drawn += os.read(fd, 65536)
        except OSError:
            break
    os.close(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 130
    for words in ("700 of 1,000 positions", "positions a second", "closed"):
        assert words in drawn.decode()
    assert drawn.decode().count("\x1b[?25l") == drawn.decode().count("\x1b[?25h")  # the cursor is back


# verify


def test_verify_of_an_undamaged_cache(path: Path) -> None:
    result = run_here("verify", path)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"{path}: sound\n" in result.stdout
    assert "checked 15 blocks" in result.stdout  # three a layer, and three of token ids
    assert "700 positions in 4 layers" in result.stdout
    assert "not checked" not in result.stdout


def test_verify_json_matches_the_api(path: Path) -> None:
    flip(path, offset_of(path, 1, 600))
    result = run_here("verify", "--json", path)
    assert (result.returncode, result.stderr) == (1, "")
    with kvmmap.open(path) as cache:
        report = cache.verify()
    told = json.loads(result.stdout)
    assert told == {
        "path": str(path),
        "seq_len": report.seq_len,
        "verified": report.verified,
        "blocks": report.blocks,
        "bytes": report.bytes,
        "damages": [{"what": report.damages[0].what, "layer": 1, "start": 512, "stop": 700}],
        "unverified": 0,
        "inexact": [],
        "sound": False,
    }


def test_verify_names_layer_and_positions(path: Path) -> None:
    for layer, position in ((2, 10), (2, 300), (3, 699)):
        flip(path, offset_of(path, layer, position))
    result = run_here("verify", path)
    assert (result.returncode, result.stderr) == (1, "")
    assert result.stdout.splitlines()[:3] == [
        f"{path}: damaged",
        "  layer 2, positions [0, 512): checksum does not match",
        "  layer 3, positions [512, 700): checksum does not match",
    ]
    assert run_here("inspect", path).returncode == 0  # its records are sound


def test_verify_finds_damaged_token_ids(path: Path) -> None:
    needle = np.arange(256, 300, dtype="<i4").tobytes()
    flip(path, path.read_bytes().find(needle))
    result = run_here("verify", path)
    assert result.returncode == 1
    assert "  token ids, positions [256, 512): checksum does not match\n" in result.stdout


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_damage_that_prevents_opening(path: Path, command: str) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-5000])
    expect_line(run_here(command, path), 1, "cut off")
    path.write_bytes(whole[:2000])
    expect_line(run_here(command, path), 1)
    path.write_bytes(whole)
    flip(path, 70)  # a number in the superblock
    expect_line(click_run(command, path), 1, "superblock damaged")
    path.write_bytes(whole)
    for offset in (4096, 8192):  # both commit slots
        flip(path, offset + 40)
    expect_line(click_run(command, path), 1, "both commit records are damaged")
    path.write_bytes(whole)
    flip(path, 8)  # the format version
    expect_line(click_run(command, path), 2, "format version", "newer kvmmap")


# What can't be used


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_paths_that_are_no_cache(tmp_path: Path, command: str) -> None:
    expect_line(run_here(command, tmp_path / "nowhere"), 2, "no such file")
    if command == "verify":
        expect_line(run_here(command, tmp_path), 2, "a directory")
    for content in (b"", b"short", b"x" * 10_000):
        other = tmp_path / "other"
        other.write_bytes(content)
        expect_line(click_run(command, other), 2, "not a kvmmap cache")
    expect_line(click_run(command, "/dev/null"), 2, "not a regular file")
    expect_line(click_run(command, tmp_path / "new\nline\x1b[31m"), 2, "new\\nline\\x1b")
    expect_line(click_run(command, tmp_path / ("n" * 300)), 2, "File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_no_permission(path: Path, command: str) -> None:
    path.chmod(0)
    expect_line(run(command, path), 2, f"{path}: Permission denied")


def test_usage() -> None:
    expect_line(run("inspct"), 2, "inspct", "inspect", "verify")
    expect_line(run("inspect"), 2, "missing argument 'PATH...'", "kvmmap inspect --help")
    expect_line(click_run("verify", "a", "b"), 2, "unexpected extra argument")
    expect_line(click_run("verify", "--jsn", "a"), 2, "--jsn", "--json")
    expect_line(click_run("--nonsense"), 2, "--nonsense")
    alone = run()
    assert (alone.returncode, alone.stdout) == (2, "")
    assert "Usage: kvmmap" in alone.stderr


def test_help_and_version() -> None:
    for args in (["--help"], ["inspect", "--help"], ["verify", "-h"]):
        result = run(*args)
        assert (result.returncode, result.stderr) == (0, "")
        assert "Example" in result.stdout
    assert run("--version").stdout == f"kvmmap {kvmmap.__version__}, {kvmmap.kernel()} kernel\n"
    module = subprocess.run([sys.executable, "-m", "kvmmap_cli", "--version"], capture_output=True, text=True)
    assert module.stdout.startswith("kvmmap ")


# Terminals and pipes


def test_colours_are_for_terminals(path: Path) -> None:
    for command in ("inspect", "verify"):
        assert "\x1b" not in run(command, path).stdout
        code, drawn = in_terminal(command, path, "--no-progress" if command == "verify" else "--")
        assert code == 0
        assert "\x1b[32m" in drawn
        code, drawn = in_terminal(command, path, "--no-progress" if command == "verify" else "--", NO_COLOR="1")
        assert code == 0
        assert "\x1b[32m" not in drawn


def test_the_progress_bar_is_for_terminals(path: Path) -> None:
    assert run("verify", path, FORCE_COLOR="1").stderr == ""
    assert "verifying" in in_terminal("verify", path, patience=0)[1]
    assert "verifying" not in in_terminal("verify", "--no-progress", path, patience=0)[1]
    assert "verifying" not in in_terminal("verify", path, patience=60)[1]  # done before anybody wants one


def test_output_that_is_not_folded_in_a_pipe(path: Path) -> None:
    for line in run("inspect", path, COLUMNS="40").stdout.splitlines():
        assert line == line.rstrip()
    assert "revision abc123, dtype bfloat16, rope" in run("inspect", path, COLUMNS="40").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_unicode(path: Path, encoding: str) -> None:
    result = run("inspect", path, PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.isascii()
    assert "  #################-------  70 %" in result.stdout
    code, drawn = in_terminal("inspect", path, PYTHONIOENCODING=encoding)
    assert code == 0
    assert drawn.isascii()


@pytest.fixture
def long_output(tmp_path: Path) -> list[str]:
    """A command that prints more than a pipe holds."""
    path = tmp_path / "deep.kvm"
    kvmmap.create(path, num_layers=1000, capacity=1, num_kv_heads=1, head_dim=1).close()
    return [str(PROGRAM), "inspect", "--json", str(path)]


def test_a_closed_pipe(long_output: list[str]) -> None:
    with subprocess.Popen(long_output, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == b"{\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == -signal.SIGPIPE


def test_ctrl_c(long_output: list[str]) -> None:
    with subprocess.Popen(long_output, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(2) == b"{\n"  # it waits for room in the pipe now, or soon
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk(path: Path) -> None:
    with open("/dev/full", "w") as full:
        result = subprocess.run([PROGRAM, "inspect", path], stdout=full, stderr=subprocess.PIPE, text=True, env=PLAIN)
    assert (result.returncode, result.stderr) == (2, "kvmmap: No space left on device\n")


def test_stdout_closed(path: Path) -> None:
    result = subprocess.run(["/bin/sh", "-c", f"'{PROGRAM}' verify '{path}' >&- 2>&-"], env=PLAIN)
    assert result.returncode == 0


def test_start_up_loads_only_what_it_needs(path: Path) -> None:
    program = "import sys, kvmmap_cli.main; print([m for m in ('numpy', 'rich', 'kvmmap') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stdout == "[]\n"
    program = f"""
import sys, atexit
from kvmmap_cli.main import main
unwanted = ("rich", "torch", "zarr", "matplotlib", "tokenizers", "transformers", "hashlib", "ml_dtypes")
unwanted += ("concurrent.futures", "kvmmap.transfer.copying", "shutil", "traceback")
unwanted += ("kvmmap.storage.file.writer", "kvmmap.storage.file.chain", "kvmmap.storage.file.resize", "kvmmap.quantize")
atexit.register(lambda: print([m for m in unwanted if m in sys.modules], file=sys.stderr))
sys.argv = ["kvmmap", "inspect", "--json", {str(path)!r}]
main()
"""
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert loaded.stderr == "[]\n"
