"""The other end of `helpers.vllm_engine`: starts it and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

PYTHON = os.environ.get("KVMMAP_VLLM_PYTHON") or sys.executable
"""The Python of vLLM's environment."""


class Client:
    """A running engine."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self._log = process, log

    def answer(self) -> dict[str, Any]:
        """The next line that it says."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            pytest.fail("vLLM has ended:\n" + self._log.read_text()[-6000:])
        found: dict[str, Any] = json.loads(line)
        return found

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Have it do something."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self.answer()

    @property
    def said(self) -> str:
        """What it has logged so far."""
        return self._log.read_text()


@contextlib.contextmanager
def engine(
    folder: Path,
    checkpoint: Path,
    library: Path | None,
    *,
    extra: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    variables: dict[str, str] | None = None,
) -> Iterator[Client]:
    """Start vLLM; it is stopped at the end."""
    asked = {
        "checkpoint": str(checkpoint),
        "library": None if library is None else str(library),
        "extra": extra or {},
        "engine": options or {},
    }
    log = folder / "vllm.log"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])} | (variables or {})
    with log.open("w") as file:
        process = subprocess.Popen(
            [PYTHON, "-m", "helpers.vllm_engine", json.dumps(asked)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            text=True,
            env=environment,
            start_new_session=True,
        )
        client = Client(process, log)
        try:
            client.answer()
            yield client
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with the processes that vLLM has started
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
