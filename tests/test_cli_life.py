"""The commands of a cache's life: create, truncate, resize, compact, fork, diff, tokens, gc, bench, completion."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    in_terminal,
    run,
)

import kvmmap


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A closed cache of 700 positions and room for 1,000."""
    path = tmp_path / "prompt.kvm"
    with kvmmap.create(path, num_layers=LAYERS, capacity=1000, num_kv_heads=HEADS, head_dim=DIM) as cache:
        fill(cache, LENGTH)
    return path


def say(answer: str, *args: object) -> tuple[int, str]:
    """Run a command in a terminal, and answer its question."""
    pid, fd = pty.fork()
    if pid == 0:
        os.execve(PROGRAM, ["kvmmap", *map(str, args)], PLAIN | {"COLUMNS": "200"})
    drawn = b""
    try:
        while b"[y/N]" not in drawn and select.select([fd], [], [], 60)[0]:
            drawn += os.read(fd, 65536)
        # A Ctrl-C that comes between the prompt and the wait for an answer is only seen with the next key.
        while not select.select([fd], [], [], 1)[0]:
            os.write(fd, answer.encode())
        while data := os.read(fd, 65536):
            drawn += data
    except OSError:
        pass
    os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


def now(path: Path, what: str) -> Any:
    """Return a property of the cache at a path."""
    with kvmmap.open(path) as cache:
        return getattr(cache, what)


def done(*args: object) -> str:
    """Run a command within this process, and return its output."""
    result = click_run(*args)
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    return result.stdout


# create


def test_create(tmp_path: Path) -> None:
    path = tmp_path / "new.kvm"
    shape = ["--layers", 3, "--kv-heads", "2,1,2", "--head-dim", 16, "--value-head-dim", 8, "--capacity", 500]
    model = ["--model", "some/model", "--revision", "r1", "--dtype", "bfloat16", "--metadata", '{"a": [1]}']
    assert done("create", path, *shape, *model) == f"{path}: 3 layers, 500 positions reserved, 78.1 KiB when full\n"
    with kvmmap.open(path) as cache:
        assert [(x.num_kv_heads, x.head_dim, x.value_head_dim) for x in cache.geometry.layers] == [
            (2, 16, 8),
            (1, 16, 8),
            (2, 16, 8),
        ]
        assert cache.model == kvmmap.ModelInfo(name="some/model", revision="r1", source_dtype="bfloat16")
        assert cache.metadata == {"a": [1]}
    like = tmp_path / "like.kvm"
    done("create", like, "--like", path, "--capacity", 7, "--revision", "r2")
    with kvmmap.open(like) as cache, kvmmap.open(path) as first:
        assert cache.geometry.layers == first.geometry.layers
        assert (cache.capacity, cache.metadata) == (7, {})
        assert cache.model == kvmmap.ModelInfo(name="some/model", revision="r2", source_dtype="bfloat16")


