"""Opening a file with those that it continues, and making a file that continues another.

A parent is found by its name in the child's folder. A chain that would get longer than `MAX_FILES` is copied into one
whole file instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from ...errors import (
    CacheExistsError,
    CacheNotFoundError,
    CapacityExceededError,
    CorruptCacheError,
    FormatError,
    ParentError,
    PositionOutOfRangeError,
)
from ...format import Parent, name_fault
from ...metadata import Document
from ..protocols import Durability, Storage, Verify
from .ancestor import Ancestor, link_checksum, parent_path, tail_checksum
from .chain import ChainStorage
from .flatten import flatten
from .placement import METADATA_ROOM
from .reader import MappedReader
from .verify import check_blocks, check_tokens
from .writer import MappedWriter

MAX_FILES = 8
"""Files of a chain, its own included, that are made."""

MOST_FILES = 64
"""Files of a chain that are read; more are taken for a circle."""


def open_chain(own: MappedReader, *, verify: Verify = "read", record_use: bool = False) -> Storage:
    """Return the storage of an open file: itself, or the chain that it ends. Closes the file if that fails.

    Raises:
        ParentError: a file that it continues is missing, or does not hold what is needed of it.
    """
    if own.parent is None:
        return own
    ancestors: list[Ancestor] = []
    try:
        child: MappedReader = own
        while child.parent is not None:
            if len(ancestors) == MOST_FILES:
                raise ParentError(f"{own.path}: continues more than {MOST_FILES} files", path=own.path)
            ancestor = _open_parent(child, child.parent, verify, record_use)
            ancestors.insert(0, ancestor)
            child = ancestor.reader
        return ChainStorage(own, ancestors)
    except BaseException:
        for ancestor in ancestors:
            ancestor.reader.close()
        own.close()
        raise


def _open_parent(child: MappedReader, record: Parent, verify: Verify, record_use: bool) -> Ancestor:
    path = parent_path(child.path, record)
    try:
        reader = MappedReader.open(path, verify=verify, record_use=record_use)
    except CacheNotFoundError:
        raise ParentError(
            f"{child.path}: its parent {path} is missing: it holds the first {record.length} positions; restore that "
            "file under this name and in this folder, or remove this one",
            path=child.path,
            actual=path,
        ) from None
    except FormatError as error:
        raise ParentError(f"{child.path}: its parent can't be used: {error}", path=child.path, actual=path) from error
    try:
        shapes = [(one.geometry.layers, one.geometry.block_tokens) for one in (reader, child)]
        if shapes[0] != shapes[1]:
            raise ParentError(
                f"{child.path}: its parent {path} is another cache: its layers have other shapes or codecs",
                path=child.path,
                actual=path,
            )
        return Ancestor(reader, record, child.path)
    except BaseException:
        reader.close()
        raise


def create_child(
    path: str,
    parent: str,
    length: int | None,
    *,
    capacity: int | None = None,
    document: Document | None = None,
    durability: Durability = "publish",
    overwrite: bool = False,
    timeout: float = 0,
    metadata_room: int = METADATA_ROOM,
    durable: bool = True,
) -> Storage:
    """Make a file that begins with the first `length` positions of another, and open it for appending.

    Args:
        path: where.
        parent: the file that it continues, in the same folder.
        length: positions of the parent; all that are committed by default.
        capacity: positions to reserve, those of the parent included; the parent's by default.
        document: model and metadata; the parent's by default.
        durability, overwrite, timeout, metadata_room, durable: as in `MappedWriter.create`.

    Raises:
        PositionOutOfRangeError: fewer positions are committed, or `length` is 0.
        CapacityExceededError: `capacity` is below `length`.
        ParentError: the parent lies in another folder, or has a name that can't be recorded.
        CorruptCacheError: the parent is damaged where the new file begins.
        CacheExistsError: as in `kvmmap.create`; or `path` is a file of the chain itself.
    """
    with contextlib.ExitStack() as stack:
        chain = open_chain(MappedReader.open(parent, record_use=True), record_use=True)
        stack.callback(chain.close)
        length = _check_length(chain, length)
        capacity = chain.geometry.capacity if capacity is None else capacity
        if capacity < length:
            raise CapacityExceededError(
                f"{path}: a capacity of {capacity} has no room for the {length} positions of its parent",
                capacity=capacity,
                expected=length,
                actual=capacity,
            )
        _refuse_itself(path, _files(chain))
        states = None if not chain.geometry.states else _states_at(chain, length)
        document = chain.document if document is None else document
        ancestors = [] if not isinstance(chain, ChainStorage) else list(chain.ancestors)
        nearest = chain.own if isinstance(chain, ChainStorage) else chain
        assert isinstance(nearest, MappedReader)
        while ancestors and length <= ancestors[-1].record.length:
            nearest = ancestors.pop().reader
        if isinstance(chain, ChainStorage) and len(ancestors) + 2 > MAX_FILES:
            return flatten(
                chain,
                path,
                length=length,
                capacity=capacity,
                document=document,
                durability=durability,
                overwrite=overwrite,
                timeout=timeout,
            )
        record = make_record(nearest, length, path, durable=durable)
        slots = max(2, nearest.geometry.checkpoint_slots)  # one is that of the first position, and stays
        writer = MappedWriter.create(
            path,
            dataclasses.replace(nearest.geometry, capacity=capacity - length, checkpoint_slots=slots),
            document,
            durability=durability,
            overwrite=overwrite,
            timeout=timeout,
            metadata_room=metadata_room,
            parent=record,
            durable=durable,
        )
        if not durable:
            writer.before_first_commit = functools.partial(_sync_parent, nearest)
        try:
            if states is not None:
                writer.checkpoints.write(0, states)
                writer.checkpoints.name_staged(pin=True)
                writer.commit()
            child = ChainStorage(writer, [*ancestors, Ancestor(nearest, record, writer.path)])
        except BaseException:
            writer.close()
            raise
        _close_unused(chain, child)
        stack.pop_all()
        return child


def _check_length(chain: Storage, length: int | None) -> int:
    committed = chain.committed_len
    if length is None:
        length = chain.checkpoints.last(committed) if chain.geometry.states else committed
    if not 0 < length <= committed:
        raise PositionOutOfRangeError(
            f"{chain.path}: a cache can continue its first 1 to {committed} positions, which are committed, and not "
            f"{length}; flush() commits what is stored"
            + ("" if length else ", and create() without a parent is for 0"),
            position=length,
            actual=committed,
            path=chain.path,
        )
    return length


def _states_at(chain: Storage, length: int) -> list[NDArray[Any]]:
    """Return the states that a new file begins with.

    Raises:
        NoCheckpointError: the parent has none there.
    """
    return chain.checkpoints.read(length)


def _files(chain: Storage) -> list[MappedReader]:
    if isinstance(chain, ChainStorage):
        return [*(ancestor.reader for ancestor in chain.ancestors), chain.own]
    assert isinstance(chain, MappedReader)
    return [chain]


def _refuse_itself(path: str, files: Sequence[MappedReader]) -> None:
    for file in files:
        if file.file.is_at(path):
            raise CacheExistsError(f"{path}: is a file that the new cache would continue", path=path)


def _close_unused(chain: Storage, child: ChainStorage) -> None:
    """Close the files of a parent's chain that a child does not need."""
    needed = {id(ancestor.reader) for ancestor in child.ancestors}
    for reader in _files(chain):
        if id(reader) not in needed:
            reader.close()


