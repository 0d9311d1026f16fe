"""What a reader's storage and layers answer to everything that writes: that they were opened for reading.

A reader brings `refuse_write`, which says so in its own words; a writer overrides what it can do.
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ..metadata import Document
from .protocols import Rows


class ReadOnlyStorage:
    """The writing half of `Storage`, refused."""

    def refuse_write(self) -> NoReturn:
        raise NotImplementedError

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


class ReadOnlyLayer:
    """The writing half of `LayerStore`, refused."""

    _storage: ReadOnlyStorage

    def begin(self, count: int) -> int:
        self._storage.refuse_write()

    def stage(self, start: int, count: int) -> Rows:
        self._storage.refuse_write()

    def write(self, start: int, rows: Rows) -> None:
        self._storage.refuse_write()

    def publish(self, length: int) -> None:
        self._storage.refuse_write()
