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
from typing import Self

from .cache import QuantizedKvCache
from .geometry import CacheGeometry, check_range, check_room, index
from .storage.base import LayerStore, Rows, Storage, seq_len
from .storage.writer import MappedWriter

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

    def edges(self, begun: int) -> list[int]:
        """Return where steps start and end, from a length that the target has."""
        first = begun // STEP_TOKENS * STEP_TOKENS + STEP_TOKENS
        return [begun, *range(first, self.length, STEP_TOKENS), self.length]

    @property
    def keeps_sums(self) -> bool:
        """True if blocks of the copy have the checksums that they have in the source."""
        return self.start == 0 and self.layers == list(range(len(self.source.layers)))


class Putting:
    """Puts rows where they belong in a group, which has threads of its own."""

    def __init__(self, target: Storage) -> None:
        self._target = target

    def put(self, layer: int, start: int, rows: Rows) -> None:
        self._target.layers[layer].write(start, rows)

    def wait(self) -> None:
        """Their source may forget them: a group has taken them."""


class Writing:
    """Writes rows to a file by other threads, while this one waits for the next; and the disk begins at once."""

    def __init__(self, target: MappedWriter) -> None:
        self._layers = target.layers
        self._pool = ThreadPoolExecutor(WRITERS)
        self._under_way: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0

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
        self._pool.shutdown(cancel_futures=True)


def fill(plan: Plan, target: Storage, rows: Putting | Writing, *, check: bool) -> Iterator[int]:
    """Append to the target what it lacks, and yield its length after every step.

    Args:
        rows: how they are put there.
        check: compare the source's rows with their checksums first; without, whoever asks does so afterwards.
    """
    source, first = plan.source, plan.start
    edges = plan.edges(seq_len(target))
    ids = source.read_tokens(first + plan.tokens)[first:]
    ahead = reading_ahead(plan, edges)
    for start, stop in itertools.pairwise(edges):
        if check:
            source.check_rows(first + start, first + stop)
        for number, layer in enumerate(plan.layers):
            next(ahead)
            position = target.layers[number].begin(stop - start)
            for part in _pieces(source.layers[layer], first + start, first + stop, check=check):
                rows.put(number, position, part)
                position += len(part.key_codes)
        rows.wait()
        source.check()  # the rows were still the source's when they had been read
        recorded = target.token_len
        if recorded < min(stop, plan.tokens):
            target.write_tokens(recorded, ids[recorded:stop])
            target.publish_tokens(min(stop, plan.tokens))
        for store in target.layers:
            store.publish(stop)
        yield stop


def _pieces(layer: LayerStore, start: int, stop: int, *, check: bool) -> Iterator[Rows]:
    """Yield positions of a layer; compared with their checksums, unless they lie in a map and that is done later."""
    if layer.in_memory and not check:
        yield layer.slabs().part(start, stop)
    else:
        yield from layer.stretches(start, stop)


def reading_ahead(plan: Plan, edges: Sequence[int]) -> Iterator[None]:
    """Once for every layer of every step: see that what comes next is on its way."""
    work = [(start, stop, layer) for start, stop in itertools.pairwise(edges) for layer in plan.layers]
    sizes = [(stop - start) * plan.source.geometry.layers[layer].position_bytes for start, stop, layer in work]
    asked, room = 0, AHEAD_BYTES
    for number, size in enumerate(sizes):
        while asked < len(work) and (room > 0 or asked <= number):
            start, stop, layer = work[asked]
            plan.source.layers[layer].expect(plan.start + start, plan.start + stop)
            room -= sizes[asked]
            asked += 1
        room += size
        yield