def make_record(parent: MappedReader, length: int, path: str, *, durable: bool = True) -> Parent:
    """Return the record of a new file that begins after `length` positions of a chain.

    Args:
        parent: the file of the chain that has the last of these positions.
        length: positions.
        path: of the new file.
        durable: sync the parent; else that must be done before the new file is durable.

    Raises:
        ParentError: the parent lies in another folder, or has a name that can't be recorded.
        CorruptCacheError: the block that is cut is damaged.
    """
    folder, name = os.path.split(parent.path)
    if os.path.realpath(os.path.dirname(path) or ".") != os.path.realpath(folder):
        raise ParentError(
            f"{path}: its parent {parent.path} lies in another folder; a cache and those that it continues stand in "
            "the same one (kvmmap.fork makes a cache that stands alone)",
            path=path,
            actual=parent.path,
        )
    if wrong := name_fault(name):
        raise ParentError(f"{parent.path}: can't be continued: the name {name!r} {wrong}", path=path, actual=name)
    base = 0 if parent.parent is None else parent.parent.length
    generation = parent.live.get("generation")
    slot, layers = parent.snapshot.slot, parent.geometry.num_layers
    count = length - base
    tokens = min(slot.token_len, count)
    _verify_cut(parent, count, tokens)
    tails = tuple([tail_checksum(parent, track, count, tokens) for track in range(layers + 1)])
    record = Parent(
        file_id=parent.superblock.file_id,
        length=length,
        token_len=base + tokens,
        generation=max(generation, 0),
        checksum=link_checksum(parent, count, tokens, tails),
        name=name,
        tail_checksums=tails,
    )
    parent.validate(parent.version())  # the rows and checksums were still the parent's
    if durable:
        # The slot was read from memory: a child must not be durable before what it begins with.
        parent.file.sync()
    return record


def _sync_parent(parent: MappedReader) -> None:
    """Make durable what a child begins with, before its first commit."""
    parent.file.sync()


def _verify_cut(parent: MappedReader, count: int, tokens: int) -> None:
    """Verify the blocks that a new file begins in, because they get new checksums."""
    size, slot = parent.geometry.block_tokens, parent.snapshot.slot
    damages = list(check_blocks(parent.mapped, count // size, count // size + 1, slot)) if count % size else []
    if tokens % size:
        damages += check_tokens(parent.mapped, slot, tokens // size, tokens // size + 1)
    for damage in damages:
        raise CorruptCacheError(
            f"{parent.path}: {damage.what}; nothing was made",
            path=parent.path,
            layer=damage.layer,
            position=damage.start,
        )
