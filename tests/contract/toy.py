"""A storage in twenty lines, its reader, and its registration: the least that another kind of storage needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvmmap.errors import CacheExistsError, CacheNotFoundError, ReadOnlyError
from kvmmap.geometry import CacheGeometry
from kvmmap.metadata import Document
from kvmmap.rows import Rows
from kvmmap.storage.protocols import LayerStore, Storage
from kvmmap.storage.registry import CreateOptions, OpenOptions, Place


class Saved(NamedTuple):
    """What a commit has stored."""

    geometry: CacheGeometry
    document: Document
    length: int
    rows: list[list[NDArray[Any]]]
    ids: NDArray[np.int32]


SAVED: dict[str, Saved] = {}
"""What was committed, by URL: this process's disk."""


class ToyLayer(LayerStore):
    def __init__(self, storage: Storage, index: int) -> None:
        super().__init__(storage, index)
        self._rows = Rows.allocate(self.geometry, self.capacity)

    def rows(self, start: int, stop: int) -> Rows:
        return self._rows.part(start, stop).read_only()

    def write(self, start: int, rows: Rows) -> None:
        self._rows.part(start, start + len(rows[0])).fill(rows)


class ToyStorage(Storage):
    kind = "toy"
    layer_type = ToyLayer

    def commit(self) -> None:
        self.check_writable()
        rows = [[array.copy() for array in layer.rows(0, self.seq_len)] for layer in self.layers]
        ids = self.read_tokens(self.token_len)
        SAVED[str(self.path)] = Saved(self.geometry, self.document, self.seq_len, rows, ids)


class ReopenedToy(ToyStorage):
    def load(self) -> None:
        saved = SAVED[str(self.path)]
        for layer, rows in zip(self.layers, saved.rows, strict=True):
            layer.write(0, Rows.of(layer.geometry, rows))
            layer.length = saved.length
        self.write_tokens(0, saved.ids)
        self.token_len, self._notes = len(saved.ids), saved.document


class ToyReader(ReopenedToy):
    writable = False

    def check_writable(self) -> None:
        self.check()
        raise ReadOnlyError("it was opened for reading")

    def refresh(self) -> bool:
        self.check()
        before = self.seq_len
        self.load()
        self._truncations += self.seq_len < before
        return self.seq_len != before


class ToyPlace(Place):
    def create(self, geometry: CacheGeometry, document: Document, options: CreateOptions) -> ToyStorage:
        if self.url in SAVED and not options.overwrite:
            raise CacheExistsError(f"{self.url}: exists already", path=self.url)
        storage = ToyStorage(geometry, document, self.url)
        storage.commit()
        return storage

    def open(self, options: OpenOptions) -> ToyStorage:
        if self.url not in SAVED:
            raise CacheNotFoundError(f"{self.url}: there is none", path=self.url)
        kind = ToyReader if options.mode == "r" else ReopenedToy
        storage = kind(SAVED[self.url].geometry, None, self.url)
        storage.load()
        return storage

    def remove(self, *, timeout: float = 0, break_lock: bool = False) -> None:
        if SAVED.pop(self.url, None) is None:
            raise CacheNotFoundError(f"{self.url}: there is none", path=self.url)


class Toys:
    names: ClassVar[str] = "toy://"

    def locate(self, path: str, options: Mapping[str, Any] | None) -> ToyPlace | None:
        return ToyPlace(path) if path.startswith(self.names) else None

    def has_name(self, name: str, *, folder: bool) -> bool:
        return False

    def find(self, url: str, options: Mapping[str, Any] | None) -> Any:
        return iter([known for known in SAVED if known.startswith(url)]) if url.startswith(self.names) else None
