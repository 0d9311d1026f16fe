"""What a commit promises besides rows: checksums of blocks, and token ids, each read in chunks and verified."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError
from ...format import checksum
from ..objects.protocol import MissingObjectError
from .download import Block
from .handle import GroupHandle
from .root import Root

Sums = Future[NDArray[np.uint64] | None]
"""Checksums of a shard's blocks, [shard_blocks, num_layers], being fetched; None if they are damaged."""


class BlockChecksums:
    """The checksums of a group's blocks, fetched when first needed, and kept."""

    def __init__(self, handle: GroupHandle) -> None:
        self._handle = handle
        self._sums: dict[int, Sums] = {}

    def start(self, chunk: int) -> Sums:
        """Fetch a chunk, [blocks, num_layers], if it was not yet."""
        known = self._sums.get(chunk)
        if known is None or (known.done() and known.exception() is not None):
            self._sums[chunk] = self._handle.pool.submit(self.read, chunk, self._handle.root)
        return self._sums[chunk]

    def get(self, chunk: int) -> NDArray[np.uint64]:
        """Return a chunk. A writer changes the array, for blocks that it has stored."""
        sums = self.start(chunk).result()
        if sums is None:
            first = chunk * self._handle.layout.shard_blocks
            refuse_block(self._handle, 0, first, "their checksums are missing or damaged")
        return sums

    def read(self, chunk: int, root: Root) -> NDArray[np.uint64] | None:
        """Read a chunk, as far as the root's digest covers it; None if it does not match."""
        layout = self._handle.layout
        layers, size = layout.geometry.num_layers, layout.shard_blocks
        complete = min(size, root.seq_len // layout.geometry.block_tokens - chunk * size)
        sums = np.zeros((size, layers), "<u8")
        if complete > 0:
            try:
                data = self._handle.objects.get(layout.sums_key(chunk))
                stored = np.frombuffer(data, "<u8", complete * layers).reshape(complete, layers)
            except (MissingObjectError, ValueError):
                return None
            if checksum(stored.tobytes()) != root.sums_digests[chunk]:
                return None
            sums[:complete] = stored
        return sums

    def expected(self, layer: int, blocks: Sequence[Block], sums: Sums) -> list[int] | str:
        """Return the checksums of blocks of a shard, or what is wrong with them."""
        found = []
        for block in blocks:
            if block.rows < self._handle.geometry.block_tokens:
                found.append(self._handle.root.tails[layer])
                continue
            stored = sums.result()
            if stored is None:
                return "their checksums are missing or damaged"
            found.append(int(stored[block.number, layer]))
        return found

    def committed(self, first: int, stop: int) -> NDArray[np.uint64]:
        """Return the checksums of committed blocks [first, stop), [stop - first, num_layers]."""
        handle = self._handle
        size, layers = handle.layout.shard_blocks, handle.geometry.num_layers
        complete = min(stop, handle.root.seq_len // handle.geometry.block_tokens)
        parts = [np.zeros((0, layers), np.uint64)]
        chunks = range(first // size, -(-complete // size))
        for chunk in chunks:
            self.start(chunk)  # all at once
        parts += [self.get(chunk)[max(0, first - chunk * size) : complete - chunk * size] for chunk in chunks]
        if stop > complete:
            parts.append(np.array([handle.root.tails], np.uint64))
        return np.concatenate(parts)

    def clear(self) -> None:
        """Forget all, after the root has changed."""
        self._sums.clear()


def refuse_block(handle: GroupHandle, layer: int, block: int, trouble: str) -> NoReturn:
    """Raise for a block that is not what the commit says.

    Raises:
        CacheChangedError: there is another commit by now.
        CorruptCacheError: there is none.
    """
    handle.refuse_changed()
    position = block * handle.geometry.block_tokens
    raise CorruptCacheError(
        f"{handle.path}: layer {layer} is damaged in positions [{position}, "
        f"{position + handle.block_rows(layer, block)}): {trouble}",
        path=handle.path,
        layer=layer,
        position=position,
    )


def read_tokens(handle: GroupHandle) -> NDArray[np.int32]:
    """Read all recorded token ids.

    Raises:
        CorruptCacheError: some do not match the root's digests.
    """
    chunks = range(len(handle.root.token_digests))
    parts = list(handle.pool.map(lambda chunk: read_token_chunk(handle, chunk, handle.root), chunks))
    for chunk, part in enumerate(parts):
        if part is None:
            handle.refuse_changed()
            start = chunk * handle.layout.shard_tokens
            raise CorruptCacheError(f"{handle.path}: token ids damaged from position {start} on", path=handle.path)
    return np.concatenate([np.empty(0, np.int32), *[part for part in parts if part is not None]])


def read_token_chunk(handle: GroupHandle, chunk: int, root: Root) -> NDArray[np.int32] | None:
    """Read a chunk of token ids, as far as they are recorded; None if it does not match the root's digest."""
    size = handle.layout.shard_tokens
    count = min(size, root.token_len - chunk * size)
    try:
        ids = np.frombuffer(handle.objects.get(handle.layout.tokens_key(chunk)), "<i4", count)
    except (MissingObjectError, ValueError):
        return None
    return ids if checksum(ids.tobytes()) == root.token_digests[chunk] else None
