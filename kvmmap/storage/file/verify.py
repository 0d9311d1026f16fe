"""Comparing a `.kvm` file with its checksums.

Blocks are read with `pread` and not through the map: what the disk can't give is then an error to report, and not a
signal that ends the process. They may be of any size, and go by in pieces.
"""

from __future__ import annotations

from collections.abc import Container, Iterator

from ...errors import CacheChangedError, CorruptCacheError, FormatError
from ...format import CheckpointHeader, Extent, Section, Slot, Superblock, block_checksum, checksum_of
from ..protocols import Damage, Progress, VerifyReport
from .block_checks import check_extras
from .block_reader import BlockReader
from .mapped_file import MappedFile
from .recent_records import check_records
from .snapshot import Snapshot, SnapshotHolder


def verify_file(
    mapped: MappedFile,
    holder: SnapshotHolder,
    length: int,
    progress: Progress | None,
    sound: Container[tuple[int, int]] = (),
) -> VerifyReport:
    """Check everything that the last commit covers. A writer may append meanwhile.

    Args:
        mapped: the file.
        holder: of the snapshot whose commit is checked.
        length: positions that the handle shows.
        progress: called with (bytes done, bytes in all).
        sound: (layer, block) whose rows were compared already, since they were written.
    """
    snapshot, geometry = holder.current, mapped.geometry
    slot = snapshot.slot
    report = VerifyReport(path=mapped.path, seq_len=max(length, slot.seq_len), verified=slot.seq_len)
    report.damages += _check_head(mapped, snapshot)
    row_bytes = sum(layer.position_bytes for layer in geometry.layers)
    kept = sum([entry.word > 0 for entry in slot.checkpoints])
    total = slot.seq_len * row_bytes + 4 * slot.token_len + kept * geometry.checkpoint_bytes
    blocks = -(-slot.seq_len // geometry.block_tokens)
    for block in range(blocks):
        compared = {layer for layer in range(geometry.num_layers) if (layer, block) in sound}
        found = list(check_blocks(mapped, block, block + 1, slot, compared))
        report.damages += found
        report.damages += check_extras(mapped, block, slot, compared.union(damage.layer for damage in found))
        rows = min(geometry.block_tokens, slot.seq_len - block * geometry.block_tokens)
        report.bytes += rows * row_bytes
        report.blocks += geometry.num_layers
        if progress:
            progress(report.bytes, total)
    report.damages += check_checkpoints(mapped, slot)
    report.damages += check_tokens(mapped, slot)
    if not mapped.live.in_use():  # else its writer may be in the middle of a record
        report.inexact += check_records(mapped, slot.seq_len)
    report.blocks += -(-slot.token_len // geometry.block_tokens)
    report.bytes = total
    if progress:
        progress(total, total)
    holder.validate(snapshot.generation_word)  # after a truncation, the comparison was with other rows
    return report


def check_blocks(mapped: MappedFile, first: int, stop: int, slot: Slot, skip: Container[int] = ()) -> Iterator[Damage]:
    """Yield what is wrong in blocks [first, stop) of every layer but some, as far as a commit covers them."""
    geometry = mapped.geometry
    size, layers, reader = geometry.block_tokens, geometry.num_layers, mapped.blocks
    for block in range(first, stop):
        start, end = block * size, min((block + 1) * size, slot.seq_len)
        expected = list(slot.tail_checksums[:-1])
        if end - start == size:
            expected = reader.checksums(Section.CHECKSUMS, block * layers, layers)
        for layer in range(layers):
            if layer in skip:
                continue
            extents = reader.row_extents(layer, start, end)
            problem = _compare(reader, extents, layer, block, end - start, expected[layer])
            if problem:
                yield Damage(f"layer {layer}, positions [{start}, {end}): {problem}", layer, start, end)


def check_checkpoints(mapped: MappedFile, slot: Slot) -> Iterator[Damage]:
    """Yield what is wrong with the checkpoints that a commit names."""
    superblock, layout = mapped.superblock, mapped.superblock.checkpoint_layout
    specs = mapped.geometry.states
    for number, entry in enumerate(slot.checkpoints):
        if not entry.word:
            continue
        where = f"checkpoint at position {entry.position}"
        try:
            at = superblock.section(Section.CHECKPOINT, number).offset
            data = mapped.read(at, layout.header_size)
            header = CheckpointHeader.decode(data, superblock.file_id, len(specs))
            if header is None or (header.position, header.checksum) != (entry.position, entry.checksum):
                yield Damage(f"{where}: its header does not match", None, entry.position, entry.position)
                continue
            for spec, offset, expected in zip(specs, layout.offsets, header.checksums, strict=True):
                if checksum_of(mapped.blocks.pieces(Extent(at + offset, spec.nbytes))) != expected:
                    what = f"{where}: {spec}: checksum does not match"
                    yield Damage(what, spec.layer, entry.position, entry.position)
        except EOFError:
            yield Damage(f"{where}: the file ends before", None, entry.position, entry.position)
        except OSError as error:
            yield Damage(f"{where}: can't be read ({error.strerror})", None, entry.position, entry.position)


def check_tokens(mapped: MappedFile, slot: Slot, first: int = 0, stop: int | None = None) -> Iterator[Damage]:
    """Yield what is wrong in blocks [first, stop) of a commit's token ids; in all of them by default."""
    size, layers, reader = mapped.geometry.block_tokens, mapped.geometry.num_layers, mapped.blocks
    complete = slot.token_len // size
    expected = [*reader.checksums(Section.TOKEN_CHECKSUMS, 0, complete), slot.tail_checksums[-1]]
    blocks = -(-slot.token_len // size)
    for block in range(first, blocks if stop is None else min(stop, blocks)):
        start, end = block * size, min((block + 1) * size, slot.token_len)
        problem = _compare(reader, [reader.token_extent(start, end)], layers, block, end - start, expected[block])
        if problem:
            yield Damage(f"token ids, positions [{start}, {end}): {problem}", None, start, end)


def _compare(
    reader: BlockReader, extents: list[Extent], track: int, block: int, rows: int, expected: int
) -> str | None:
    try:
        digests = [checksum_of(reader.pieces(extent)) for extent in extents]
    except EOFError:
        return "the file ends before"
    except OSError as error:
        return f"can't be read ({error.strerror})"
    if block_checksum(track, block, rows, digests) != expected:
        return "checksum does not match"
    return None


def _check_head(mapped: MappedFile, snapshot: Snapshot) -> Iterator[Damage]:
    """Superblock, commit slots, live record and metadata."""
    superblock = mapped.superblock
    try:
        data = bytearray(superblock.size)
        mapped.read_into(0, memoryview(data))
        if Superblock.decode(bytes(data), mapped.path, mapped.status().st_size) != superblock:
            yield Damage("the superblock has changed since the file was opened")
    except (FormatError, EOFError) as error:
        yield Damage(f"superblock: {error}")
    # Only closing writes both slots. Before that, the other slot may be torn, and is the next to be written; that the
    # current one is the last acknowledged commit was checked when the file was opened.
    if snapshot.slot.closed and not mapped.live.in_use():
        for name, slot in zip("AB", mapped.slots.settle(), strict=True):
            if slot is None:
                yield Damage(f"commit record {name} is damaged; the other one is valid")
    if snapshot.live:
        yield from (Damage(f"live record: {name} is damaged") for name in mapped.live.damaged_words())
    try:
        mapped.document(snapshot.slot)
    except CorruptCacheError as error:
        yield Damage(str(error))
    except CacheChangedError:
        pass  # later commits have overwritten it
