"""Random histories of a cache on a machine that loses power, whose writers die, and the states allowed at any moment.

What a position holds is derived from a *tag*, given when it was appended, so that a row from before a truncation
is told from its successor. A model (lists of tags) says what was promised:

- after power loss the cache is exactly at a state that was committed: the last one acknowledged, or the one that
  was being committed; `verify` finds nothing;
- after the death of a process it is where the last finished append left it, or the one under way;
- a reader that was open meanwhile sees what it saw, or is told that things changed.
"""

from __future__ import annotations

import contextlib
import gc
import os
import warnings
from dataclasses import dataclass, replace
from random import Random
from typing import Any

import numpy as np

import kvmmap
from crash.machine import Killed, Machine, Mutation
from kvmmap.geometry import CacheGeometry, LayerGeometry
from kvmmap.metadata import Document
from kvmmap.storage.file.reader import MappedReader
from kvmmap.storage.file.writer import MappedWriter

NAME = "cache.kvm"
GEOMETRIES = (
    CacheGeometry(400, (LayerGeometry(1, 3, 3),) * 2, block_tokens=64),
    CacheGeometry(700, (LayerGeometry(2, 5, 4), LayerGeometry(1, 8, 8)), block_tokens=256),
    CacheGeometry(300, (LayerGeometry(1, 40, 24),), block_tokens=16),
)


class PromiseError(AssertionError):
    """A guarantee was broken."""


@dataclass(frozen=True)
class State:
    """What a cache holds: a tag a position; how many ids; its note."""

    tags: tuple[int, ...] = ()
    tokens: int = 0
    note: int = 0
    capacity: int = 0

    @property
    def length(self) -> int:
        return len(self.tags)

    def kept(self, length: int) -> Any:
        """What a truncation leaves."""
        return replace(self, tags=self.tags[:length], tokens=min(self.tokens, length))


def codes_of(tags: Any, layer: int, heads: int, dim: int) -> np.ndarray:
    """int8 [n, heads, dim] of positions 0.. with these tags."""
    seeds = np.asarray(tags, np.int64) * 7919 + np.arange(len(tags)) * 31 + layer * 101
    grid = np.arange(heads * dim).reshape(heads, dim) * 17
    return ((seeds[:, None, None] * 13 + grid) % 199 - 99).astype(np.int8)


def scales_of(tags: Any, layer: int, heads: int) -> np.ndarray:
    seeds = np.asarray(tags, np.int64) * 37 + np.arange(len(tags)) * 11 + layer
    return (2.0 ** (seeds[:, None] % 20 - 10) * np.ones(heads)).astype(np.float32)


