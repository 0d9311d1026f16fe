"""Histories of caches with states: a checkpoint is there whole or not at all, and its states are those of its rows.

What the states at a position hold is derived from the tags of all positions before, as that of a recurrent layer is.
After power loss the checkpoints are exactly those of a commit; after the death of a process, some of those that the
last step had before or after, none of them with other rows.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from crash.history import History, PromiseError, State
from kvmmap import CacheChangedError, Checkpoint, StateSpec
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.storage.checkpoints import surplus
from kvmmap.storage.file.reader import MappedReader

ROWS, NO_ROWS = LayerGeometry(1, 3, 3), LayerGeometry(0, 0, 0)
GEOMETRIES = (
    CacheGeometry(
        400,
        (NO_ROWS, ROWS),
        block_tokens=64,
        states=(StateSpec(0, "conv", "float32", (3, 7)), StateSpec(0, "recurrent", "float32", (40, 13))),
        checkpoint_slots=2,
    ),
    CacheGeometry(
        300,
        (ROWS, NO_ROWS, LayerGeometry(2, 5, 4)),
        block_tokens=16,
        states=(StateSpec(1, "ssm", "int64", (9, 11)), StateSpec(2, "ids", "int16", (600,))),
        checkpoint_slots=3,
    ),
    CacheGeometry(
        200, (ROWS, NO_ROWS), block_tokens=64, states=(StateSpec(1, "x", "uint8", (700,)),), checkpoint_slots=1
    ),
)


@dataclass(frozen=True)
class StateWithCheckpoints(State):
    """What a cache with states holds."""

    checkpoints: tuple[Checkpoint, ...] = ()

    def kept(self, length: int) -> StateWithCheckpoints:
        """What a truncation leaves."""
        return replace(
            self,
            tags=self.tags[:length],
            tokens=min(self.tokens, length),
            checkpoints=tuple(found for found in self.checkpoints if found.position <= length),
        )


def states_of(tags: tuple[int, ...], geometry: CacheGeometry) -> list[np.ndarray]:
    """The state tensors after positions with these tags."""
    seed = zlib.crc32(np.asarray(tags, np.int64).tobytes()) + len(tags)
    found = []
    for number, spec in enumerate(geometry.states):
        bits = np.random.default_rng([seed, number]).integers(0, 256, spec.nbytes, np.uint8)
        found.append(bits.view(spec.numpy_dtype).reshape(spec.shape))
    return found


class StateHistory(History):
    """One history of a cache with states."""

    geometries = GEOMETRIES
    initial = StateWithCheckpoints

    now: StateWithCheckpoints
    staged: int | None = None
    loose: frozenset[Checkpoint] | None = None
    """Checkpoints that may be there, where it is not known which step has happened."""

    def steps(self) -> list[Any]:
        return [*super().steps(), *[self.checkpoint] * 6, self.stage, self.unpin]

    def checkpoint(self) -> None:
        """Write states, and make them a checkpoint."""
        self.stage()
        assert self.writer
        pins = sum(found.pinned for found in self.now.checkpoints)
        pin = pins + 1 < self.writer.geometry.checkpoint_slots and self.random.random() < 0.2
        after = self._with_checkpoint(pin)
        self.going = [after]
        self.writer.checkpoints.name_staged(pin=pin)
        self.now, self.staged = after, None

    def _with_checkpoint(self, pin: bool) -> StateWithCheckpoints:
        here = self.now.length
        old = [found for found in self.now.checkpoints if found.position == here]
        found = [other for other in self.now.checkpoints if other.position != here]
        found = sorted([*found, Checkpoint(here, pin or any(other.pinned for other in old))])
        while extra := surplus(found, self.geometry.checkpoint_slots):
            found = [other for other in found if other.position not in extra]
        return replace(self.now, checkpoints=tuple(found))

    def stage(self) -> None:
        """Write states, for the next flush to name."""
        assert self.writer
        self.may = [*self.may, self.now]  # to have room there may be a commit
        self.staged = None
        self.writer.checkpoints.write(self.now.length, states_of(self.now.tags, self.geometry))
        self.staged = self.now.length

    def unpin(self) -> None:
        assert self.writer
        pinned = [found.position for found in self.now.checkpoints if found.pinned]
        if pinned:
            chosen = self.random.choice(pinned)
            after = tuple(
                found._replace(pinned=found.pinned and found.position != chosen) for found in self.now.checkpoints
            )
            self.going = [replace(self.now, checkpoints=after)]
            self.writer.checkpoints.pin(chosen, False)
            self.now = replace(self.now, checkpoints=after)

    def _named_by_commit(self) -> None:
        """A commit names states that were written for the last position."""
        if self.staged == self.now.length:
            self.may = [*self.may, self.now]
            self.now = self._with_checkpoint(False)
            self.going = [self.now]
            self.staged = None

    def flush(self) -> None:
        self._named_by_commit()
        super().flush()

    def close(self) -> None:
        self._named_by_commit()
        super().close()

    def open(self) -> None:
        super().open()
        last = max([found.position for found in self.now.checkpoints], default=0)
        if last < self.now.length:
            self.truncate_to(last, lambda: self.writer.resume())  # type: ignore[union-attr]

    def truncated(self, state: State, length: int) -> State:
        """A truncation's commit names the checkpoints that the writer has by then, and not those of the last commit."""
        kept = super().truncated(state, length)
        assert isinstance(kept, StateWithCheckpoints)
        if max(state.length, state.tokens) <= length:  # it needs no commit
            return kept
        return replace(kept, checkpoints=tuple([one for one in self.now.checkpoints if one.position <= length]))

    def truncate_to(self, length: int, act: Any = None) -> None:
        super().truncate_to(length, act)
        self.staged = None

    # Ends of processes and machines

    def _abandon(self) -> None:
        super()._abandon()
        self.staged = None

    def _adopt_published(self, before: State) -> None:
        self._loosely(before, lambda: super(StateHistory, self)._adopt_published(before))

    def _after_interruption(self, before: State) -> None:
        staged, self.staged = self.staged, None
        self._loosely(before, lambda: super(StateHistory, self)._after_interruption(before))
        if self.writer and staged == self.now.length:
            # Interrupted before it had begun: the commit that followed has named the states that were written before.
            named = self._with_checkpoint(False)
            if self.writer.checkpoints.all() == named.checkpoints:
                self.now = named
                self.committed(named)

    def _loosely(self, before: State, act: Any) -> None:
        states = [before, self.now, *self.going, *[state for state in self.may if state is not None]]
        self.loose = frozenset(found for state in states for found in state.checkpoints)  # type: ignore[attr-defined]
        try:
            act()
        finally:
            self.loose = None

    # Looking

    def length_of(self, reader: MappedReader) -> int:
        length = min(reader.snapshot.lengths) if not reader.writable else super().length_of(reader)
        last = reader.checkpoints.last(length)
        if not reader.writable and reader.layers[0].length != last:
            raise PromiseError(f"shows {reader.layers[0].length} positions, and its last checkpoint is at {last}")
        return length

    def tokens_of(self, reader: MappedReader) -> int:
        return reader.token_len if reader.writable else reader.snapshot.token_len

    def _same(self, reader: MappedReader, state: State) -> bool:
        assert isinstance(state, StateWithCheckpoints)
        found = reader.checkpoints.all()
        if self.loose is None and found != state.checkpoints:
            return False
        if self.loose is not None and not {*found} <= {
            *self.loose,
            *[Checkpoint(f.position, False) for f in self.loose],
        }:
            return False
        if not super()._same(reader, state):
            return False
        for one in found:
            for mine, wanted in zip(
                reader.checkpoints.read(one.position),
                states_of(state.tags[: one.position], reader.geometry),
                strict=True,
            ):
                if mine.tobytes() != wanted.tobytes():
                    return False
        return True

    def check_reader(self) -> None:
        try:
            super().check_reader()
        except CacheChangedError:  # a checkpoint that it saw was replaced
            self._close_reader()

    def adopted(self, reader: MappedReader, state: State) -> State:
        return replace(state, checkpoints=reader.checkpoints.all()) if self.loose is not None else state  # type: ignore[call-arg]
