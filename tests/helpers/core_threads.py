"""Threads of the compiled core, which end 50 ms after a call that had them. Linux only."""

from __future__ import annotations

import contextlib
from pathlib import Path


def core_threads() -> int:
    """Return how many this process has now."""
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it may end meanwhile
            found.append((task / "comm").read_text())
    return found.count("kvmmap\n")
