"""Sketches of blocks: what is kept of a complete block's keys so that one can tell which blocks a query needs.

For each KV head and channel, the least and the greatest of the block's dequantised keys, as bf16 rounded outward
(Quest; Tang et al. 2024, arXiv:2406.10774). What lives here: computing them from rows, keeping them with a handle where
the storage has none, and comparing those in a file with its rows. What does not: what they are used for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterator
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..format import SLAB_SECTIONS, Section, Slot
from ..geometry import LayerGeometry
from .base import Damage, LayerStore, Rows

if TYPE_CHECKING:
    from .mapped import MappedReader

STEP_BYTES = 8 << 20
"""Rows are gone through in steps of about this size."""


def sketch_rows(codes: NDArray[np.int8], scales: NDArray[np.float32], block_tokens: int) -> NDArray[np.uint16]:
    """Return the sketches of whole blocks.

    Args:
        codes: key codes, int8 [blocks * block_tokens, num_kv_heads, head_dim], C-contiguous.
        scales: f32 [blocks * block_tokens, num_kv_heads], likewise.
        block_tokens: positions in a block.

    Returns:
        bf16 as uint16 [blocks, num_kv_heads, 2, head_dim]: least, not above any key, and greatest, not below any.
    """
    count, heads, dim = codes.shape
    sketches = np.empty((count // block_tokens, heads, 2, dim), np.uint16)
    _core.sketch_blocks(codes, scales, heads, dim, block_tokens, sketches)
    return sketches


def sketch_stored(
    rows: Callable[[int, int], Rows], geometry: LayerGeometry, first: int, stop: int, block_tokens: int
) -> Iterator[NDArray[np.uint16]]:
    """Yield the sketches of blocks [first, stop), all complete, some blocks at a time.

    Args:
        rows: gives positions [start, stop) of the layer.
        geometry: the layer's.
        first: first block.
        stop: one past the last.
        block_tokens: positions in a block.
    """
    step = max(1, STEP_BYTES // (block_tokens * geometry.position_bytes))
    for block in range(first, stop, step):
        some = rows(block * block_tokens, min(block + step, stop) * block_tokens)
        yield sketch_rows(some.key_codes, some.key_scales, block_tokens)


class ComputedSketches:
    """Sketches that a layer's storage does not keep: computed when they are asked for, and kept with the handle.

    They are those of blocks that follow one another; which is the first, the storage says.
    """

    def __init__(self, geometry: LayerGeometry, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._none = np.empty((0, geometry.num_kv_heads, 2, geometry.head_dim), np.uint16)
        self._mark = 0
        self._first, self._found = 0, self._none
        self._lock = threading.Lock()

    def between(self, first: int, stop: int, store: LayerStore, mark: int) -> NDArray[np.uint16]:
        """Return those of blocks [first, stop), all complete under a mark of the store's; those before are forgotten.

        Raises:
            CacheChangedError: rows were taken back since the mark.
        """
        known = self._none
        with self._lock:
            if self._mark == mark and self._first <= first:
                known = self._found[first - self._first :]
        parts, done = [known], first + len(known)
        # Not under the lock: it may take a while.
        for part in sketch_stored(store.rows, store.geometry, done, stop, self._block_tokens):
            parts.append(part)
            # Gone through once: their memory is given back.
            store.release(done * self._block_tokens, (done + len(part)) * self._block_tokens)
            done += len(part)
        store.check_since(mark)
        found = np.concatenate(parts) if len(parts) > 1 else known
        with self._lock:
            self._mark, self._first, self._found = mark, first, found
        return found[: stop - first]


def check_sketches(reader: MappedReader, block: int, slot: Slot, spare: Container[int | None]) -> Iterator[Damage]:
    """Yield the layers whose sketch of a committed block is not that of its keys.

    Args:
        reader: the file.
        block: which one; nothing is found in one that is not complete.
        slot: the commit.
        spare: layers whose rows are damaged there, so that nothing can be said.
    """
    size = reader.geometry.block_tokens
    start, stop = block * size, (block + 1) * size
    if stop > slot.seq_len:
        return
    for number, layer in enumerate(reader.geometry.layers):
        extent = reader.superblock.sections.get((Section.KEY_SKETCHES, number))
        if extent is None or number in spare:
            continue
        problem = None
        try:
            keys, scales = (
                reader.file.read(reader.superblock.sections[kind, number].offset + start * row, size * row)
                for kind, row in zip(SLAB_SECTIONS[:2], layer.slab_bytes(1), strict=False)
            )
            found = reader.file.read(extent.offset + layer.sketch_bytes(block), layer.sketch_bytes(1))
        except OSError as error:
            problem = f"can't be read ({error.strerror})"
        else:
            heads = layer.num_kv_heads
            codes = np.frombuffer(keys, np.int8).reshape(size, heads, layer.head_dim)
            expected = sketch_rows(codes, np.frombuffer(scales, "<f4").reshape(size, heads), size)
            if expected.astype("<u2", copy=False).tobytes() != found:
                problem = "is not that of its keys; resize() the cache, to the same capacity if you like, to mend it"
        if problem:
            yield Damage(f"layer {number}, positions [{start}, {stop}): the sketch {problem}", number, start, stop)
