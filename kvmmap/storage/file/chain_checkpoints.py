"""The checkpoints of a chain of files: those of its own file, counted over the whole chain.

A file that continues another one has a checkpoint at its first position, with the states that the other one had there.
So the other one may drop its own, and no chain goes back beyond its own file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ...geometry import CacheGeometry
from ..checkpoints import Checkpoint, Checkpoints
from .reader import MappedReader


class ChainCheckpoints(Checkpoints):
    """Checkpoints of a chain.

    Args:
        geometry: the chain's.
        path: the own file's, for messages.
        own: the own file.
        base: positions before those of the own file.
    """

    def __init__(self, geometry: CacheGeometry, path: str, own: MappedReader, base: int) -> None:
        super().__init__(geometry, path)
        self._own = own.checkpoints
        self._base = base

    def slots(self) -> Sequence[Checkpoint | None]:
        return [
            None if found is None else found._replace(position=found.position + self._base)
            for found in self._own.slots()
        ]

    @property
    def staged(self) -> int | None:
        staged = self._own.staged
        return None if staged is None else staged + self._base

    def write(self, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        self._own.write(position - self._base, arrays)

    def name_staged(self, *, pin: bool = False) -> None:
        self._own.name_staged(pin=pin)

    def pin(self, position: int, pinned: bool) -> None:
        if self._find(position) is None:
            self._refuse(position)
        self._own.pin(position - self._base, pinned)

    def cut(self, length: int) -> None:
        self._own.cut(length - self._base)

    def _free_slot(self) -> int:
        return self._own._free_slot()

    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        self._own._write(slot, position - self._base, arrays)

    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        self._own._name(slot, self._counted_from_own(checkpoint))

    def _drop(self, slot: int) -> None:
        self._own._drop(slot)

    def _read(self, slot: int, checkpoint: Checkpoint) -> list[NDArray[Any]]:
        return self._own._read(slot, self._counted_from_own(checkpoint))

    def _counted_from_own(self, checkpoint: Checkpoint) -> Checkpoint:
        return checkpoint._replace(position=checkpoint.position - self._base)
