"""The last requests of each process, which the page of any process shows: counts and times, no text.

Each process writes one small file of its own into a folder that all know, replacing it whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections import OrderedDict
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

KEPT = 30
"""Requests of a process that are remembered."""

State = Literal["waiting", "computing", "answering", "done", "aborted", "failed"]
RUNNING: tuple[State, ...] = ("waiting", "computing", "answering")


@dataclass(slots=True, kw_only=True)
class Record:
    """One request."""

    id: str
    prompt: int
    """Tokens of the prompt."""

    worker: int = field(default_factory=os.getpid)
    state: State = "waiting"
    cached: int | None = None
    """Those that the library had; None until that is known."""

    generated: int = 0
    """Tokens of the answer."""

    stored: bool = True
    """False if the library had no room for it."""

    began: float = field(default_factory=time.time)
    """When it came, in seconds since 1970."""

    first: float | None = None
    """Seconds from there to the first token, waiting included."""

    total: float | None = None
    """Seconds to the last one."""


class Activity:
    """The requests of this process.

    Args:
        folder: where the files of all processes are.
    """

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / f"{os.getpid()}.json"
        self._lock = threading.Lock()
        self._records: OrderedDict[str, Record] = OrderedDict()

    def update(self, record: Record) -> None:
        """Write down what became of a request."""
        with self._lock:
            self._records[record.id] = record
            while len(self._records) > KEPT:
                self._records.popitem(last=False)
            temporary = self._path.with_suffix(".new")
            temporary.write_text(json.dumps([asdict(one) for one in self._records.values()]))
            temporary.replace(self._path)


def recent(folder: str) -> list[dict[str, Any]]:
    """Return the requests of all processes, the last one first. Those of a process that died are `failed`."""
    found: list[dict[str, Any]] = []
    for path in Path(folder).glob("*.json"):
        with contextlib.suppress(FileNotFoundError):
            records = json.loads(path.read_text())
            if not _alive(int(path.stem)):
                for record in records:
                    if record["state"] in RUNNING:
                        record["state"] = "failed"
            found += records
    return sorted(found, key=lambda record: record["began"], reverse=True)[:KEPT]


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
