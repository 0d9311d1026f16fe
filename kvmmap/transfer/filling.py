"""Rows of a copy on their way from one storage to another: what comes over, in which steps, and how it is put there.

What the copy becomes, and where it stands meanwhile, is not known here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

from ..cache import QuantizedKvCache
from ..geometry import CacheGeometry, check_range, check_room, index
from ..storage.file.writer import MappedWriter
from ..storage.protocols import LayerStore, Rows, Storage, seq_len
from ..storage.streaming import RowStream, open_stream

STEP_TOKENS = 8192
"""Positions of a layer that are copied at once."""

AHEAD_BYTES = 128 * 2**20
"""Rows that are fetched ahead of those being written."""

WRITERS = 2
"""Threads that write to a file."""

BACKLOG_BYTES = 64 * 2**20
"""Rows that may wait for these."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be copied."""

    source: Storage
    layers: list[int]
    start: int
    length: int
    """Positions to copy."""
    tokens: int
    """Token ids to copy."""
    geometry: CacheGeometry
    stamp: str
    """Names the copy: the same as long as what is copied begins the same."""

    @classmethod
    def make(
        cls,
        cache: QuantizedKvCache,
        start: int,
        stop: int | None,
        layers: Sequence[int] | None,
        capacity: int | None,
    ) -> Plan:
        source = cache.storage
        start, stop = check_range(start, cache.seq_len if stop is None else stop, cache.seq_len)
        chosen = [cache.layers.check(layer) for layer in (range(cache.num_layers) if layers is None else layers)]
        geometry = replace(
            cache.geometry,
            layers=tuple(cache.geometry.layers[layer] for layer in chosen),
            capacity=cache.capacity if capacity is None else index(capacity, "capacity"),
        )
        check_room(0, stop - start, geometry.capacity)
        identity = source.identity() or secrets.token_hex(8)  # what lies in memory can't be known again
        facts = [identity, start, chosen, geometry.capacity, source.document.encode().decode()]
        stamp = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
        tokens = max(0, min(cache.token_len, stop) - start)
        return cls(source, chosen, start, stop - start, tokens, geometry, stamp)

    @property
    def position_bytes(self) -> int:
        return sum(layer.position_bytes for layer in self.geometry.layers)

    def steps(self, begun: int) -> list[list[Stretch]]:
        """Return what comes over together, layer by layer, from a length that the target has."""
        first = begun // STEP_TOKENS * STEP_TOKENS + STEP_TOKENS
        edges = [begun, *range(first, self.length, STEP_TOKENS), self.length]
        return [
            [
                Stretch(self.source.layers[layer], self.start + start, self.start + stop, number, start)
                for number, layer in enumerate(self.layers)
            ]
            for start, stop in itertools.pairwise(edges)
        ]

    @property
    def keeps_sums(self) -> bool:
        """True if blocks of the copy have the checksums that they have in the source."""
        return self.start == 0 and self.layers == list(range(len(self.source.layers)))


class Stretch(NamedTuple):
    """Positions of one layer that come over in one step."""

    source: LayerStore
    start: int
    """In the source."""
    stop: int
    layer: int
    """In the target."""
    position: int
    """Where `start` is in the target."""

    @property
    def bytes(self) -> int:
        return (self.stop - self.start) * self.source.geometry.position_bytes


class Putting:
    """Puts rows where they belong in a group, which has threads of its own."""

    def __init__(self, target: Storage) -> None:
        self._target = target

    def expect(self, stretch: Stretch) -> None:
        """See that the rows are on their way."""
        stretch.source.prefetch(stretch.start, stretch.stop)

    def has(self, stretch: Stretch) -> bool:
        """True if the rows are where they belong already."""
        return False

    def put(self, layer: int, start: int, rows: Rows) -> None:
        self._target.layers[layer].write(start, rows)

    def wait(self) -> None:
        """Their source may forget them: a group has taken them."""


