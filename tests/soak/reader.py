"""A process that reads beside the writer, and checks every byte, length and generation."""

from __future__ import annotations

from pathlib import Path
from random import Random

import numpy as np

import kvmmap

from .board import Board
from .content import DIM, HEADS, LAYERS, check_attention, codes_of, rows_of, verify_rows

LONGEST = 400  # positions read in one go


class Reader:
    """Follows the cache at `path` until the board says stop."""

    def __init__(self, path: Path, board: Board, number: int, seed: int) -> None:
        self.path, self.board, self.number = path, board, number
        self.random = Random(seed)
        self.seen = (0, 0)  # generation word and length at the last look

    def run(self) -> None:
        self.open()
        while not self.board.get("stop"):
            try:
                self.look()
            except kvmmap.CacheChangedError:  # truncated, or the file was replaced
                self.board.count(self.number, "changed")
            if self.random.random() < 0.05:
                self.cache.close()
                self.open()
        self.cache.close()

    def open(self) -> None:
        self.cache = kvmmap.open(self.path)
        self.board.count(self.number, "opens")
        self.seen = (0, 0)

    def look(self) -> None:
        """Refresh, and check what is there then."""
        before = self.board.get("truncations")
        promised = self.board.get("acknowledged")
        cut, epoch = self.board.get("cut_length"), self.board.get("cut_epoch")
        told = before % 2 == 0 and self.board.get("truncations") == before
        try:
            self.cache.refresh()
        except kvmmap.CacheChangedError:  # replaced
            self.cache.close()
            self.open()
        self.board.count(self.number, "refreshes")
        length = self.cache.seq_len
        if told and self.board.get("truncations") == before:
            assert length >= promised, f"{length} positions, and {promised} had been published"
        self.check_monotonic(length)
        if not length:
            return
        start = self.random.randint(0, length - 1)
        stop = min(length, start + self.random.randint(1, LONGEST))
        if self.random.random() < 0.3:
            start, stop = max(0, length - 20), length  # the end is where things happen
        epochs = verify_rows(self.cache, start, stop)
        self.board.count(self.number, "rows", (stop - start) * LAYERS * HEADS * 2)
        if told:
            truncated = np.arange(start, stop)[epochs <= epoch]
            assert not (truncated >= cut).any(), f"rows from {cut} on of an epoch that was truncated"
        self.use(start, epochs)

    def check_monotonic(self, length: int) -> None:
        storage = self.cache.storage
        word = getattr(storage, "own", storage).snapshot.generation_word  # of a chain, its last file's
        if word == self.seen[0] and word % 2:  # even while a truncation lowers lengths, or where its writer has died
            assert length >= self.seen[1], f"{self.seen[1]} positions, then {length} in the same generation"
        self.seen = word, length

    def use(self, start: int, epochs: np.ndarray) -> None:
        """Do with the rows what users do."""
        what, layer = self.random.random(), self.random.randrange(LAYERS)
        if what < 0.4:
            check_attention(self.cache, layer, start, epochs)
            self.board.count(self.number, "attends")
        elif what < 0.7:
            positions = np.arange(start, start + len(epochs))
            keys = self.cache.layers[layer].read_keys(start, start + len(epochs))
            assert np.array_equal(keys, rows_of(False, positions, epochs)[layer]), "dequantised keys are wrong"
        elif what < 0.9:
            view = self.cache.layers[layer].value_codes[start : start + len(epochs)]
            positions = np.arange(start, start + len(epochs))
            assert view.shape[1:] == (HEADS, DIM)
            same = np.array_equal(view, codes_of(layer, True, positions, epochs))
            self.cache.storage.check()
            assert same, "a view has changed"
        else:
            report = self.cache.verify()
            assert report.sound, report.damages
            self.board.count(self.number, "verifies")
