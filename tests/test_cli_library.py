"""`kvmmap library` and the report on a library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.cli_support import click_run, expect_line, in_terminal, run_here
from helpers.library_support import NAMESPACE, prompt, say, text

import kvmmap

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A library of a prompt, a branch, and another prompt."""
    folder = tmp_path / "library"
    with kvmmap.Library(folder, 1 << 30) as library:
        say(library, text(600, 0))
        say(library, prompt(text(600, 0)[:400], text(30, 1)))
        say(library, text(300, 2))
    return folder


def test_ls(folder: Path) -> None:
    result = run_here("library", "ls", folder)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0] == str(folder)
    assert "org/tiny" in lines[1]
    assert lines[-1].startswith("3 segments, ")
    assert "600)" in result.stdout
    with kvmmap.Library(folder) as library:
        entries = library.entries()
    told = json.loads(run_here("library", "ls", "--json", folder).stdout)
    assert [entry["path"] for entry in told] == [entry.path for entry in entries]
    assert all(entry.path in run_here("library", "ls", "--long", folder).stdout for entry in entries)


@pytest.mark.parametrize("columns", [60, 120])
def test_ls_in_a_terminal(folder: Path, columns: int) -> None:
    code, drawn = in_terminal("library", "ls", folder, columns=columns)
    assert code == 0
    assert "└──" in drawn


def test_stats(folder: Path) -> None:
    told = json.loads(run_here("library", "stats", "--json", folder).stdout)
    assert (told["segments"], told["sessions"], told["hits"]) == (3, 3, 1)
    assert told["tokens_reused"] == 400
    assert told["namespaces"][0]["digest"] == NAMESPACE.digest
    shown = click_run("library", "stats", folder).output
    assert "of 1 GiB" in shown
    assert "400 positions reused" in shown


def test_match(folder: Path, tmp_path: Path) -> None:
    ids = prompt(text(600, 0)[:400], text(30, 1), [7])
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids.tolist())))
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    for name in ("ids.txt", "ids.json"):
        (told,) = json.loads(run_here("library", "match", folder, "--tokens", tmp_path / name, "--json").stdout)
        assert told["length"] == 430
        assert Path(told["path"]).is_file()
    shown = run_here("library", "match", folder, "--like", told["path"]).stdout
    assert shown.startswith("org/tiny: 430 of 430 positions")
    (tmp_path / "bad.txt").write_text("one two")
    for bad in ("[1, -2]", "[1.5]", '["1"]', "-1", "[true]", "99999999999"):
        (tmp_path / "bad.txt").write_text(bad)
        expect_line(run_here("library", "match", folder, "--tokens", tmp_path / "bad.txt"), 2, "no token ids")
    expect_line(run_here("library", "match", folder), 2, "say which prompt")
    expect_line(run_here("library", "match", folder, "--tokens", tmp_path / "none"), 2, "none")


def test_pin_and_gc(folder: Path) -> None:
    with kvmmap.Library(folder) as library:
        kept = library.match(NAMESPACE, text(300, 2)).chain[-1].name
    assert run_here("library", "pin", folder, kept[-8:]).stdout == "pinned 1 segment\n"
    dry = run_here("library", "gc", "--dry-run", "--max-bytes", "1", folder)
    assert dry.returncode == 0
    assert dry.stdout.splitlines()[-1].startswith("would remove 2 segments")
    assert "worth least" in dry.stdout
    assert "2 segments, " in expect_text(run_here("library", "gc", "--max-bytes", "1", folder), 2)
    gone = run_here("library", "gc", "--max-bytes", "1", "--yes", folder)
    assert gone.stdout.splitlines()[-1].startswith("removed 2 segments")
    assert run_here("library", "pin", "--remove", folder, kept).stdout == "unpinned 1 segment\n"
    told = json.loads(run_here("library", "gc", "--max-bytes", "1", "--yes", "--json", folder).stdout)
    assert [choice["segment"]["name"] for choice in told] == [kept]
    assert run_here("library", "gc", folder).stdout == "nothing to remove\n"
    expect_line(run_here("library", "pin", folder, "nonesuch"), 2, "no segment")
    assert run_here("library", "ls", folder).stdout == "no segments\n"


def expect_text(result: object, code: int) -> str:
    assert result.returncode == code  # type: ignore[attr-defined]
    return str(result.stdout + result.stderr)  # type: ignore[attr-defined]


def test_verify_and_rebuild(folder: Path) -> None:
    assert "3 segments" in run_here("library", "verify", folder).stdout
    for name in folder.glob("index.sqlite3*"):
        name.unlink()
    assert "3 segments" in run_here("library", "rebuild", "--quick", folder).stdout
    told = json.loads(run_here("library", "rebuild", "--json", folder).stdout)
    assert len(told["added"]) == 3
    with kvmmap.Library(folder) as library:
        path = Path(next(entry.path for entry in library.entries() if not entry.children))
    path.write_bytes(b"no cache")
    result = run_here("library", "verify", folder)
    assert result.returncode == 1
    assert str(path) in result.stdout
    assert "1 of no use" in result.stdout
    assert json.loads(run_here("library", "verify", "--json", folder).stdout)["broken"][0]["path"] == str(path)
    assert "of no use: 1 segment" in run_here("library", "rebuild", folder).stdout


def test_what_is_no_library(tmp_path: Path) -> None:
    for name in ("ls", "stats", "verify", "rebuild", "gc"):
        expect_line(run_here("library", name, tmp_path), 2, "is not a kvmmap library")
        expect_line(run_here("library", name, tmp_path / "none"), 2, "is not a kvmmap library")
    assert list(tmp_path.iterdir()) == []


def test_the_report_on_a_library(folder: Path, tmp_path: Path) -> None:
    result = run_here("report", folder, "-o", tmp_path / "page.html")
    assert (result.returncode, result.stderr) == (0, "")
    page = (tmp_path / "page.html").read_text()
    for words in ("A library of 3 caches", "The tree", "600 positions", "What goes first", "org/tiny", "default-src"):
        assert words in page
    kvmmap.Library(tmp_path / "empty").close()
    assert run_here("report", tmp_path / "empty", "-o", tmp_path / "empty.html").returncode == 0


def test_push_and_pull(folder: Path, tmp_path: Path) -> None:
    expect_line(run_here("library", "push", folder), 2, "no object store")
    url = f"memory://{tmp_path.name}"
    pushed = click_run("library", "push", folder, "--remote", url)
    assert pushed.output == f"pushed 3 segments to {url}\n"
    kvmmap.Library(tmp_path / "other").close()
    assert click_run("library", "pull", tmp_path / "other", "--remote", url).output.startswith("read 3 new manifests")
    assert click_run("library", "pull", tmp_path / "other", "--segments").output.startswith("fetched 3 segments")
    expect_line(click_run("library", "gc", folder, "--remote"), 2, "say what is too much")
    gone = click_run("library", "gc", folder, "--remote", "--max-bytes", "1", "--yes")
    assert gone.output.startswith("removed 3 segments")
