"""Checkpoints of a cache's states: all state tensors of all layers as they were at one position.

Every storage has numbered slots for them, two more than it keeps, and says which may be overwritten. A checkpoint is
written to such a slot, and named afterwards; until then it does not exist. What lives here: which checkpoints are kept,
and the checkpoints of a storage in memory. How slots are stored is the storages' business.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from ..errors import CapacityExceededError, NoCheckpointError, ReadOnlyError
from ..format import checksum, num_slots
from ..geometry import CacheGeometry


class Checkpoint(NamedTuple):
    """One checkpoint."""

    position: int
    """Positions that its states have seen: a cache that is truncated to so many can be continued."""

    pinned: bool
    """True if it is kept until it is unpinned or truncated."""


class Checkpoints(ABC):
    """The checkpoints of one storage.

    Args:
        geometry: the cache's.
        path: path or URL, for messages.
    """

    def __init__(self, geometry: CacheGeometry, path: str | None) -> None:
        self.specs = geometry.states
        self.kept = geometry.checkpoint_slots
        self.num_slots = num_slots(geometry)
        self._path = path
        self._staged: tuple[int, int] | None = None  # slot, position

    # A storage implements these

    @abstractmethod
    def slots(self) -> Sequence[Checkpoint | None]:
        """Return what each slot holds, as this handle sees it."""

    @abstractmethod
    def _free_slot(self) -> int:
        """Return a slot that may be overwritten."""

    @abstractmethod
    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Write a checkpoint to a free slot."""

    @abstractmethod
    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        """Make what was written to a slot a checkpoint, or pin or unpin one."""

    @abstractmethod
    def _drop(self, slot: int) -> None:
        """Make a slot hold no checkpoint any more."""

    @abstractmethod
    def _read(self, slot: int, checkpoint: Checkpoint) -> list[NDArray[Any]]:
        """Read a checkpoint, verified."""

    # Reading

    def all(self) -> tuple[Checkpoint, ...]:
        """Return all checkpoints, by ascending position."""
        by_position = {found.position: found for found in self.slots() if found is not None}
        return tuple([by_position[position] for position in sorted(by_position)])

    def last(self, length: int) -> int:
        """Return the greatest position, at most `length`, that has a checkpoint; 0 if none has."""
        return max([found.position for found in self.slots() if found is not None and found.position <= length] + [0])

    def read(self, position: int) -> list[NDArray[Any]]:
        """Return the state tensors at a position, new arrays in the order of the specs.

        Raises:
            NoCheckpointError: the position has no checkpoint.
            CorruptCacheError: it is damaged.
            CacheChangedError: it was replaced by the writer.
        """
        slot = self._find(position)
        found = None if slot is None else self.slots()[slot]
        if slot is None or found is None:
            self._refuse(position)
        return self._read(slot, found)

    def digests(self, position: int) -> tuple[int, ...]:
        """Return the xxh3_64 of each state tensor at a position, in the order of the specs; raises as `read`."""
        return tuple([checksum(array.reshape(-1).view(np.uint8).data) for array in self.read(position)])

    # Writing

    @property
    def staged(self) -> int | None:
        """The position of states that were written and not named yet."""
        return self._staged[1] if self._staged is not None else None

    def write(self, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        """Write states, in the order of the specs, without naming them."""
        staged, self._staged = self._staged, None
        slot = self._free_slot() if staged is None else staged[0]
        self._write(slot, position, arrays)
        self._staged = slot, position

    def name_staged(self, *, pin: bool = False) -> None:
        """Make the states that were written a checkpoint, in the place of one that is not kept any longer."""
        assert self._staged is not None
        slot, position = self._staged
        before = self._find(position)
        old = self.slots()[before] if before is not None else None
        if pin and not (old and old.pinned):
            self._check_pins()
        self._name(slot, Checkpoint(position, pin or bool(old and old.pinned)))
        self._staged = None
        if before is not None:
            self._drop(before)
        while extra := surplus(self.all(), self.kept):
            for dropped in extra:
                found = self._find(dropped)
                if found is not None:
                    self._drop(found)

    def pin(self, position: int, pinned: bool) -> None:
        """Pin or unpin a checkpoint.

        Raises:
            NoCheckpointError: the position has none.
            CapacityExceededError: no other checkpoint could be kept.
        """
        slot = self._find(position)
        found = None if slot is None else self.slots()[slot]
        if slot is None or found is None:
            self._refuse(position)
        if found.pinned != pinned:
            if pinned:
                self._check_pins()
            self._name(slot, Checkpoint(position, pinned))

    def cut(self, length: int) -> None:
        """Drop the checkpoints, and written states, beyond a length."""
        self._staged = None
        for slot, found in enumerate(self.slots()):
            if found is not None and found.position > length:
                self._drop(slot)

    def _find(self, position: int) -> int | None:
        for slot, found in enumerate(self.slots()):
            if found is not None and found.position == position:
                return slot
        return None

    def _check_pins(self) -> None:
        pinned = sum([found.pinned for found in self.all()])
        if pinned >= self.kept - 1:
            raise CapacityExceededError(
                f"{pinned} checkpoints are pinned, and of {self.kept} that are kept one must be free for the next: "
                "unpin one, or create the cache with more checkpoint_slots",
                expected=self.kept - 1,
                actual=pinned,
            )

    def _refuse(self, position: int) -> NoReturn:
        known = [found.position for found in self.all()]
        where = "" if self._path is None else f"{self._path}: "
        raise NoCheckpointError(
            f"{where}position {position} has no checkpoint; there are {known or 'none'}",
            position=position,
            expected=tuple(known),
            path=self._path,
        )


def surplus(checkpoints: Sequence[Checkpoint], kept: int) -> list[int]:
    """Return the position of the checkpoint to drop first, or nothing if there are no more than are kept.

    Distances from the newest one stay geometric: the one goes whose neighbours' distances differ by the least factor,
    so that there are many close to the end, and few far back. The newest and pinned ones stay.

    Args:
        checkpoints: by ascending position.
        kept: how many may be kept.
    """
    if len(checkpoints) <= kept:
        return []
    newest = checkpoints[-1].position
    distances = [newest + 1, *[newest - found.position + 1 for found in checkpoints]]
    factors = [
        (distances[number] / distances[number + 2], found.position)
        for number, found in enumerate(checkpoints[:-1])
        if not found.pinned
    ]
    return [min(factors)[1]] if factors else []


def copy_checkpoints(
    source: Checkpoints, target: Checkpoints, length: int, chosen: Sequence[int] | None = None
) -> None:
    """Copy the checkpoints up to a length that the target lacks, with their pins.

    Args:
        source: where they are.
        target: open for writing, with rows up to `length`.
        length: positions that the target has.
        chosen: the source's states, by index, that are the target's; all by default.

    Raises:
        CorruptCacheError: one of them is damaged.
    """
    present = {found.position for found in target.all()}
    for found in source.all():
        if found.position <= length and found.position not in present:
            arrays = source.read(found.position)
            target.write(found.position, arrays if chosen is None else [arrays[number] for number in chosen])
            target.name_staged(pin=found.pinned)


class MemoryCheckpoints(Checkpoints):
    """Checkpoints in this process's memory, and by default of any storage that does not outlive it."""

    def __init__(self, geometry: CacheGeometry, path: str | None = None) -> None:
        super().__init__(geometry, path)
        self._found: list[Checkpoint | None] = [None] * self.num_slots
        self._tensors: list[list[NDArray[Any]]] = [[] for _ in range(self.num_slots)]

    def slots(self) -> Sequence[Checkpoint | None]:
        return self._found

    def _free_slot(self) -> int:
        return self._found.index(None)

    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        # New arrays: a reader in another thread may hold those that were there.
        self._tensors[slot] = [array.copy() for array in arrays]

    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        self._found[slot] = checkpoint

    def _drop(self, slot: int) -> None:
        self._found[slot] = None
        self._tensors[slot] = []

    def _read(self, slot: int, checkpoint: Checkpoint) -> list[NDArray[Any]]:
        return [array.copy() for array in self._tensors[slot]]


class ReadOnlyCheckpoints(Checkpoints):
    """Checkpoints of a handle that was opened for reading."""

    def _refuse_write(self) -> NoReturn:
        where = "" if self._path is None else f"{self._path}: "
        raise ReadOnlyError(f'{where}is open for reading; kvmmap.open(path, mode="a") appends', path=self._path)

    def _free_slot(self) -> int:
        self._refuse_write()

    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        self._refuse_write()

    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        self._refuse_write()

    def _drop(self, slot: int) -> None:
        self._refuse_write()
