"""Hashes of prefixes: of a namespace and the token ids from position 0 up to a block boundary. Pure.

They find candidates. Nothing is served because of a hash: token ids are compared.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash
from numpy.typing import NDArray

from ..geometry import BLOCK_TOKENS

HEAD_TOKENS = 64
"""Token ids at the beginning of a segment by which segments that continue at one place are sorted."""


class Prompt:
    """Token ids to look for, with the hashes of their prefixes.

    Args:
        seed: the namespace's.
        ids: token ids, int32 [n].
    """

    def __init__(self, seed: bytes, ids: NDArray[np.int32]) -> None:
        self.ids = np.ascontiguousarray(ids, "<i4")
        self._state = xxhash.xxh3_128(seed)
        self._data = self.ids.data.cast("B") if len(self.ids) else memoryview(b"")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def blocks(self) -> int:
        """Block boundaries in it."""
        return len(self.ids) // BLOCK_TOKENS

    def hash(self, block: int) -> bytes:
        """Return the hash of the prefix that ends at a block boundary, 16 bytes; block 1 ends at position 256."""
        return self.hash_at(block * BLOCK_TOKENS)

    def hash_at(self, length: int) -> bytes:
        """Return the hash of a prefix, 16 bytes."""
        # At once and not incrementally: a search asks for a dozen of them, and 512 KB are hashed in 20 us.
        state = self._state.copy()
        state.update(self._data[: 4 * length])
        return state.digest()

    def head(self, position: int) -> bytes:
        """Return the sort key of the ids from a position on."""
        return head_of(self.ids[position : position + HEAD_TOKENS])


def head_of(ids: NDArray[np.int32]) -> bytes:
    """Return the sort key of a segment that begins with these ids: big-endian, so that bytes sort as ids do."""
    return ids[:HEAD_TOKENS].astype(">i4").tobytes()


def block_hashes(seed: bytes, ids: NDArray[np.int32], first: int) -> Iterator[bytes]:
    """Yield the hashes of the prefixes that end at block boundaries after `first` blocks, in order.

    Args:
        seed: the namespace's.
        ids: token ids from position 0 on, int32 [n].
        first: complete blocks to leave out.
    """
    data = memoryview(np.ascontiguousarray(ids, "<i4").tobytes())
    state = xxhash.xxh3_128(seed)
    size = 4 * BLOCK_TOKENS
    state.update(data[: first * size])
    for end in range((first + 1) * size, len(data) + 1, size):
        state.update(data[end - size : end])
        yield state.digest()


def common_length(one: NDArray[np.int32], other: NDArray[np.int32]) -> int:
    """Return how many ids two arrays begin with alike."""
    count = min(len(one), len(other))
    different = one[:count] != other[:count]
    first = int(different.argmax()) if count else 0
    return first if count and different[first] else count
