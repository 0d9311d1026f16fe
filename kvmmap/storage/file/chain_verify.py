"""Comparing a chain of files with its checksums: of each file before the last, the positions that count."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from ...errors import ParentError
from ..protocols import Damage, Progress, VerifyReport
from ..refusals import refuse_truncated
from .ancestor import Ancestor
from .reader import MappedReader
from .verify import check_blocks, check_tokens


def verify_chain(own: MappedReader, ancestors: Sequence[Ancestor], progress: Progress | None) -> VerifyReport:
    """Check everything that the commits of a chain cover. Writers may append meanwhile."""
    base = ancestors[-1].record.length
    row_bytes = sum(layer.position_bytes for layer in own.geometry.layers)
    before = base * row_bytes + 4 * sum(ancestor.tokens for ancestor in ancestors)
    report = VerifyReport(path=own.path, seq_len=base + own.seq_len, verified=base)
    mine = own.snapshot.slot.seq_len * row_bytes + 4 * own.snapshot.slot.token_len
    for ancestor in ancestors:
        if ancestor.changed:
            ancestor.settle()
        _verify_ancestor(ancestor, report, progress, before + mine)
    report.bytes = before

    def later(done: int, total: int) -> None:
        if progress:
            progress(before + done, before + total)

    rest = own.verify(later)
    report.seq_len, report.verified = base + rest.seq_len, base + rest.verified
    report.blocks += rest.blocks
    report.bytes += rest.bytes
    report.damages += [_moved(damage, base, None) for damage in rest.damages]
    return report


def _verify_ancestor(ancestor: Ancestor, report: VerifyReport, progress: Progress | None, total: int) -> None:
    reader, size = ancestor.reader, ancestor.reader.geometry.block_tokens
    row_bytes = sum(layer.position_bytes for layer in reader.geometry.layers)
    for start in range(0, ancestor.count, size):
        stop = min(start + size, ancestor.count)
        report.damages += [_moved(one, ancestor.base, reader.path) for one in verify_needed(ancestor, start, stop)]
        report.blocks += reader.geometry.num_layers
        report.bytes += (stop - start) * row_bytes
        if progress:
            progress(report.bytes, total)
    whole = ancestor.tokens // size
    damages = list(check_tokens(reader.mapped, reader.snapshot.slot, 0, whole))
    if ancestor.tokens % size:
        damages += _tail_damage(ancestor, reader.geometry.num_layers, whole * size, ancestor.tokens)
    report.damages += [_moved(damage, ancestor.base, reader.path) for damage in damages]
    report.blocks += -(-ancestor.tokens // size)
    report.bytes += 4 * ancestor.tokens
    if ancestor.changed and not ancestor.settle():
        refuse_truncated(reader.path)


def verify_needed(ancestor: Ancestor, start: int, stop: int) -> Iterator[Damage]:
    """Yield what is wrong with a file's positions [start, stop), of those that count, in the file's numbering."""
    reader, size = ancestor.reader, ancestor.reader.geometry.block_tokens
    yield from check_blocks(reader.mapped, start // size, -(-min(stop, ancestor.whole) // size), reader.snapshot.slot)
    if stop > ancestor.whole:
        for layer in range(reader.geometry.num_layers):
            yield from _tail_damage(ancestor, layer, ancestor.whole, ancestor.count)


def _tail_damage(ancestor: Ancestor, track: int, start: int, stop: int) -> Iterator[Damage]:
    ancestor.verified_tails.discard(track)
    try:
        ancestor.verify_tail(track)
    except ParentError:
        layer = None if track == ancestor.reader.geometry.num_layers else track
        place = "token ids" if layer is None else f"layer {layer}"
        yield Damage(f"{place}, positions [{start}, {stop}): checksum does not match", layer, start, stop)


def _moved(damage: Damage, base: int, parent: str | None) -> Damage:
    """Return damage of a file of a chain in the chain's numbering."""
    where = "" if parent is None else f"{parent}: "
    if damage.start is None or damage.stop is None:
        return dataclasses.replace(damage, what=f"{where}{damage.what}", parent=parent)
    start, stop = damage.start + base, damage.stop + base
    place = "token ids" if damage.layer is None else f"layer {damage.layer}"
    trouble = damage.what.rpartition(": ")[2]
    return Damage(f"{where}{place}, positions [{start}, {stop}): {trouble}", damage.layer, start, stop, parent)
