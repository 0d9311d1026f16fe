"""The writing half of the storage contract, refused: for handles that were opened for reading.

A reader implements `refuse_write`, which raises in its own words. Its writer overrides what it can do.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..metadata import Document
from .protocols import LayerStore, Rows, Storage


class ReadOnlyStorage(Storage):
    """A storage whose writing methods raise ReadOnlyError."""

    writable = False

    @abstractmethod
    def refuse_write(self) -> NoReturn:
        """Raise ReadOnlyError, or ClosedError if the cache is closed."""

    def check_writable(self) -> None:
        self.refuse_write()

    def set_document(self, document: Document) -> None:
        self.refuse_write()

    def write_tokens(self, start: int, ids: NDArray[np.int32]) -> None:
        self.refuse_write()

    def publish_tokens(self, length: int) -> None:
        self.refuse_write()

    def publish_step(self, length: int) -> None:
        self.refuse_write()

    def appended(self) -> None:
        self.refuse_write()

    def commit(self) -> None:
        self.refuse_write()

    def truncate(self, length: int) -> None:
        self.refuse_write()


class ReadOnlyLayer(LayerStore):
    """A layer whose writing methods raise ReadOnlyError."""

    _storage: ReadOnlyStorage

    def begin(self, count: int) -> int:
        self._storage.refuse_write()

    def stage(self, start: int, count: int) -> Rows:
        self._storage.refuse_write()

    def write(self, start: int, rows: Rows) -> None:
        self._storage.refuse_write()

    def publish(self, length: int) -> None:
        self._storage.refuse_write()
