"""Running `kvmmap` as its tests do: as a process with pipes, within a terminal, or in this process."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import CliRunner, Result
from kvmmap_cli.main import kvmmap as group

import kvmmap

PROGRAM = Path(sys.executable).with_name("kvmmap")
PLAIN = {
    key: value
    for key, value in os.environ.items()
    if key not in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES"}
} | {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8"}

WITH_PATIENCE = "import kvmmap_cli.progress as p, kvmmap_cli.main as m; p.PATIENCE = {}; m.main()"
"""The program, with progress bars after so many seconds, however fast the machine is."""

LAYERS, HEADS, DIM, LENGTH = 4, 2, 16, 700


def fill(cache: kvmmap.QuantizedKvCache, count: int, *, tokens: bool = True) -> None:
    rows = np.random.default_rng(count).standard_normal((cache.num_layers, count, HEADS, DIM), dtype=np.float32)
    cache.extend(rows, rows, np.arange(count) if tokens else None)


def run(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the installed program as a user would, with pipes for its output."""
    return subprocess.run(
        [PROGRAM, *map(str, args)], capture_output=True, text=True, env=PLAIN | env, timeout=300, check=False
    )


def run_here(*args: object, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command within this process, with what `run` gives it and returns: it has no interpreter to start."""
    given = PLAIN | env
    changes = {name: given.get(name) for name in {*os.environ, *given} if given.get(name) != os.environ.get(name)}
    result = CliRunner(env=changes).invoke(group, [str(arg) for arg in args])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return subprocess.CompletedProcess(args, result.exit_code, result.stdout, result.stderr)


def click_run(*args: object) -> Result:
    """Run a command within this process."""
    return CliRunner().invoke(group, [str(arg) for arg in args])


def in_terminal(
    *args: object, columns: int = 80, patience: float | None = None, keys: str = "", **env: str
) -> tuple[int, str]:
    """Run the program with a terminal for stdout and stderr; return exit code and all that it drew.

    Args:
        patience: seconds until a progress bar appears; the program's own if None.
        keys: what is typed.
    """
    command = [str(PROGRAM)] if patience is None else [sys.executable, "-c", WITH_PATIENCE.format(patience)]
    pid, fd = pty.fork()
    if pid == 0:
        environment = PLAIN | {"COLUMNS": str(columns), "LINES": "24"} | env
        os.execve(command[0], [*command, *map(str, args)], environment)
    drawn = b""
    os.write(fd, keys.encode())
    try:
        while select.select([fd], [], [], 60)[0] and (data := os.read(fd, 65536)):
            drawn += data
    except OSError:  # Linux's way to say that the other end is gone
        pass
    finally:
        os.close(fd)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), drawn.decode()


def expect_line(result: subprocess.CompletedProcess[str] | Result, code: int, *words: str) -> None:
    """Assert one line on stderr, nothing on stdout, and an exit code."""
    returned = result.exit_code if isinstance(result, Result) else result.returncode
    assert (returned, result.stdout) == (code, "")
    assert result.stderr.startswith("kvmmap: ")
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def flip(path: Path, offset: int) -> None:
    """Change one byte."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))


def offset_of(path: Path, layer: int, position: int) -> int:
    """Find a position's keys in the file by their bytes."""
    with kvmmap.open(path, verify="none") as cache:
        needle = cache.layers[layer].key_codes[position].tobytes()
    found = path.read_bytes().find(needle)
    assert found > 0
    return found


def told(*args: object) -> dict[str, Any]:
    """Return the JSON that a command prints."""
    result = run(*args, "--json")
    assert result.stderr == ""
    found: dict[str, Any] = json.loads(result.stdout)
    return found
