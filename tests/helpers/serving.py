"""The chat server of the examples as a real process, and clients of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from openai import OpenAI

EXAMPLES = Path(__file__).parents[2] / "examples"
PATIENCE = 300.0


def wait_for(what: Callable[[], Any], patience: float = PATIENCE) -> Any:
    """Return what a function returns as soon as that is true."""
    deadline = time.monotonic() + patience
    while not (found := what()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
    return found


class ChatServer:
    """A running server.

    Args:
        library: the library's directory.
        log: a file for what it prints.
        options: of its command line.
        environment: variables besides.
    """

    def __init__(
        self, library: Path, log: Path, *options: object, environment: Mapping[str, str] | None = None
    ) -> None:
        self.library = library
        self.log = log
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "serving", str(library), "--port", "0", "--threads", "1", *map(str, options)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=EXAMPLES,
                env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | dict(environment or {}),
                start_new_session=True,
            )
        try:
            self.url = wait_for(self._printed).split()[3]
            wait_for(self._answers)
        except BaseException:
            self.kill()
            raise

    def _printed(self) -> str:
        assert self.process.poll() is None, self.log.read_text()
        text = self.log.read_text()
        return text if text.endswith("\n") else ""

    def _answers(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("health")[0] == 200
        except urllib.error.URLError:
            return False

    def call(self, path: str, body: bytes | dict[str, Any] | None = None, **headers: str) -> tuple[int, Any, Any]:
        """Send a request of any form; return the status, the JSON and the headers of the answer."""
        data = json.dumps(body).encode() if isinstance(body, dict) else body
        request = urllib.request.Request(
            f"{self.url}/{path}", data, {"content-type": "application/json"} | headers if data is not None else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error), error.headers

    def status(self) -> dict[str, Any]:
        """Return what the page shows."""
        found: dict[str, Any] = self.call("status")[1]
        return found

    def request(self, id: str) -> dict[str, Any]:
        """Return what the page shows of a request."""
        return next(one for one in self.status()["requests"] if one["id"] == id)

    def client(self, **options: Any) -> OpenAI:
        """Return a client with a connection of its own."""
        return OpenAI(**{"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0} | options)

    def kill(self) -> None:
        """End all of its processes, if it has not ended."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
