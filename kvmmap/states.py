"""A cache's states and their checkpoints, as callers see them: write, name, read, pin, and how far a cache can go back.

A state holds for one position, so a cache with states can be continued only where it has a checkpoint. Where
checkpoints are stored is the storage's business.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray

from .arrays import as_numpy
from .errors import NoCheckpointError, ShapeMismatchError
from .ranges import check_range, index
from .state_spec import StateSpec, check_arrays
from .storage.checkpoints import Checkpoint
from .storage.protocols import Storage

States = Mapping[tuple[int, str], NDArray[Any]]
"""Tensors by layer and name."""


class StateReader:
    """What a cache tells of its states and checkpoints."""

    _storage: Storage

    @property
    def states(self) -> tuple[StateSpec, ...]:
        """The states of its layers, in the order in which they are stored; none in most caches."""
        return self._storage.geometry.states

    @property
    def checkpoint_slots(self) -> int:
        """Checkpoints that are kept; 0 without states."""
        return self._storage.geometry.checkpoint_slots

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint's tensors as they are stored."""
        return self._storage.geometry.checkpoint_bytes

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints, by ascending position."""
        self._storage.check()
        return self._storage.checkpoints.all()

    @property
    def rows_beyond_checkpoint(self) -> int:
        """Positions with rows that opening, or the last `refresh`, left out, because their states were not saved.

        More than 0 after a crash between two checkpoints, or beside a writer. The next writer drops them.
        """
        return self._storage.rows_beyond

    def restorable(self, length: int | None = None) -> int:
        """Return the greatest position, at most `length`, that the cache can be truncated to and continued from.

        Args:
            length: positions, `seq_len` by default.

        Returns:
            The position of the last checkpoint that is not beyond `length`, 0 if there is none; `length` itself in a
            cache without states.

        Raises:
            PositionOutOfRangeError: fewer are stored.
        """
        self._storage.check()
        stored = self._storage.seq_len
        _, length = check_range(0, stored if length is None else length, stored)
        return self._storage.checkpoints.last(length) if self.states else length

    def read_states(self, position: int | None = None) -> dict[tuple[int, str], NDArray[Any]]:
        """Return the states at a checkpoint, by layer and name.

        Args:
            position: of the checkpoint; the last one's by default.

        Returns:
            New arrays of the dtypes and shapes that `states` says; bfloat16 is `ml_dtypes.bfloat16`.

        Raises:
            NoCheckpointError: there is none at this position.
            CorruptCacheError: it does not match its checksums.
            CacheChangedError: the writer has replaced it since the last `refresh`.
            ClosedError: the cache is closed.
        """
        self._storage.check()
        if position is None:
            position = max([found.position for found in self._storage.checkpoints.all()], default=0)
        arrays = self._storage.checkpoints.read(index(position, "position"))
        return {(spec.layer, spec.name): array for spec, array in zip(self.states, arrays, strict=True)}


class StateWriter(StateReader):
    """What changes a cache's states and checkpoints."""

    def write_states(self, states: States | Sequence[Any]) -> None:
        """Write the states as they are after all positions that are stored, `seq_len`.

        They become a checkpoint with `checkpoint`, `flush` or `close`, if no position is appended before. Until then
        they are no part of the cache, and writing again replaces them.

        Args:
            states: all of them: by (layer, name), or one array each in the order of `states`. numpy, torch or DLPack
                on the CPU, of exactly their dtypes and shapes.

        Raises:
            ShapeMismatchError, DtypeError: not these states; nothing was written.
            OSError: the disk is full or failing.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
        """
        given = _in_order(states, self.states) if isinstance(states, Mapping) else list(states)
        arrays = [as_state(array, spec) for array, spec in zip(given, self.states, strict=False)]
        arrays += given[len(arrays) :]
        found = check_arrays(arrays, self.states)
        storage = self._storage
        with storage.lock:
            storage.check_writable()
            if self.states:
                storage.checkpoints.write(storage.seq_len, found)

    def checkpoint(self, pin: bool = False) -> None:
        """Make the states that were written for `seq_len` a checkpoint, to which the cache can be truncated.

        Others are replaced when there are more than `checkpoint_slots`, so that distances from the end stay geometric:
        many are close to it, and few far back. As with rows, a checkpoint survives the death of this process, and
        power loss from the next `flush` on.

        Args:
            pin: keep it until `unpin` or a truncation. One checkpoint at least stays unpinned.

        Raises:
            NoCheckpointError: no states were written for `seq_len`.
            CapacityExceededError: too many are pinned.
            OSError, ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: as in `write_states`.
        """
        storage = self._storage
        with storage.lock:
            storage.check_writable()
            length, staged = storage.seq_len, storage.checkpoints.staged
            if staged == length:
                storage.checkpoints.name_staged(pin=pin)
            elif length in [found.position for found in storage.checkpoints.all()]:
                if pin:
                    storage.checkpoints.pin(length, True)
            else:
                what = "the cache has no states" if not self.states else "no states were written"
                if staged is not None:
                    what = f"the states that were written are those of position {staged}"
                raise NoCheckpointError(
                    f"{what}, and {length} positions are stored: write_states() first",
                    position=length,
                    actual=staged,
                    path=storage.path,
                )
            storage.appended()

    def unpin(self, position: int) -> None:
        """Let a pinned checkpoint be replaced like others.

        Raises:
            NoCheckpointError: there is none at this position.
            ReadOnlyError, ClosedError, CacheLockedError, PoisonedError: this handle can't write.
        """
        storage = self._storage
        with storage.lock:
            storage.check_writable()
            storage.checkpoints.pin(index(position, "position"), False)


def as_state(array: Any, spec: StateSpec) -> NDArray[Any]:
    """Return what a caller gives for a state as a numpy array."""
    if spec.dtype == "bfloat16" and str(getattr(array, "dtype", "")) == "torch.bfloat16":
        # numpy can't read torch's bfloat16: read its bits.
        bits = array.detach().contiguous().view(sys.modules["torch"].int16)
        return as_numpy(bits, str(spec)).view(spec.numpy_dtype)
    if hasattr(array, "requires_grad"):
        array = array.detach()
    return as_numpy(array, str(spec))


def _in_order(states: States, specs: Sequence[StateSpec]) -> list[Any]:
    """Return the tensors in the order of the specs."""
    keys = [(spec.layer, spec.name) for spec in specs]
    missing, unknown = [key for key in keys if key not in states], [key for key in states if key not in keys]
    if missing or unknown:
        what = f"{missing[0]} is missing" if missing else f"the cache has no state {unknown[0]}"
        raise ShapeMismatchError(
            f"states must be given by (layer, name), all of them: {what}", expected=tuple(keys), actual=tuple(states)
        )
    return [states[key] for key in keys]