class History:
    """One history, from a seed."""

    geometries = GEOMETRIES
    initial = State

    def __init__(self, folder: str, seed: int, mutation: Mutation | None = None) -> None:
        self.random = Random(seed)
        self.machine = Machine(folder, mutation)
        self.path = os.path.join(folder, NAME)
        self.geometry = self.random.choice(self.geometries)
        self.writer: MappedWriter | None = None
        self.reader: MappedReader | None = None
        self.reader_state: State | None = None
        self.now = self.initial()  # published
        self.may: list[State | None] = [None]  # what power loss may leave; None: no file
        self.past: list[State] = []  # every state ever committed
        self.next_tag = 1
        self.images = 0
        self.going: list[State] = []  # where a truncation under way leads

    # Running

    def run(self, steps: int, images: int) -> None:
        """Run random steps, and look at as many images spread over them."""
        with self.machine.running(), warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # the dead do not close
            try:
                self._step(self.create)
                for left in range(steps, 0, -1):
                    self._random_step()
                    wanted = -(-(images - self.images) // left)
                    for _ in range(wanted):
                        self.look_at_image(self.machine.disk.power_loss(self.random))
            finally:
                self._abandon()
                self._close_reader()

    def _random_step(self) -> None:
        random = self.random
        if self.writer is None and self.may == [None]:
            return self._step(self.create)
        chance = random.random()
        if chance < 0.12:
            return self.lose_power()
        if chance < 0.2:
            return self.follow()
        if self.writer is None:
            return self._step(random.choice([self.open, self.open, self.resize, self.overwrite]))
        return self._step(random.choice(self.steps()))

    def steps(self) -> list[Any]:
        """What a writer may do next, each as often as it is likely."""
        return [self.extend] * 6 + [self.flush] * 3 + [self.truncate] * 3 + [self.close, self.annotate, self.partial]

    def _step(self, step: Any) -> None:
        """Do a step; the process may die or be interrupted, or power may be lost, in its middle."""
        random, machine = self.random, self.machine
        before = self.now
        machine.new_process()
        self.going = []
        if random.random() < 0.4:
            machine.countdown = random.randrange(random.choice([3, 8, 20]))
            machine.interruption = random.choice([Killed, Killed, KeyboardInterrupt])
        try:
            step()
        except Killed:
            for _ in range(4):  # the most interesting moments
                self.look_at_image(machine.disk.power_loss(random))
            self._after_death(before)
        except KeyboardInterrupt:
            machine.countdown = None
            self._after_interruption(before)
        finally:
            machine.countdown = None
        self.check_reader()

    # Steps

    def create(self) -> None:
        new = self.initial(capacity=self.geometry.capacity)
        self.may = [None, new]
        self.now = new
        self.writer = MappedWriter.create(self.path, self.geometry, document(0), metadata_room=100)
        self.committed(new)

    def overwrite(self) -> None:
        new = self.initial(capacity=self.geometry.capacity)
        self.may = [*self.may, new]
        self.now = new
        self.writer = MappedWriter.create(
            self.path, self.geometry, document(0), metadata_room=100, overwrite=True, timeout=0
        )
        self.committed(new)

    def open(self) -> None:
        self.writer = MappedWriter.open_locked(self.path, timeout=0)
        self.check(self.writer, [self.now], "reopened")

    def extend(self) -> None:
        assert self.writer
        room = self.geometry.capacity - self.now.length
        count = min(room, self.random.choice([1, 1, 2, 5, 17, 64, 120, 256]))
        tags = self.now.tags + (self.next_tag,) * count
        self.next_tag += 1
        if not count:
            return
        with_ids = self.random.random() < 0.5
        after = replace(self.now, tags=tags, tokens=len(tags) if with_ids else self.now.tokens)
        cache = kvmmap.QuantizedKvCache.of_storage(self.writer)
        rows = [expected_rows(after, number, shape) for number, shape in enumerate(self.geometry.layers)]
        start = cache._check_level(count)
        assert start == self.now.length, (start, self.now.length)
        for layer, part in zip(self.writer.layers, rows, strict=True):
            layer.write(start, type(layer.slabs())([array[start:] for array in part]))
        self.keep(start, after)
        if with_ids:
            cache._record_tokens(start, np.arange(start, len(tags), dtype=np.int32) + tags[-1])
        self.writer.publish_step(start + count)
        self.now = after

    def keep(self, start: int, after: State) -> None:
        """Keep the rows from `start` on in 16 bits besides, where a cache does."""

    def partial(self) -> None:
        """A step that reaches only the first of two layers: rolled back by the next writer."""
        assert self.writer
        if self.now.length < self.geometry.capacity and len(self.writer.row_layers) > 1:
            layer = self.writer.row_layers[0]
            shape = self.geometry.layers[layer.index]
            junk = expected_rows(State((9_999,) * (self.now.length + 1)), layer.index, shape)
            layer.write(self.now.length, type(layer.slabs())([array[-1:] for array in junk]))
            layer.publish(self.now.length + 1)
            self.writer.truncate(self.now.length)

    def flush(self) -> None:
        assert self.writer
        self.may = [*self.may, self.now]
        self.writer.commit()
        self.committed(self.now)

    def close(self) -> None:
        assert self.writer
        self.may = [*self.may, self.now]
        self.writer.close()
        self.writer = None
        self.committed(self.now)

    def annotate(self) -> None:
        assert self.writer
        self.now = replace(self.now, note=self.now.note + 1)
        self.writer.set_document(document(self.now.note))
        self.flush()

    def truncate(self) -> None:
        assert self.writer
        length = self.random.choice([0, self.now.length // 2, max(0, self.now.length - 3), self.now.length])
        self.truncate_to(length)

    def truncate_to(self, length: int, act: Any = None) -> None:
        """Truncate, by `act` if it is given."""
        assert self.writer
        after = self.now.kept(length)
        promised = [self.truncated(state, length) for state in self.may if state is not None]
        noted = [replace(state, note=self.now.note) for state in promised]
        before = self.may
        self.may = [*self.may, *promised, *noted]
        self.going = [after]
        act() if act else self.writer.truncate(length)
        self.now = after
        # Only what had been committed needs a shorter commit; published positions just go.
        longer = [state is not None and max(state.length, state.tokens) > length for state in before]
        if all(longer):
            self.may = list(dict.fromkeys(noted))
        elif any(longer):  # which of them it was is not known since a commit was cut off
            self.may = list(dict.fromkeys([*promised, *noted]))
        else:
            self.may = before
        self.past += noted

    def truncated(self, state: State, length: int) -> State:
        """What the commit of a truncation leaves of a committed state."""
        return state.kept(length)

    def resize(self) -> None:
        from kvmmap.storage.file.resize import resize_file

        capacity = self.random.choice([400, 700, 1000, None])
        if capacity is not None and capacity < self.now.length:
            return
        after = replace(self.now, capacity=self.now.length if capacity is None else capacity)
        self.may = [*self.may, self.now, after]
        self.going = [after]
        resize_file(self.path, capacity)
        self.now = after
        self.committed(after)
        self.geometry = self._ask_geometry()

    def _ask_geometry(self) -> CacheGeometry:
        with contextlib.closing(MappedReader.open(self.path)) as reader:
            return reader.geometry

    def committed(self, state: State) -> None:
        self.past += [*[other for other in self.may if other is not None], state]
        self.may = [state]

    # Ends of processes and machines

    def _abandon(self) -> None:
        """The writer's process is gone: its descriptor, and with it its lock, and nothing else happens."""
        if self.writer is not None:
            self.writer.file.close()
        self.writer = None
        gc.collect()

    def _after_death(self, before: State) -> None:
        self._abandon()
        self.machine.new_process()
        if not os.path.exists(self.path):
            assert None in self.may
            self.may, self.now = [None], self.initial()
            return
        self._adopt_published(before)

    def _adopt_published(self, before: State) -> None:
        """In the same boot: where the last finished step left it, or the one under way."""
        allowed = {before, self.now, *self.going, *[state for state in self.may if state is not None]}
        with contextlib.closing(MappedReader.open(self.path)) as reader:
            found = self.check(reader, [*allowed, *self._partly(before)], "after a death")
            self.geometry = reader.geometry
        self.now = found
        # Notes and ids of an append that was cut off may be there already; rows may not.

    def _partly(self, before: State) -> list[State]:
        """Ids run ahead of rows, and an append that was cut off has rows of no layer or of all."""
        more = [replace(before, tokens=tokens) for tokens in range(before.tokens, before.length + 1)]
        # A truncation that was cut off has lowered lengths or not, and then ids or not.
        states = [before, self.now, *self.going, *[state for state in self.may if state is not None]]
        for a in states:
            for b in states:
                tokens = min(b.tokens, a.length)
                more += [
                    replace(a, tokens=tokens, note=b.note),
                    replace(a, tokens=tokens, note=b.note, capacity=b.capacity),
                ]
        return more

    def _after_interruption(self, before: State) -> None:
        """Ctrl-C in the middle of a step: the handle, if there is one, continues; what it holds is as after a death."""
        if self.writer is None or self.writer.closed:
            self._after_death(before)
            return
        allowed = [before, self.now, *[s for s in self.may if s is not None], *self._partly(before)]
        # A handle that was interrupted brings itself in order when it writes next, at the latest.
        try:
            self.writer.layers[0].begin(0)
            lengths = [layer.length for layer in self.writer.layers]
            if min(lengths) != max(lengths):
                raise PromiseError(f"layers are not level after an interruption: {lengths}")
        except kvmmap.KvmmapError as error:
            raise PromiseError(f"after an interruption: {error}") from error
        if self.writer._new_document is not None:
            allowed += [replace(state, note=self.now.note) for state in allowed]
        found = self.check(self.writer, allowed, "after an interruption")
        self.now = found
        slot = self.writer.snapshot.slot
        self.may = [*self.may, *[s for s in allowed if s.length == slot.seq_len]]
        self.may = [*self.may, found]
        self.writer.commit()
        self.committed(found)

    def lose_power(self) -> None:
        """Power is lost; the machine restarts on one of the images, and the history continues from there."""
        image = self.machine.disk.power_loss(self.random)
        self._abandon()
        self._close_reader()
        self.machine.restart(image)
        found = self._look(self.path)
        self.may = [found]
        self.now = found or self.initial()
        self.images += 1
        if found is not None:
            self.past.append(found)
            self.geometry = self._ask_geometry()

    # Looking

    def look_at_image(self, image: dict[str, bytearray]) -> None:
        """Open an image that a power loss now may leave, beside the real file."""
        self.images += 1
        self.past = list(dict.fromkeys([*self.past, *[state for state in self.may if state is not None]]))
        boot, self.machine.boot = self.machine.boot, -self.images
        folder = self.machine.folder + ".image"
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, NAME)
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            if NAME in image:
                with open(path, "wb") as file:
                    file.write(image[NAME])
            self._look(path)
            if NAME in image and self.random.random() < 0.2:
                self._damage_a_slot(path)
        finally:
            self.machine.boot = boot

    def _look(self, path: str) -> State | None:
        if not os.path.exists(path):
            if None not in self.may:
                raise PromiseError("the file is gone")
            return None
        try:
            with contextlib.closing(MappedReader.open(path)) as reader:
                found = self.check(reader, self.may, "after power loss")
                report = reader.verify()
                if not report.sound:
                    raise PromiseError(f"not clean: {report.damages}")
        except (kvmmap.KvmmapError, OSError) as error:
            raise PromiseError(f"can't be opened: {error}") from error
        return found

    def _damage_a_slot(self, path: str) -> None:
        """On top of it all a bit of a commit record flips: an error, or a state that was once promised, whole."""
        place = self.random.choice([4096, 8192]) + self.random.randrange(80)
        with open(path, "r+b") as file:
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self.random.randrange(8)]))
        try:
            with contextlib.closing(MappedReader.open(path)) as reader:
                self.check(reader, [*self.may, *self.past], "with a damaged commit record")
        except kvmmap.CorruptCacheError:
            pass

    def check(self, reader: MappedReader, allowed: list[Any], when: str) -> State:
        """Return which of the allowed states a handle shows, down to the last byte."""
        length, capacity = self.length_of(reader), reader.geometry.capacity
        note = reader.document.metadata["note"]
        tokens = min(self.tokens_of(reader), length)
        for state in allowed:
            if state is None or (state.length, min(state.tokens, length)) != (length, tokens):
                continue
            if (state.note, state.capacity) == (note, capacity) and self._same(reader, state):
                return self.adopted(reader, state)
        known = [(s.length, s.tokens, s.note, s.capacity) if s else None for s in dict.fromkeys(allowed)]
        raise PromiseError(
            f"{when}: holds {(length, tokens, note, capacity)}, which is none of {known[:8]}, or other rows"
        )

    def length_of(self, reader: MappedReader) -> int:
        """Positions that a handle knows of."""
        return min(layer.length for layer in reader.layers)

    def tokens_of(self, reader: MappedReader) -> int:
        """Token ids that a handle knows of."""
        return reader.token_len

    def adopted(self, reader: MappedReader, state: State) -> State:
        """The state to continue with, where a handle shows this one."""
        return state

    def _same(self, reader: MappedReader, state: State) -> bool:
        ids = reader.read_tokens(min(state.tokens, state.length))
        marks = expected_ids(state)[: len(ids)]
        if not np.all((ids == marks) | (ids == -1)):
            return False
        for number, shape in enumerate(reader.geometry.layers):
            rows = reader.layers[number].slabs().part(0, state.length)
            for array, expected in zip(rows, expected_rows(state, number, shape), strict=True):
                if not np.array_equal(array, expected):
                    return False
        return True

    # A reader that stays open

    def follow(self) -> None:
        """Open a reader, or refresh it."""
        if not os.path.exists(self.path):
            return
        try:
            if self.reader is None:
                self.reader = MappedReader.open(self.path)
            else:
                self.reader.refresh()
        except kvmmap.CacheChangedError:
            self._close_reader()
            return
        self.reader_state = self.check(self.reader, [self.now, *self._partly(self.now)], "a reader")

    def check_reader(self) -> None:
        """Assert that it sees its snapshot, or gets CacheChangedError."""
        if self.reader is None or self.reader_state is None:
            return
        if not self._same(self.reader, self.reader_state):
            try:
                self.reader.check()
            except kvmmap.CacheChangedError:
                self._close_reader()
                return
            raise PromiseError("a reader was given other rows than it had seen, and was not told")

    def _close_reader(self) -> None:
        if self.reader is not None:
            self.reader.close()
        self.reader = self.reader_state = None


def document(note: int) -> Document:
    return Document(None, {"note": note})


def expected_rows(state: State, layer: int, shape: LayerGeometry) -> tuple[np.ndarray, ...]:
    if not shape.has_rows:
        return ()
    codes = codes_of(state.tags, layer, shape.num_kv_heads, shape.head_dim)
    values = codes_of(state.tags, layer + 50, shape.num_kv_heads, shape.value_head_dim)
    scales = scales_of(state.tags, layer, shape.num_kv_heads)
    return codes, scales, values, scales * 2


def expected_ids(state: State) -> np.ndarray:
    return (np.asarray(state.tags, np.int64) + np.arange(state.length)).astype(np.int32)
