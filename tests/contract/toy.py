"""A storage in thirty lines, its reader, and its registration: the least that another kind of storage needs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from kvmmap.errors import CacheExistsError, CacheNotFoundError, ReadOnlyError
from kvmmap.geometry import CacheGeometry
from kvmmap.metadata import Document
from kvmmap.rows import Rows
from kvmmap.storage.protocols import LayerStore, Storage
from kvmmap.storage.registry import CreateOptions, OpenOptions, Place

SAVED: dict[str, dict[str, Any]] = {}
"""What was committed, by URL: this process's disk."""


class ToyLayer(LayerStore):
    def __init__(self, storage: Storage, index: int) -> None:
        super().__init__(storage, index)
        self._rows = Rows.allocate(self.geometry, self.capacity)

    def rows(self, start: int, stop: int) -> Rows:
        part = self._rows.part(start, stop)
        for array in part:
            array.flags.writeable = False
        return part

    def write(self, start: int, rows: Rows) -> None:
        self._rows.part(start, start + len(rows[0])).fill(rows)


class ToyStorage(Storage):
    kind = "toy"

    def __init__(self, geometry: CacheGeometry, document: Document, path: str) -> None:
        super().__init__(geometry, document, path)
        self.layers = [ToyLayer(self, index) for index in range(geometry.num_layers)]

    def commit(self) -> None:
        self.check_writable()
        length = self.seq_len
        rows = [[array.copy() for array in layer.rows(0, length)] for layer in self.layers]
        SAVED[str(self.path)] = {"rows": rows, "ids": self.read_tokens(self.token_len), "document": self.document}
        SAVED[str(self.path)] |= {"geometry": self.geometry, "length": length}

    def truncate(self, length: int) -> None:
        super().truncate(length)
        self.commit()

    def close(self) -> None:
        if not self.closed and self.writable:
            self.commit()
        super().close()

    # To be opened again

    def load(self) -> None:
        saved = SAVED[str(self.path)]
        for layer, rows in zip(self.layers, saved["rows"], strict=True):
            layer.write(0, layer.rows(0, 0)._make(rows))
            layer.length = saved["length"]
        self._token_ids[: len(saved["ids"])] = saved["ids"]
        self.token_len, self._notes = len(saved["ids"]), saved["document"]


class ToyReader(ToyStorage):
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
        saved = SAVED[self.url]
        kind = ToyReader if options.mode == "r" else ToyStorage
        storage = kind(saved["geometry"], saved["document"], self.url)
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
