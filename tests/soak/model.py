"""The expected content of the cache: a plain model, its operations, and a log of them that outlives a writer.

A writer logs each operation before it begins it and after it has returned. After its death, the check knows what
was acknowledged, and which one operation may or may not have happened.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Epochs = NDArray[np.int64]
"""int64 [seq_len]: the epoch of each position's rows."""


class Operation(NamedTuple):
    """Something a writer does."""

    name: str  # step, layers, extend, flush, truncate, note, close, resize, open
    number: int = 0  # positions to append, or to keep; the note; the capacity
    epoch: int = 0
    commits: bool = False  # durability="commit"


@dataclass(frozen=True)
class Model:
    """What is published, and what is committed."""

    epochs: Epochs
    committed: Epochs
    note: int
    committed_note: int
    capacity: int

    def after(self, done: Operation) -> Model:
        """Return the model once an operation has returned."""
        name, number = done.name, done.number
        if name in ("step", "layers", "extend"):
            grown = replace(self, epochs=np.append(self.epochs, np.full(number, done.epoch)))
            return grown.commit() if done.commits else grown
        if name == "truncate":
            cut = replace(self, epochs=self.epochs[:number])
            return cut.commit() if number < len(self.committed) else cut
        if name == "note":
            return replace(self, note=number)
        if name in ("flush", "close"):
            return self.commit()
        return replace(self, capacity=number) if name == "resize" else self

    def commit(self) -> Model:
        return replace(self, committed=self.epochs, committed_note=self.note)


class Log:
    """Operations begun and returned, appended to a file one write each, so that a kill loses none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def start(self) -> None:
        """Begin anew, for a new writer."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)

    def begin(self, operation: Operation) -> None:
        os.write(self._fd, f"{operation.name} {operation.number} {operation.epoch} {operation.commits:d}\n".encode())

    def end(self) -> None:
        os.write(self._fd, b"ok\n")

    def size(self) -> int:
        return self.path.stat().st_size

    def idle(self) -> bool:
        """True if no operation is under way."""
        size = self.size()
        return size == 0 or os.pread(self._fd, 3, size - 3) == b"ok\n"

    def read(self) -> tuple[list[Operation], Operation | None]:
        """Return the operations that returned, and the one that was under way."""
        done: list[Operation] = []
        current: Operation | None = None
        for line in self.path.read_text().splitlines():
            if line == "ok":
                assert current is not None
                done.append(current)
                current = None
            else:
                name, number, epoch, commits = line.split()
                current = Operation(name, int(number), int(epoch), commits == "1")
        return done, current
