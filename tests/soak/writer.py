"""The process that is killed: it opens the cache, checks it, and does random operations until then."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from random import Random
from typing import Any, Literal
from unittest import mock

import numpy as np

import kvmmap
from kvmmap.storage.file.writer import MappedWriter, WriterLayer

from .board import Board
from .content import LAYERS, rows_of, verify_rows
from .model import Log, Model, Operation

CAPACITIES = (2500, 3000)


class Writer:
    """One life."""

    def __init__(self, path: Path, log: Log, board: Board, model: Model, epoch: int, seed: int) -> None:
        self.path, self.log, self.board, self.model, self.epoch = path, log, board, model, epoch
        self.random = Random(seed)
        self.commits = False
        self.least = 0
        """Positions that are another file's, and stay."""

    def run(self) -> None:
        """Do things until the process is killed."""
        self.open(timeout=0)  # the process that held the lock is dead
        verify_rows(self.cache, 0, self.cache.seq_len)
        while True:
            self.step()

    def do(self, operation: Operation, act: Callable[[], object]) -> None:
        """Log, act, log."""
        self.log.begin(operation)
        act()
        self.log.end()
        self.model = self.model.after(operation)

    def open(self, timeout: float) -> None:
        self.commits = self.random.random() < 0.3
        durability: Literal["commit", "publish"] = "commit" if self.commits else "publish"

        def act() -> None:
            self.cache = kvmmap.open(self.path, "a", timeout=timeout, durability=durability)

        self.do(Operation("open"), act)
        assert self.cache.seq_len == len(self.model.epochs), (self.cache.seq_len, len(self.model.epochs))
        assert self.cache.capacity == self.model.capacity
        self.board.put("holding", self.board.get("holding") | 1)

    def close(self) -> None:
        self.board.put("holding", (self.board.get("holding") | 1) + 1)
        self.do(Operation("close"), self.cache.close)

    def step(self) -> None:
        names = ("step", "layers", "extend", "flush", "truncate", "note", "reopen", "resize")
        (name,) = self.random.choices(names, (40, 10, 20, 12, 10, 3, 4, 1))
        room = self.model.capacity - len(self.model.epochs)
        if name in ("step", "layers", "extend"):
            count = self.random.choice((1, 2, 7, 64, 255, 256, 257, 600)) if name == "extend" else 1
            if count <= room:
                self.append(name, count)
                return
            name = "truncate"
        if name == "truncate":
            self.truncate(self.random.choice((0, 1, self.random.randint(0, len(self.model.epochs)))))
        elif name == "flush":
            self.do(Operation("flush"), self.cache.flush)
        elif name == "note":
            note = self.random.randint(1, 10**9)
            self.do(Operation("note", note), lambda: setattr(self.cache, "metadata", {"note": note}))
        else:
            self.close()
            if name == "resize":
                (capacity,) = set(CAPACITIES) - {self.model.capacity}
                if len(self.model.epochs) <= capacity:
                    self.do(Operation("resize", capacity), lambda: kvmmap.resize(self.path, capacity, timeout=10))
            self.open(timeout=10)

    def append(self, name: str, count: int) -> None:
        """Append positions, in one call or layer by layer."""
        start = len(self.model.epochs)
        positions, epochs = np.arange(start, start + count), np.full(count, self.epoch)
        keys, values = rows_of(False, positions, epochs), rows_of(True, positions, epochs)
        with_ids = self.random.random() < 0.8

        def act() -> None:
            if name == "step":
                self.cache.push_step(keys[:, 0], values[:, 0], self.epoch if with_ids else None)
            elif name == "extend":
                self.cache.extend(keys, values, epochs if with_ids else None)
            else:
                for layer in self.random.sample(range(LAYERS), LAYERS):
                    self.cache.layers[layer].push(keys[layer, 0], values[layer, 0])

        self.do(Operation(name, count, self.epoch, self.commits), act)
        self.board.put("acknowledged", start + count)

    def truncate(self, length: int) -> None:
        length = max(self.least, min(length, len(self.model.epochs)))
        self.board.put("truncations", self.board.get("truncations") + 1)
        self.board.put("acknowledged", length)
        self.do(Operation("truncate", length), lambda: self.cache.truncate(length))
        self.board.put("cut_length", length)
        self.board.put("cut_epoch", self.epoch)
        self.board.put("truncations", self.board.get("truncations") + 1)
        self.epoch += 1


# What a soak must notice: each a way of writing that loses something, or shows what is not there.


def publish_first(self: WriterLayer, start: int, rows: Any) -> None:
    """Store the length before the data."""
    self.publish(start + len(rows.key_codes))
    WRITE(self, start, rows)


def truncate_silently(self: MappedWriter, length: int) -> None:
    """Lower the lengths and don't tell."""
    for layer in self.layers:
        layer.publish(min(layer.length, length))
    self.publish_tokens(min(self.token_len, length))


def forget_lengths(self: WriterLayer, length: int) -> None:
    """Tell nobody but this process."""
    self.length = length


def commit_nothing(self: MappedWriter, *, closing: bool = False) -> None:
    """Say that it is durable."""


def misplace_recent(self: WriterLayer, start: int, keys: Any, key_dtype: int, values: Any, value_dtype: int) -> None:
    """Keep rows of other heads in 16 bits."""
    KEEP(self, start, keys[:, ::-1], key_dtype, values, value_dtype)


WRITE, KEEP = WriterLayer.write, WriterLayer.keep
MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": nullcontext,
    "publish-first": lambda: mock.patch.object(WriterLayer, "write", publish_first),
    "truncate-silently": lambda: mock.patch.object(MappedWriter, "_roll_back", truncate_silently),
    "forget-lengths": lambda: mock.patch.object(WriterLayer, "publish", forget_lengths),
    "misplace-recent": lambda: mock.patch.object(WriterLayer, "keep", misplace_recent),
    "commit-nothing": lambda: mock.patch.object(MappedWriter, "commit", commit_nothing),
}
