"""Checkpoints in a Zarr group: an array for each state, whose first axis is the slot, named by the root.

A slot that the root names is not overwritten before another root counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ...errors import CacheChangedError, CorruptCacheError
from ...format import checksum
from ...state_spec import StateSpec
from ..checkpoints import Checkpoint, ReadOnlyCheckpoints
from ..objects.protocol import MissingObjectError
from ..protocols import Damage
from .handle import GroupHandle, read_root
from .root_states import GroupCheckpoint


class ZarrCheckpoints(ReadOnlyCheckpoints):
    """The checkpoints of a group that is open for reading.

    Args:
        handle: the group.
    """

    def __init__(self, handle: GroupHandle) -> None:
        super().__init__(handle.geometry, handle.path)
        self._handle = handle

    def _entries(self) -> Sequence[GroupCheckpoint | None]:
        return self._handle.root.checkpoints

    def slots(self) -> Sequence[Checkpoint | None]:
        return [None if found is None else Checkpoint(found.position, found.pinned) for found in self._entries()]

    def _read(self, slot: int, checkpoint: Checkpoint) -> list[NDArray[Any]]:
        entry = self._entries()[slot]
        if entry is None or entry.position != checkpoint.position:
            self._refuse_damaged(checkpoint.position, "it was replaced")
        parts = self._handle.pool.map(lambda spec: read_state(self._handle, slot, spec), self.specs)
        found = []
        for spec, data, expected in zip(self.specs, parts, entry.digests, strict=True):
            if data is None or len(data) != spec.nbytes or checksum(data) != expected:
                self._refuse_damaged(entry.position, f"{spec}: missing, or checksum does not match")
            found.append(np.frombuffer(bytearray(data), spec.numpy_dtype).reshape(spec.shape))
        return found

    def digests(self, position: int) -> tuple[int, ...]:
        slot = self._find(position)
        entry = None if slot is None else self._entries()[slot]
        return super().digests(position) if entry is None else entry.digests

    def _refuse_damaged(self, position: int, what: str) -> NoReturn:
        handle = self._handle
        handle.refuse_changed()
        if read_root(handle.objects)[0].sequence != handle.root.sequence:
            raise CacheChangedError(
                f"{handle.path}: the checkpoint at position {position} was replaced since this handle last looked; "
                "call refresh()",
                path=handle.path,
                position=position,
            )
        raise CorruptCacheError(
            f"{handle.path}: the checkpoint at position {position} is damaged: {what}; truncate() goes to an earlier "
            "one",
            path=handle.path,
            position=position,
        )


class Committing(Protocol):
    """What the checkpoints of a writer need of it."""

    def commit_again(self) -> None:
        """Commit, even if nothing has changed."""


class ZarrWriterCheckpoints(ZarrCheckpoints):
    """The checkpoints of a group that is open for writing. Others see them from the next commit on.

    Args:
        handle: the group.
        storage: the writer, which it does not keep alive.
    """

    def __init__(self, handle: GroupHandle, storage: Committing) -> None:
        super().__init__(handle)
        self._storage: Committing = weakref.proxy(storage)
        self._named = list(handle.root.checkpoints)
        self._written: tuple[int, ...] = ()

    def _entries(self) -> Sequence[GroupCheckpoint | None]:
        return self._named

    def to_commit(self, length: int) -> tuple[GroupCheckpoint | None, ...]:
        """Return what a commit of `length` positions names."""
        return tuple(found if found is not None and found.position <= length else None for found in self._named)

    def _free_slot(self) -> int:
        for _ in range(2):
            for slot, found in enumerate(self._named):
                if found is None and self._handle.root.checkpoints[slot] is None:
                    return slot
            # Checkpoints that were replaced since the last commit are still named by it.
            self._storage.commit_again()
        raise AssertionError("every checkpoint slot is named")

    def _write(self, slot: int, position: int, arrays: Sequence[NDArray[Any]]) -> None:
        handle = self._handle
        flat = [array.reshape(-1).view(np.uint8).data for array in arrays]
        keys = [handle.layout.state_key(spec, slot) for spec in self.specs]
        puts = [handle.pool.submit(handle.objects.put, key, [data]) for key, data in zip(keys, flat, strict=True)]
        for put in puts:
            put.result()
        self._written = tuple(checksum(data) for data in flat)

    def _name(self, slot: int, checkpoint: Checkpoint) -> None:
        found = self._named[slot]
        digests = self._written if found is None else found.digests
        self._named[slot] = GroupCheckpoint(checkpoint.position, checkpoint.pinned, digests)

    def _drop(self, slot: int) -> None:
        self._named[slot] = None


def read_state(handle: GroupHandle, slot: int, spec: StateSpec) -> Any:
    """Return the bytes of a state in a slot; None if the object is missing."""
    try:
        return handle.objects.get(handle.layout.state_key(spec, slot))
    except MissingObjectError:
        return None


def check_checkpoints(handle: GroupHandle) -> list[Damage]:
    """Return what is wrong with the checkpoints that the root names."""
    damages = []
    for slot, found in enumerate(handle.root.checkpoints):
        for spec, expected in zip(handle.geometry.states, () if found is None else found.digests, strict=False):
            assert found is not None
            data = read_state(handle, slot, spec)
            if data is None or len(data) != spec.nbytes or checksum(data) != expected:
                what = f"checkpoint at position {found.position}: {spec}: missing, or checksum does not match"
                damages.append(Damage(what, spec.layer, found.position, found.position))
    return damages
