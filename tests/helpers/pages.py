"""Pages of the documentation as programs: every code block of a page runs, in order, and what it prints is compared.

What a fenced block is, is told by its language:

- `python`: runs in this process, all blocks of a page in one namespace, in one folder.
- `python title="x.py"`: is written to that file, for a later block to run.
- `console`: `$ ` begins a command for the shell, and what follows is what it prints, on stdout and stderr. Every
  command must succeed. `pip install` and `make` alone are not run: their extras and targets are looked up.
- `text`: what the block before it prints.

`...` stands for anything, as in doctest. A block of any other kind is an error, and so is output that a page hides.
"""

from __future__ import annotations

import contextlib
import doctest
import io
import os
import re
import shlex
import signal
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r"^( *)```(\w*)(?: +title=\"([^\"]+)\")?[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
INCLUDE = re.compile(r'^--8<-- "([^"]+)"\n', re.MULTILINE)
"""How the site includes a file of this project."""

MAKE = re.compile(r"make ([\w-]+)")
PATIENCE = 120
"""Seconds for one command of the shell."""


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    kind: str
    title: str | None
    text: str

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    source = INCLUDE.sub(lambda match: (ROOT / match[1]).read_text(), page.read_text())
    found = [
        Block(
            page.name,
            source.count("\n", 0, match.start()) + 1,
            match[2],
            match[3],
            re.sub(rf"^{match[1]}", "", match[4], flags=re.MULTILINE),
        )
        for match in FENCE.finditer(source)
    ]
    assert 2 * len(found) == len(re.findall(r"^ *```", source, re.MULTILINE)), f"{page}: a fence is not closed"
    return found


@dataclass
class Session:
    """A session that runs a page's blocks in one folder."""

    folder: Path
    """Where everything runs; the present folder of this process must be it already."""

    names: dict[str, Any] = field(default_factory=dict)
    """Python's namespace: what a page may take for granted."""

    environment: dict[str, str] = field(default_factory=dict)
    """What the shell has besides."""

    _groups: list[int] = field(default_factory=list)

    def run(self, page: Path) -> None:
        """Run a page from its start to its end."""
        found = blocks(page)
        assert found, f"{page}: no blocks"
        follows = [*found[1:], None]
        printed = None
        for block, after in zip(found, follows, strict=True):
            if block.kind == "text":
                assert printed is not None, f"{block.where}: nothing before it prints"
                check(block, block.text, printed)
                printed = None
            elif block.kind == "console":
                for command, expected in commands(block):
                    self._shell(block, command, expected)
            elif block.kind == "python" and block.title:
                (self.folder / block.title).write_text(block.text)
            elif block.kind == "python":
                printed = self.python(block)
                shown = after is not None and after.kind == "text"
                assert shown or not printed, f"{block.where}: prints what the page does not show:\n{printed}"
            else:
                raise AssertionError(f"{block.where}: a block of kind {block.kind!r}")

    def python(self, block: Block) -> str:
        """Run a block, and return what it prints."""
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("\n" * block.line + block.text, block.page, "exec"), self.names)
        return out.getvalue()

    def _shell(self, block: Block, command: str, expected: str) -> None:
        if command.startswith("pip install "):
            check_install(block, command)
            return
        if target := MAKE.match(command):
            assert f"\n{target[1]}:" in (ROOT / "Makefile").read_text(), f"{block.where}: no such target: {command}"
            return
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        plain = {"PATH": path, "NO_COLOR": "1", "COLUMNS": "100", "LC_ALL": "C.UTF-8", "PYTHONWARNINGS": "error"}
        output = self.folder / ".printed"  # a file: a pipe would wait for what runs on in the background
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-eu", "-c", command],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=os.environ | plain | self.environment,
                start_new_session=True,
            )
            code = process.wait(PATIENCE)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 0)
            self._groups.append(process.pid)  # something of it runs on; while it does, the number stays its own
        printed = output.read_text()
        output.unlink()
        assert code == 0, f"{block.where}: exit code {code} of: {command}\n{printed}"
        check(block, expected, printed, command)

    def close(self) -> None:
        """Kill programs that still run in the background."""
        for group in self._groups:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def commands(block: Block) -> Iterator[tuple[str, str]]:
    """Yield each command of a console block, with what it is to print."""
    assert block.text.startswith("$ "), f"{block.where}: does not begin with a command"
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        match = re.match(r"((?:[^\n]*\\\n)*[^\n]*\n)(.*)", part, re.DOTALL)
        assert match is not None
        yield match[1], match[2]


def check(block: Block, expected: str, printed: str, what: str = "") -> None:
    """Compare as doctest does."""
    expected, printed = (re.sub(r" +$", "", text, flags=re.MULTILINE) for text in (expected, printed))
    same = doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS)
    assert same, f"{block.where}: {what}\nthe page says\n{expected}\nand this was printed\n{printed}"


def check_install(block: Block, command: str) -> None:
    """Assert that what is to be installed is this project, with extras that it has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for line in command.splitlines():
        words = shlex.split(line, comments=True)
        assert words[:2] == ["pip", "install"], f"{block.where}: {line}"
        for word in words[2:]:
            match = re.fullmatch(r"(?:\.|kvmmap)(?:\[([\w,]+)\])?", word)
            assert match is not None, f"{block.where}: {word}"
            unknown = {name for name in (match[1] or "").split(",") if name} - set(extras)
            assert not unknown, f"{block.where}: no such extras: {unknown}"
