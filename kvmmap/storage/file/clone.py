"""A private continuation of a cache: a new `.kvm` file that begins with another's rows.

Rows are shared with the old file where the file system can (btrfs, XFS, bcachefs: a fork then costs no disk and next
to no time), and copied within the kernel elsewhere. The old file is only read, also beside its writer.

Checksums of complete blocks go over as they are, so that damage in the old file stays damage in the new one. Only
blocks that the fork cuts get new ones, and those are checked first.
"""

from __future__ import annotations

import contextlib
import dataclasses

from ...errors import CorruptCacheError
from ...format import WHOLE_CACHE, Section, Slot, Superblock, slab_sections
from ...ranges import check_range, check_room
from ..checkpoints import copy_checkpoints
from ..posix import PosixFile, closing_on_error
from ..protocols import Durability, Progress
from .chain import ChainStorage
from .child import open_chain
from .flatten import flatten
from .mapped_file import read_superblock
from .placement import already_exists, build_file, place_of
from .reader import MappedReader
from .resize import copy_recent
from .verify import check_blocks, check_tokens
from .writer import MappedWriter

STEP_BYTES = 64 << 20
"""Bytes that are copied between two calls of `progress`."""


def fork_file(
    source: str,
    target: str,
    *,
    length: int | None = None,
    capacity: int | None = None,
    durability: Durability = "publish",
    progress: Progress | None = None,
) -> MappedWriter:
    """Make a new file at `target` with the first `length` positions of `source`, and hold it for appending.

    With states these are the positions up to the last checkpoint that is not beyond `length`.

    Raises:
        CacheExistsError: there is something at `target`.
        PositionOutOfRangeError: fewer positions are stored.
        CapacityExceededError: `capacity` is less than `length`.
        CorruptCacheError: a block that is cut does not match its checksum.
        CacheChangedError: the writer truncated the source meanwhile.
    """
    target = place_of(target, overwrite=False)
    with contextlib.closing(MappedReader.open(source, record_use=True)) as old:
        if old.parent is not None:
            return _fork_chain(old, target, length, capacity, durability, progress)
        _, length = check_range(0, old.seq_len if length is None else length, old.seq_len)
        if old.geometry.states:
            length = old.checkpoints.last(length)
        geometry = dataclasses.replace(old.geometry, capacity=old.geometry.capacity if capacity is None else capacity)
        check_room(0, length, geometry.capacity)
        file, _ = build_file(
            target, geometry, old.document, metadata_room=old.superblock.section(Section.METADATA).size // 2
        )
        try:
            superblock = read_superblock(file)
            _share(old, file, superblock, length, progress)
            old.check()  # after a truncation meanwhile, other rows may have been copied
            return _finish(old, file, superblock, target, length, durability)
        except BaseException:
            file.discard() if file.path != target else file.close()
            raise


def _fork_chain(
    old: MappedReader,
    target: str,
    length: int | None,
    capacity: int | None,
    durability: Durability,
    progress: Progress | None,
) -> MappedWriter:
    """Make a whole file of a chain that ends with `old`."""
    chain = open_chain(old, record_use=True)
    assert isinstance(chain, ChainStorage)
    with contextlib.closing(chain):
        _, length = check_range(0, chain.seq_len if length is None else length, chain.seq_len)
        if chain.geometry.states:
            length = chain.checkpoints.last(length)
        capacity = chain.geometry.capacity if capacity is None else capacity
        check_room(0, length, capacity)
        return flatten(
            chain,
            target,
            length=length,
            capacity=capacity,
            document=chain.document,
            durability=durability,
            progress=progress,
        )


def _share(old: MappedReader, file: PosixFile, new: Superblock, length: int, progress: Progress | None) -> None:
    """Copy the rows and token ids of the first `length` positions."""
    extents: list[tuple[tuple[int, int], int]] = [((Section.TOKEN_IDS, WHOLE_CACHE), 4 * min(old.token_len, length))]
    for number, layer in enumerate(old.geometry.layers):
        sizes = zip(slab_sections(layer), layer.slab_bytes(length), strict=True)
        extents += [((kind, number), size) for kind, size in sizes]
    total, done = sum(size for _, size in extents), 0
    for key, size in extents:
        source, target = old.superblock.sections[key], new.sections[key]
        for start in range(0, size, STEP_BYTES):
            step = min(STEP_BYTES, size - start)
            file.copy_from(old.file, source.offset + start, target.offset + start, step)
            done += step
            if progress:
                progress(done, total)


def _finish(
    old: MappedReader, file: PosixFile, superblock: Superblock, target: str, length: int, durability: Durability
) -> MappedWriter:
    """Commit what was copied, and put the file in its place."""
    slot, size = old.snapshot.slot, old.geometry.block_tokens
    # The checksums of these blocks are copied; those of the rest are computed from their rows.
    rows = min(slot.seq_len, length) // size * size
    tokens = min(slot.token_len, length) // size * size
    _check_cut(old, rows, min(slot.seq_len, length), tokens, min(slot.token_len, length))
    for kind, count in (
        (Section.CHECKSUMS, rows // size * old.geometry.num_layers),
        (Section.TOKEN_CHECKSUMS, tokens // size),
    ):
        if not count:
            continue
        data = old.file.read(old.superblock.section(kind).offset, 8 * count)
        file.write((superblock.section(kind).offset,), (data,))
    _record_length(file, superblock, rows, tokens)
    file.try_lock()
    with closing_on_error(file):
        new = MappedWriter(file, superblock, durability=durability)
    new.write_sketches(0, rows // size, {n: old.mapped_layer(n).kept_sketches for n in old.geometry.row_layers})
    for layer in new.layers:
        layer.publish(length)
    copy_recent(old.layers, new.layers, length)
    new.publish_tokens(min(old.token_len, length))
    copy_checkpoints(old.checkpoints, new.checkpoints, length)
    new.commit()
    file.sync()  # a commit of whole blocks that were committed in the source had nothing to do
    try:
        file.link_to(target)
    except FileExistsError:
        raise already_exists(target) from None
    new.path = target
    return new


def _check_cut(old: MappedReader, rows: int, length: int, tokens: int, token_len: int) -> None:
    """Verify what is committed from `rows` and `tokens` on, because it gets new checksums."""
    size = old.geometry.block_tokens
    damages = list(check_blocks(old.mapped, rows // size, rows // size + 1, old.snapshot.slot)) if length > rows else []
    if token_len > tokens:
        damages += [damage for damage in check_tokens(old.mapped, old.snapshot.slot) if damage.start == tokens]
    for damage in damages:
        raise CorruptCacheError(
            f"{old.path}: {damage.what}; nothing was made: a fork of {damage.start} positions leaves the damage out",
            path=old.path,
            layer=damage.layer,
            position=damage.start,
        )


def _record_length(file: PosixFile, superblock: Superblock, rows: int, tokens: int) -> None:
    """Make the new file's commit cover `rows` positions and `tokens` token ids, both whole blocks."""
    for section in (Section.SLOT_A, Section.SLOT_B):
        extent = superblock.section(section)
        slot = Slot.decode(file.read(extent.offset, extent.size), superblock)
        assert slot is not None
        file.write(
            (extent.offset,), (dataclasses.replace(slot, seq_len=rows, token_len=tokens).encode(superblock.file_id),)
        )
