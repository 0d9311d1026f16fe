"""A sequence whose model keeps states: which layers its cache has, which positions can be restored, and checkpoints.

What a forward pass does with rows is `stored`'s; what a checkpoint holds, `states`'.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch

from ...cache import QuantizedKvCache
from ...errors import ModelMismatchError, UnsupportedModelError
from ...ranges import check_range
from ...storage.checkpoints import Checkpoint
from .announced import AnnouncedStates
from .kinds import LayerKind
from .models import text_config
from .recording import PassRecord
from .rows import PositionRows, StoredRows
from .sequence import OneSequence
from .states import SequenceStates


class CheckpointedSequence(AnnouncedStates, OneSequence):
    """What a cache of a model with states can do besides; of other models every position can be restored."""

    _saved: QuantizedKvCache | None
    _own: QuantizedKvCache
    _kept: int
    _length: int
    _kinds: list[LayerKind]
    _layers: list[Any]
    _states: SequenceStates | None
    _rows: list[StoredRows]
    _pass: PassRecord
    _watched: bool
    _positions: PositionRows | None = None

    def _make_states(self, saved: QuantizedKvCache | None, own: QuantizedKvCache, model: Any) -> SequenceStates:
        """Restore the states of the last position."""
        self._positions = next((rows for rows in self._rows if isinstance(rows, PositionRows)), None)
        layers = {number: layer for number, layer in enumerate(self._layers) if self._kinds[number].states}
        numbers = {number: self._kinds[number].states for number in layers}
        parameter = next(model.parameters(), None) if isinstance(model, torch.nn.Module) else None
        device = torch.device("cpu") if parameter is None else parameter.device
        settle = weakref.WeakMethod(self._settle)  # no circle: a cache's file closes with its last reference
        states = SequenceStates(
            layers, numbers, saved, own, device, lambda: wait() if (wait := settle()) is not None else None
        )
        states.restore(self._length, self._kept)
        return states

    def _settle(self) -> None:
        """Wait until everything that the layers hold is written."""
        raise NotImplementedError

    @property
    def _dirty(self) -> bool:
        """True if a pass has left states between two positions."""
        return self._states is not None and self._states.dirty

    def _begin_states(self, model: torch.nn.Module, given: Mapping[str, Any]) -> None:
        """Take note of a pass before it changes states."""
        if self._states is None:
            return
        fed = given.get("input_ids") if given.get("input_ids") is not None else given.get("inputs_embeds")
        count = fed.shape[1] if isinstance(fed, torch.Tensor) and fed.ndim > 1 else 1
        if self._positions is not None and isinstance(fed, torch.Tensor) and fed.ndim > 1:
            self._positions.check(fed, self._length)
        kind = text_config(model.config).model_type if hasattr(model, "config") else ""
        self._states.begin(kind, count, self._length, self._kept)

    def _count_positions(self) -> None:
        """Count the positions of a pass that has ended, where no layer has rows that do."""
        if self._positions is not None:
            self._positions.count(self._pass.count)
            self._length = len(self._positions)

    def _check_announced(self) -> None:
        """Refuse a pass of another model than the one that the cache was opened with.

        Raises:
            ModelMismatchError: no hook has announced the pass.
        """
        if self._watched and not self._pass.active:
            raise ModelMismatchError(
                f"{self._own.path or 'the cache'} was opened for another model object than the one that runs: its "
                "forward pass was not announced. Open the cache with the model that generates",
                path=self._own.path,
            )

    def _restore_states(self, length: int) -> int:
        """Restore the states of the last checkpoint that is not beyond a length, and return its position."""
        states = self._states
        if states is None:
            return length
        wanted, length = length, self.restorable(min(length, self._length))
        if self._dirty and length < wanted:
            warnings.warn(
                f"a forward pass failed, and its states can't be rolled back: {self!r} continues from its last "
                f"checkpoint, at position {length}",
                RuntimeWarning,
                stacklevel=4,
            )
        if length < self._length or self._dirty:
            states.restore(length, min(self._kept, length))
        return length

    def restorable(self, length: int | None = None) -> int:
        """Return the greatest position, at most `length`, that the cache can be truncated to and continued from.

        All are, unless the model keeps states: then those of checkpoints, and the present end.

        Args:
            length: positions, `seq_len` by default.

        Raises:
            PositionOutOfRangeError: fewer are stored.
        """
        _, length = check_range(0, self._length if length is None else length, self._length)
        if self._states is None or (length == self._length and not self._dirty):
            return length
        return self._states.last(length, self._kept)

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """The checkpoints of a model with states, by ascending position; see `restorable`."""
        saved = [one for one in self._saved.checkpoints if one.position <= self._kept] if self._saved else []
        own = [one._replace(position=one.position + self._kept) for one in self._own.checkpoints]
        return (*saved, *own)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint; 0 if the model keeps no states."""
        return self._own.checkpoint_bytes

    def checkpoint(self, pin: bool = False) -> None:
        """Make the present end a position that the cache can be truncated to; does nothing without states.

        There is one at the end of a prompt, before the first new token, and at `flush` and `close`, without a call.

        Args:
            pin: keep it until it is truncated: for a prefix that many prompts begin with.

        Raises:
            CapacityExceededError: too many are pinned.
            OSError, ReadOnlyError, ClosedError, PoisonedError: as in `kvmmap.QuantizedKvCache.checkpoint`.
        """
        if self._states is not None:
            self._states.save(self._length, self._kept, pin=pin)

    @property
    def _states_alone(self) -> bool:
        return self._positions is not None

    def truncate(self, length: int) -> int:
        """Keep the first `length` positions, and return how many are kept."""
        raise NotImplementedError

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (assisted generation does): minus how many, as transformers counts.

        Raises:
            UnsupportedModelError: the model keeps states, which can't drop single tokens.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes minus the number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove and self._states is not None:
            raise UnsupportedModelError(
                "a model with states can't roll back single tokens, as assisted generation and prompt lookup do: "
                "generate without them; truncate() goes back to a checkpoint",
                actual=tokens_to_remove,
            )
        if tokens_to_remove:
            self.truncate(max(self._length + tokens_to_remove, 0))

    def reset(self) -> None:
        """Remove everything: `truncate(0)`."""
        self.truncate(0)