def test_create_from_a_model_config(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    facts = {
        "num_hidden_layers": 5,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "max_position_embeddings": 8192,
        "rope_theta": 1e5,
    }
    for text in (facts, {"text_config": facts, "_name_or_path": "a/b"}):
        config.write_text(json.dumps(text))
        path = tmp_path / f"{len(text)}.kvm"
        done("create", path, "--config", config)
        with kvmmap.open(path) as cache:
            assert (cache.num_layers, cache.capacity) == (5, 8192)
            assert cache.geometry.layers[0] == kvmmap.LayerGeometry(3, 64, 64)
            assert cache.model is not None
            assert (cache.model.name, dict(cache.model.rope)) == (text.get("_name_or_path"), {"rope_theta": 1e5})
    config.write_text('{"hidden_size": 3}')
    expect_line(click_run("create", tmp_path / "x.kvm", "--config", config), 2, "not the config.json")
    expect_line(click_run("create", tmp_path / "x.kvm", "--config", tmp_path / "none"), 2, "No such file")
    assert not (tmp_path / "x.kvm").exists()


def test_create_refuses(path: Path, tmp_path: Path) -> None:
    shape = ["--layers", 1, "--kv-heads", 1, "--head-dim", 8, "--capacity", 5]
    before = path.read_bytes()
    expect_line(click_run("create", path, *shape), 2, "exists already", "give another name")
    expect_line(run("create", path, *shape, "--overwrite"), 2, "no terminal to ask at: give --yes")
    assert path.read_bytes() == before
    new = tmp_path / "new.kvm"
    expect_line(click_run("create", new, *shape[:-2]), 2, "--capacity is missing")
    expect_line(click_run("create", new, *shape, "--kv-heads", "x"), 2, "--kv-heads")
    expect_line(click_run("create", new, *shape, "--kv-heads", "1,2"), 2, "one a layer")
    expect_line(click_run("create", new, *shape, "--metadata", "[]"), 2, "must be an object")
    expect_line(click_run("create", new, *shape, "--metadata", "{"), 2, "no JSON")
    expect_line(click_run("create", new, "--like", path, "--config", path), 2, "give one")
    expect_line(click_run("create", tmp_path / "no" / "new.kvm", *shape), 2, "no such directory")
    assert not new.exists()
    done("create", path, *shape, "--overwrite", "--yes")
    assert now(path, "seq_len") == 0


# truncate


def test_truncate_asks(path: Path) -> None:
    expect_line(run("truncate", path, 100), 2, "drop 600 of 700 positions", "give --yes", "kvmmap truncate --help")
    code, drawn = say("n\n", "truncate", path, 100)
    assert code == 2
    assert "nothing was changed" in drawn
    assert now(path, "seq_len") == 700
    code, drawn = say("y\n", "truncate", path, 300)
    assert code == 0
    assert "300 positions, 400 dropped" in drawn
    assert done("truncate", "--yes", path, 100) == f"{path}: 100 positions, 200 dropped\n"
    assert done("truncate", path, 100) == f"{path}: 100 positions, 0 dropped\n"
    expect_line(click_run("truncate", "--yes", path, 101), 2, "there are 100")
    assert now(path, "seq_len") == 100


def test_ctrl_c_at_the_question_changes_nothing(path: Path) -> None:
    code, _ = say("\x03", "truncate", path, 100)
    assert code == 130
    assert now(path, "seq_len") == 700


# resize, compact


def test_resize_and_compact(path: Path) -> None:
    assert "capacity 1,000 -> 5,000 positions" in done("resize", path, 5000)
    assert now(path, "capacity") == 5000
    expect_line(click_run("resize", path, 699), 2, "700 positions are stored")
    assert "capacity 5,000 -> 700 positions" in done("compact", path)
    with kvmmap.open(path) as cache:
        assert (cache.capacity, cache.seq_len) == (700, 700)
        assert cache.verify().sound


RESIZING_SLOWLY = """
import time
from kvmmap.storage.file import resize
from kvmmap_cli.__main__ import program
check = resize.check_blocks
def wait(mapped, start, stop, slot):
    if start == 2:
        print("under way", flush=True)
        time.sleep(600)
    return check(mapped, start, stop, slot)
resize.check_blocks = wait
program()
"""


@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_resize_leaves_the_old_file_and_nothing_else(tmp_path: Path, ending: signal.Signals) -> None:
    path = tmp_path / "large.kvm"
    x = np.ones((2, 2000, 2, 8), np.float32)
    with kvmmap.create(path, num_layers=2, capacity=2000, num_kv_heads=2, head_dim=8) as cache:
        cache.extend(x, x)
    command = [sys.executable, "-c", RESIZING_SLOWLY, "resize", path, "5000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=PLAIN) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"under way\n"
        assert len(list(tmp_path.iterdir())) == 2
        process.send_signal(ending)
        assert process.stderr is not None
        assert process.stderr.read() == b""
    assert process.returncode == (130 if ending == signal.SIGINT else 143)
    assert [file.name for file in tmp_path.iterdir()] == ["large.kvm"]
    assert now(path, "capacity") == 2000


# fork, diff


def test_fork_and_diff(path: Path, tmp_path: Path) -> None:
    fork = tmp_path / "fork.kvm"
    assert done("fork", path, fork).startswith(f"{fork}: 700 positions of {path}, ")
    assert done("diff", path, fork) == f"{path} and {fork}: the same, 700 positions in 4 layers\n"
    expect_line(click_run("fork", path, fork), 2, "exists already")
    with kvmmap.open(fork, "a") as cache:
        cache.truncate(650)
        fill(cache, 40)
        cache.metadata = {"other": True}
    result = click_run("diff", path, fork)
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        f"{path} and {fork}: different",
        "lengths: 700 and 690; the first 690 are compared",
        "token ids: differ from position 650 on",
        "model or metadata differ",
        "rows: differ from position 650 on",
    ]
    assert [line.split()[:3] for line in lines[6:8]] == [["0", "keys", "650"], ["0", "values", "650"]]
    found = click_run("diff", "--json", path, fork)
    with kvmmap.open(path) as a, kvmmap.open(fork) as b:
        assert json.loads(found.stdout) == kvmmap.report.compare(a, b).to_dict()
    short = tmp_path / "short.kvm"
    done("fork", "--length", 300, "--capacity", 400, path, short)
    result = click_run("diff", path, short)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "rows: the same, 300 positions in 4 layers"
    done("create", tmp_path / "other.kvm", "--like", path, "--head-dim", 8)
    expect_line(click_run("diff", path, tmp_path / "other.kvm"), 2, "different shapes")


# tokens


def test_tokens(path: Path, tmp_path: Path) -> None:
    assert done("tokens", path).split() == [str(i) for i in range(LENGTH)]
    assert done("tokens", "--start", 5, "--stop", 7, path) == "5\n6\n"
    assert done("tokens", "--each", "--start", 698, path) == "698\t698\n699\t699\n"
    assert json.loads(done("tokens", "--json", "--start", 698, path)) == {"start": 698, "ids": [698, 699]}
    with kvmmap.open(path, "a") as cache:
        fill(cache, 2, tokens=False)
    assert done("tokens", "--start", 699, path) == "699\n-1\n-1\n"


def test_tokens_as_text(path: Path, tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(LENGTH)}
    words = {word if i != 3 else "\x1b[31m\n": i for word, i in words.items()}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    with kvmmap.open(path, "a") as cache:
        fill(cache, 1, tokens=False)
    args = ["tokens", "--tokenizer", tmp_path / "tokenizer.json"]
    assert done(*args, "--stop", 6, path) == "w0 w1 w2 \\x1b[31m\n w4 w5\n"
    assert done(*args, "--start", 699, path) == "w699[?]\n"
    assert done(*args, "--each", "--start", 2, "--stop", 4, path) == "2\t2\t'w2'\n3\t3\t'\\x1b[31m\\n'\n"
    assert json.loads(done(*args, "--json", "--stop", 2, path)) == {"start": 0, "ids": [0, 1], "text": "w0 w1"}


# What a writer holds


@pytest.mark.parametrize(
    "args", [("truncate", "PATH", "5", "--yes"), ("resize", "PATH", "5000"), ("compact", "PATH")], ids=lambda x: x[0]
)
def test_a_cache_that_a_writer_holds_is_not_changed(path: Path, args: tuple[str, ...]) -> None:
    with kvmmap.open(path, "a") as cache:
        before = path.read_bytes()
        result = run(*(str(path) if arg == "PATH" else arg for arg in args))
        expect_line(result, 2, f"process {os.getpid()} has it open for writing")
        assert path.read_bytes() == before
        assert cache.seq_len == 700


# gc


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five caches, used 1 to 5 days ago, of about a quarter MiB each, and files that are none."""
    folder = tmp_path / "caches"
    (folder / "deep").mkdir(parents=True)
    x = np.ones((1, 500, 4, 64), np.float32)
    for days in range(1, 6):
        path = folder / ("deep" if days == 3 else "") / f"{days}.kvm"
        with kvmmap.create(path, num_layers=1, capacity=500, num_kv_heads=4, head_dim=64) as cache:
            cache.extend(x, x)
        age(path, days)
    (folder / "notes.txt").write_text("mine")
    (folder / "text.kvm").write_text("no cache")
    for name, days in ((".a.kvm.0123456789ab.tmp", 3), (".b.kvm.0123456789ab.tmp", 0.5), (".c.kvm.tmp", 3)):
        (folder / name).write_bytes(b"x" * 5000)
        age(folder / name, days)
    return folder


def age(path: Path, days: float) -> None:
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*.kvm"))


def test_gc_removes_old_caches(folder: Path) -> None:
    result = click_run("gc", folder, "--older-than", "60h", "--dry-run")
    assert result.exit_code == 0
    assert "would remove 3 caches and 1 left-over file" in result.stdout
    assert "text.kvm: left alone" in result.stderr
    assert len(names(folder)) == 6
    assert click_run("gc", folder, "--older-than", "60h", "--yes").exit_code == 0
    assert names(folder) == ["1.kvm", "2.kvm", "text.kvm"]
    assert sorted(path.name for path in folder.glob(".*")) == [".b.kvm.0123456789ab.tmp", ".c.kvm.tmp"]
    assert (folder / "notes.txt").exists()


def test_gc_keeps_within_a_size(folder: Path) -> None:
    each = (folder / "1.kvm").stat().st_blocks * 512
    assert click_run("gc", folder, "--max-bytes", str(int(2.5 * each)), "--yes").exit_code == 0
    assert names(folder) == ["1.kvm", "2.kvm", "text.kvm"]
    result = click_run("gc", folder, "--max-bytes", "1G")
    assert result.stdout.startswith("nothing to remove: 2 caches, ")


def test_gc_keeps_caches_that_a_writer_holds(folder: Path) -> None:
    with kvmmap.open(folder / "5.kvm", "a"), kvmmap.open(folder / "deep" / "3.kvm", "a"):
        assert click_run("gc", folder, "--max-bytes", "0", "--yes").exit_code == 0
        assert names(folder) == ["3.kvm", "5.kvm", "text.kvm"]


def test_gc_asks(folder: Path) -> None:
    assert run("gc", folder, "--max-bytes", "0").returncode == 2
    assert len(names(folder)) == 6
    code, drawn = say("y\n", "gc", folder, "--max-bytes", "0")
    assert code == 0
    assert "Remove 5 caches and 1 left-over file" in drawn
    assert "removed 6 files" in drawn
    expect_line(click_run("gc", folder), 2, "--max-bytes, --older-than")
    for wrong in ("12", "soon", "5y"):
        expect_line(click_run("gc", folder, "--older-than", wrong), 2, "no age")
    expect_line(click_run("gc", folder, "--max-bytes", "many"), 2, "no size")
    expect_line(click_run("gc", folder / "none", "--max-bytes", "1"), 2, "does not exist")


@pytest.mark.parametrize(
    ("text", "size"), [("0", 0), ("500", 500), ("1K", 1024), ("1.5 MiB", 3 << 19), ("2gb", 2 << 30), ("1T", 1 << 40)]
)
def test_sizes_as_people_write_them(text: str, size: int) -> None:
    from kvmmap_cli.units import parse_size

    assert parse_size(text) == size


# bench


def test_bench(tmp_path: Path) -> None:
    args = ["bench", "--dir", tmp_path, "--seconds", 1, "--tokens", 256, "--kv-heads", 2, "--head-dim", 32]
    shown = done(*args)
    for words in ("memcpy", "quantize rows", "append a position", "open a cache", f"{kvmmap.kernel()} kernel"):
        assert words in shown
    found = json.loads(done(*args, "--json"))
    assert found["shape"] == [256, 2, 32]
    for figure in found["figures"]:
        assert len(figure["seconds"]) >= 1
        assert all(second > 0 for second in figure["seconds"])
    assert list(tmp_path.iterdir()) == []


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str, tmp_path: Path) -> None:
    script = done("completion", shell)
    assert "_KVMMAP_COMPLETE" in script
    installed = run("completion", shell, "--install", HOME=str(tmp_path), XDG_DATA_HOME="", XDG_CONFIG_HOME="")
    assert installed.returncode == 0
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    assert file.read_text() == script
    assert str(file) in installed.stdout


def test_completion_completes(path: Path) -> None:
    def complete(*words: str) -> list[str]:
        line = " ".join(["kvmmap", *words])
        env = {"_KVMMAP_COMPLETE": "bash_complete", "COMP_WORDS": line, "COMP_CWORD": str(len(words))}
        return [found.split(",")[1] for found in run(**env).stdout.splitlines()]

    assert complete("tr") == ["truncate"]
    assert "--heatmap" in complete("inspect", "--h")
    assert complete("completion", "f") == ["fish"]
    expect_line(run("completion", SHELL="/bin/tcsh"), 2, "which shell?")


@pytest.mark.skipif(not os.path.exists("/bin/bash"), reason="no bash here")
def test_the_bash_script_is_valid(tmp_path: Path) -> None:
    script = tmp_path / "completion.bash"
    script.write_text(done("completion", "bash"))
    program = (
        f"source {script}; COMP_WORDS=(kvmmap verif); COMP_CWORD=1; _kvmmap_completion kvmmap; echo ${{COMPREPLY[@]}}"
    )
    env = PLAIN | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    said = subprocess.run(["/bin/bash", "-c", program], capture_output=True, text=True, env=env, check=True)
    assert said.stdout.strip() == "verify"


def test_progress_bars_of_long_commands(path: Path, tmp_path: Path) -> None:
    for args in (
        ("resize", path, 3000),
        ("compact", path),
        ("fork", path, tmp_path / "fork.kvm"),
        ("diff", path, path),
    ):
        code, drawn = in_terminal(*args, patience=0)
        assert code == 0
        assert any(verb in drawn for verb in ("resizing", "compacting", "forking", "comparing"))


# Zarr groups


def test_the_same_commands_over_a_zarr_group(path: Path, tmp_path: Path) -> None:
    pytest.importorskip("zarr")
    group = tmp_path / "copy.zarr"
    with (
        kvmmap.open(path) as cache,
        kvmmap.create(group, num_layers=LAYERS, capacity=1000, num_kv_heads=HEADS, head_dim=DIM) as copy,
    ):
        copy.extend([x.read_keys() for x in cache.layers], [x.read_values() for x in cache.layers], cache.token_ids)
    assert "700 of 1,000 positions" in done("inspect", group)
    assert "codes of keys" in done("inspect", "--stats", "--heatmap", group)
    assert done("inspect", tmp_path).splitlines()[-1].startswith("2 caches, 1,400 positions, ")
    assert done("tokens", "--start", 699, group) == "699\n"
    assert done("diff", path, group).endswith("the same, 700 positions in 4 layers\n")