class Writing:
    """Writes rows to a file by other threads, while this one waits for the next; and the disk begins at once.

    Where they do not lie in memory, whoever receives them writes them: a piece is hashed and written while it is in the
    processor's cache, and the whole needs no memory.
    """

    def __init__(self, target: MappedWriter) -> None:
        self._target = target
        self._layers = target.layers
        self._pool = ThreadPoolExecutor(WRITERS)
        self._streams: dict[Stretch, RowStream] = {}
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

    def expect(self, stretch: Stretch) -> None:
        target = self._layers[stretch.layer]
        stream = open_stream(stretch.source, stretch.start, stretch.stop, target, stretch.position)
        if stream is None:
            stretch.source.prefetch(stretch.start, stretch.stop)
        else:
            self._streams[stretch] = stream

    def has(self, stretch: Stretch) -> bool:
        stream = self._streams.get(stretch)
        sound = stream is not None and stream.finish()
        self._streams.pop(stretch, None)  # only now: until then it may have to be abandoned
        if sound:  # others are still under way
            stop = stretch.position + stretch.stop - stretch.start
            self._target.sketch_ahead(stretch.layer, stop // self._target.geometry.block_tokens)
        return sound

    def put(self, layer: int, start: int, rows: Rows) -> None:
        """Start; wait if there is much to write already."""
        size = sum(array.nbytes for _, array in rows.named())
        self._under_way.append((size, self._pool.submit(self._write, layer, start, rows)))
        self._bytes += size
        while self._bytes > BACKLOG_BYTES and len(self._under_way) > 1:
            self._wait_for_one()

    def _write(self, layer: int, start: int, rows: Rows) -> None:
        self._layers[layer].write(start, rows)
        self._layers[layer].start_sync(start, start + len(rows.key_codes))

    def _wait_for_one(self) -> None:
        size, writing = self._under_way.popleft()
        self._bytes -= size
        writing.result()

    def wait(self) -> None:
        """Wait until all is written.

        Raises:
            OSError: something is not.
        """
        while self._under_way:
            self._wait_for_one()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            stream.cancel()
        self._pool.shutdown(cancel_futures=True)


def fill(plan: Plan, target: Storage, way: Putting | Writing, *, check: bool) -> Iterator[int]:
    """Append to the target what it lacks, and yield its length after every step.

    Args:
        way: how rows are put there.
        check: compare the source's rows with their checksums first; without, whoever asks does so afterwards.
    """
    source, first = plan.source, plan.start
    steps = plan.steps(seq_len(target))
    ids = source.read_tokens(first + plan.tokens)[first:]
    ahead = _reading_ahead([stretch for step in steps for stretch in step], way)
    for step in steps:
        if check:
            source.verify_rows(step[0].start, step[0].stop)
        for stretch in step:
            next(ahead)
            position = target.layers[stretch.layer].begin(stretch.stop - stretch.start)
            if not way.has(stretch):
                for part in _pieces(stretch, check=check):
                    way.put(stretch.layer, position, part)
                    position += len(part.key_codes)
        way.wait()
        source.check()  # the rows were still the source's when they had been read
        stop, recorded = step[0].stop - first, target.token_len
        if recorded < min(stop, plan.tokens):
            target.write_tokens(recorded, ids[recorded:stop])
            target.publish_tokens(min(stop, plan.tokens))
        for store in target.layers:
            store.publish(stop)
        yield stop


def _pieces(stretch: Stretch, *, check: bool) -> Iterator[Rows]:
    """Yield rows; compared with their checksums, unless they lie in a map and that is done later."""
    if stretch.source.in_memory and not check:
        yield stretch.source.slabs().part(stretch.start, stretch.stop)
    else:
        yield from stretch.source.iter_rows(stretch.start, stretch.stop)


def _reading_ahead(work: Sequence[Stretch], way: Putting | Writing) -> Iterator[None]:
    """Once for every stretch: see that what comes next is on its way."""
    asked, room = 0, AHEAD_BYTES
    for number, stretch in enumerate(work):
        while asked < len(work) and (room > 0 or asked <= number):
            way.expect(work[asked])
            room -= work[asked].bytes
            asked += 1
        room += stretch.bytes
        yield
