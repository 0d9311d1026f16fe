"""Copying the first positions of a chain into one whole file.

Rows are shared with the files of the chain where the file system can and they lie on pages in both; elsewhere they are
copied. They are verified first, and the new file's checksums are computed from the rows that were verified: damage in a
source gets no new, good checksum.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from ...errors import KvmmapError
from ...format import PAGE, slab_sections
from ...metadata import Document
from ..checkpoints import copy_checkpoints
from ..posix import closing_on_error
from ..protocols import Durability, Progress
from .chain import ChainStorage
from .chain_layer import ChainLayer
from .placement import METADATA_ROOM, already_exists, build_file, place_of, replace_file
from .resize import copy_recent
from .writer import MappedWriter

STEP_TOKENS = 8192
"""Positions of a layer that are copied between two calls of `progress`."""


def flatten(
    chain: ChainStorage,
    target: str,
    *,
    length: int,
    capacity: int,
    document: Document,
    durability: Durability = "publish",
    overwrite: bool = False,
    timeout: float = 0,
    progress: Progress | None = None,
) -> MappedWriter:
    """Make a new file at `target` with the first `length` positions of a chain, and hold it for appending.

    Raises:
        CorruptCacheError: a block does not match its checksum; nothing was made.
        CacheExistsError, CacheLockedError: as in `MappedWriter.create`.
    """
    target = place_of(target, overwrite=overwrite)
    geometry = dataclasses.replace(chain.geometry, capacity=capacity)
    version = chain.version()
    room = max(METADATA_ROOM, len(document.encode()))
    file, superblock = build_file(target, geometry, document, metadata_room=room)
    try:
        with closing_on_error(file):
            new = MappedWriter(file, superblock, durability=durability)
        _copy_rows(chain, new, length, progress)
        sums = chain.block_checksums(length)
        tokens = min(chain.token_len, length)
        new.write_tokens(0, chain.read_tokens(tokens))
        for layer in new.layers:
            layer.publish(length)
        new.publish_tokens(tokens)
        chain.validate(version)  # after a truncation meanwhile, other rows may have been copied
        new.use_checksums(length, sums)
        copy_recent(chain.layers, new.layers, length)
        copy_checkpoints(chain.checkpoints, new.checkpoints, length)
        new.commit()
        if overwrite and os.path.lexists(target):
            replace_file(file, target, timeout)
        else:
            file.link_to(target)
        new.path = target
    except BaseException as error:
        file.discard() if file.path != target else file.close()
        if isinstance(error, FileExistsError) and not isinstance(error, KvmmapError):
            raise already_exists(target) from None
        raise
    return new


def _copy_rows(chain: ChainStorage, new: MappedWriter, length: int, progress: Progress | None) -> None:
    """Copy the first positions of every layer, unpublished."""
    total = length * sum(layer.position_bytes for layer in chain.geometry.layers)
    done = 0
    for source, target in zip(chain.row_layers, new.row_layers, strict=True):
        assert isinstance(source, ChainLayer)
        for start in range(0, length, STEP_TOKENS):
            stop = min(start + STEP_TOKENS, length)
            source.ensure_verified(np.array([[start, stop]], np.int64))
            for part in source.parts(start, stop):
                position = source.edges[part.number] + part.start
                rest = _share(chain, new, source.index, part.number, part.start, part.stop, position)
                for rows in source.iter_rows(position, position + part.stop - part.start) if rest else ():
                    target.write(position, rows)
            done += (stop - start) * source.geometry.position_bytes
            if progress:
                progress(done, total)


def _share(
    chain: ChainStorage, new: MappedWriter, layer: int, number: int, start: int, stop: int, position: int
) -> bool:
    """Share the pages of positions [start, stop) of a file of the chain; True if they have to be copied as rows."""
    readers = [*(ancestor.reader for ancestor in chain.ancestors), chain.own]
    old, geometry = readers[number], chain.geometry.layers[layer]
    work = []
    for kind, row in zip(slab_sections(geometry), geometry.slab_bytes(1), strict=True):
        source = old.superblock.section(kind, layer).offset + start * row
        target = new.superblock.section(kind, layer).offset + position * row
        if source % PAGE or target % PAGE:
            return True
        work.append((source, target, (stop - start) * row))
    for source, target, size in work:
        new.file.copy_from(old.file, source, target, size)
    return False
