"""Comparing a `.kvm` file with its checksums.

Blocks are read with `pread` and not through the map: what the disk can't give is then an error to report, and not a
signal that ends the process. They may be of any size, and go by in pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from ...errors import CacheChangedError, CorruptCacheError, FormatError
from ...format import Extent, Section, Slot, Superblock, block_checksum, checksum_of, slab_sections
from ..protocols import Damage, Progress, VerifyReport, seq_len
from ..sketches import check_sketches

if TYPE_CHECKING:
    from .reader import MappedReader, Snapshot


PIECE_BYTES = 1 << 20
"""What is read at a time."""


def verify_file(reader: MappedReader, progress: Progress | None = None) -> VerifyReport:
    """Check everything that the last commit promises; a writer may be appending meanwhile."""
    snapshot, geometry = reader.snapshot, reader.geometry
    slot = snapshot.slot
    report = VerifyReport(path=reader.path, seq_len=max(seq_len(reader), slot.seq_len), verified=slot.seq_len)
    report.damages += _check_head(reader, snapshot)
    row_bytes = sum(layer.position_bytes for layer in geometry.layers)
    total = slot.seq_len * row_bytes + 4 * slot.token_len
    blocks = -(-slot.seq_len // geometry.block_tokens)
    for block in range(blocks):
        found = list(check_blocks(reader, block, block + 1, slot))
        report.damages += found
        report.damages += check_sketches(reader, block, slot, {damage.layer for damage in found})
        rows = min(geometry.block_tokens, slot.seq_len - block * geometry.block_tokens)
        report.bytes += rows * row_bytes
        report.blocks += geometry.num_layers
        if progress:
            progress(report.bytes, total)
    report.damages += check_tokens(reader, slot)
    report.blocks += -(-slot.token_len // geometry.block_tokens)
    report.bytes = total
    if progress:
        progress(total, total)
    reader.validate(snapshot.generation_word)  # were rows taken back meanwhile, the comparison was with the wrong ones
    return report


def check_blocks(reader: MappedReader, first: int, stop: int, slot: Slot | None = None) -> Iterator[Damage]:
    """Yield what is wrong in blocks [first, stop) of every layer, as far as they are committed (by `slot`)."""
    slot, geometry = slot or reader.snapshot.slot, reader.geometry
    size, layers = geometry.block_tokens, geometry.num_layers
    for block in range(first, stop):
        start, end = block * size, min((block + 1) * size, slot.seq_len)
        expected = list(slot.tail_checksums[:-1])
        if end - start == size:
            expected = _stored(reader, Section.CHECKSUMS, block * layers, layers)
        for layer in range(layers):
            row_bytes = geometry.layers[layer].slab_bytes(1)
            extents = [
                Extent(reader.superblock.sections[kind, layer].offset + start * row, (end - start) * row)
                for kind, row in zip(slab_sections(geometry.layers[layer]), row_bytes, strict=True)
            ]
            problem = _compare(reader, extents, layer, block, end - start, expected[layer])
            if problem:
                yield Damage(f"layer {layer}, positions [{start}, {end}): {problem}", layer, start, end)


def check_tokens(reader: MappedReader, slot: Slot, first: int = 0, stop: int | None = None) -> Iterator[Damage]:
    """Yield what is wrong in blocks [first, stop) of a commit's token ids; in all of them by default."""
    size, layers = reader.geometry.block_tokens, reader.geometry.num_layers
    offset = reader.superblock.section(Section.TOKEN_IDS).offset
    complete = slot.token_len // size
    expected = [*_stored(reader, Section.TOKEN_CHECKSUMS, 0, complete), slot.tail_checksums[-1]]
    blocks = -(-slot.token_len // size)
    for block in range(first, blocks if stop is None else min(stop, blocks)):
        start, end = block * size, min((block + 1) * size, slot.token_len)
        extents = [Extent(offset + 4 * start, 4 * (end - start))]
        problem = _compare(reader, extents, layers, block, end - start, expected[block])
        if problem:
            yield Damage(f"token ids, positions [{start}, {end}): {problem}", None, start, end)


def _stored(reader: MappedReader, section: Section, first: int, count: int) -> list[int]:
    data = bytearray(8 * count)
    reader.read_file(reader.superblock.section(section).offset + 8 * first, memoryview(data))
    values: list[int] = np.frombuffer(data, "<u8").tolist()
    return values


def _compare(
    reader: MappedReader, extents: list[Extent], track: int, block: int, rows: int, expected: int
) -> str | None:
    try:
        digests = [checksum_of(_pieces(reader, extent)) for extent in extents]
    except EOFError:
        return "the file ends before"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    if block_checksum(track, block, rows, digests) != expected:
        return "checksum does not match"
    return None


def _pieces(reader: MappedReader, extent: Extent) -> Iterator[memoryview]:
    """Yield a stretch of the file; each piece is to be used before the next."""
    room = memoryview(bytearray(min(extent.size, PIECE_BYTES)))
    for start in range(0, extent.size, PIECE_BYTES):
        piece = room[: min(PIECE_BYTES, extent.size - start)]
        reader.read_file(extent.offset + start, piece)
        yield piece


def _check_head(reader: MappedReader, snapshot: Snapshot) -> Iterator[Damage]:
    """Superblock, commit slots, live record and metadata."""
    superblock = reader.superblock
    try:
        data = bytearray(superblock.size)
        reader.read_file(0, memoryview(data))
        if Superblock.decode(bytes(data), reader.path, reader.status().st_size) != superblock:
            yield Damage("the superblock has changed since the file was opened")
    except (FormatError, EOFError) as error:
        yield Damage(f"superblock: {error}")
    # Only closing writes both. Before that, the one that does not count may be torn, and is the next to be written;
    # whether the one that counts is the last promised, opening has seen.
    if snapshot.slot.closed and not reader.live.in_use():
        for name, slot in zip("AB", reader.slots.settle(), strict=True):
            if slot is None:
                yield Damage(f"commit record {name} does not hold; the other one does")
    if snapshot.live:
        yield from (Damage(f"live record: {name} does not hold") for name in reader.live.broken_seals())
    try:
        reader.read_document(snapshot.slot)
    except CorruptCacheError as error:
        yield Damage(str(error))
    except CacheChangedError:
        pass  # commits since have written over it, and theirs is not what was asked about
