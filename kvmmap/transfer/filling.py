"""The loop of a copy: ranges of rows are fetched ahead, verified, written to the target, and published step by step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..storage.protocols import Rows, Storage
from ..storage.receiving import CopyRange, Receiver
from .plan import Plan

AHEAD_BYTES = 128 * 2**20
"""Rows that are fetched ahead of those being written."""


def fill(plan: Plan, receiver: Receiver) -> Iterator[int]:
    """Append to the target what it lacks, and yield its length after every step."""
    source, target, first = plan.incoming.source, receiver.storage, plan.start
    steps = plan.steps(target.seq_len)
    ids = source.read_tokens(first + plan.tokens)[first:]
    ahead = _fetching_ahead([part for step in steps for part in step], receiver)
    for step in steps:
        if not receiver.compares:
            source.verify_rows(step[0].start, step[0].stop)
        for part in step:
            next(ahead)
            position = target.layers[part.layer].begin(part.stop - part.start)
            if not receiver.has(part):
                for rows in _rows(part, compared_later=receiver.compares):
                    receiver.put(part.layer, position, rows)
                    position += rows.num_positions
        receiver.wait()
        source.check()  # the rows were still the source's when they had been read
        stop, recorded = step[0].stop - first, target.token_len
        if recorded < min(stop, plan.tokens):
            target.write_tokens(recorded, ids[recorded:stop])
            target.publish_tokens(min(stop, plan.tokens))
        for store in target.layers:
            store.publish(stop)
        if stop == plan.length:
            copy_recent(plan, target)
        yield stop


def copy_recent(plan: Plan, target: Storage) -> None:
    """Copy what the source keeps in 16 bits of the positions that were copied."""
    for number, layer in enumerate(plan.layers):
        kept = plan.incoming.source.layers[layer].recent_rows()
        if kept is not None:
            target.layers[number].take_recent(kept, plan.start, plan.start + plan.length)


def _rows(part: CopyRange, *, compared_later: bool) -> Iterator[Rows]:
    """Yield rows, verified unless they are in memory and the target compares them."""
    if part.source.in_memory and compared_later:
        yield part.source.slabs().part(part.start, part.stop)
    else:
        yield from part.source.iter_rows(part.start, part.stop)


def _fetching_ahead(work: Sequence[CopyRange], receiver: Receiver) -> Iterator[None]:
    """Once for every range: have the receiver expect those that follow."""
    asked, room = 0, AHEAD_BYTES
    for number, part in enumerate(work):
        while asked < len(work) and (room > 0 or asked <= number):
            receiver.expect(work[asked])
            room -= work[asked].bytes
            asked += 1
        room += part.bytes
        yield
