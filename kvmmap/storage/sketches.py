"""Sketches of blocks: what is kept of a complete block's keys so that one can tell which blocks a query needs.

For each KV head and channel, the least and the greatest of the block's dequantised keys, as bf16 rounded outward
(Quest; Tang et al. 2024, arXiv:2406.10774). What lives here: computing them from rows, and keeping them with
a handle where the storage has none. What does not: what they are used for.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from .. import _core
from ..codecs import INT8
from ..format import block_checksum, checksum
from ..geometry import LayerGeometry
from .protocols import LayerStore, Rows

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


def sketch_keys(keys: Sequence[NDArray[Any]], geometry: LayerGeometry, block_tokens: int) -> NDArray[np.uint16]:
    """Return the sketches of whole blocks of keys, given as their codec stores them; as `sketch_rows`."""
    if geometry.key_codec is INT8:
        return sketch_rows(keys[0], keys[1], block_tokens)
    rows = geometry.key_codec.decoded(keys, geometry.head_dim)
    blocks = rows.reshape(-1, block_tokens, geometry.num_kv_heads, geometry.head_dim)
    sketches: NDArray[np.uint16] = np.stack(
        [_rounded(blocks.min(axis=1), up=False), _rounded(blocks.max(axis=1), up=True)], axis=2
    )
    return sketches


def _rounded(numbers: NDArray[np.float32], *, up: bool) -> NDArray[np.uint16]:
    """Return the bits of the nearest bf16 that is not below (`up`), or not above."""
    bits = np.ascontiguousarray(numbers).view(np.uint32)
    away = (bits & 0xFFFF != 0) & ((bits >> 31 == 0) if up else (bits >> 31 == 1))
    upper: NDArray[np.uint16] = ((bits >> 16) + away).astype(np.uint16)
    return upper


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
        yield sketch_keys(some.keys, geometry, block_tokens)


class ComputedSketches:
    """Sketches that a layer's storage does not keep: computed on first use, and kept with the handle.

    They are those of consecutive blocks; the storage chooses the first.
    """

    def __init__(self, geometry: LayerGeometry, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._none = np.empty((0, geometry.num_kv_heads, 2, geometry.head_dim), np.uint16)
        self._version = 0
        self._first, self._found = 0, self._none
        self._lock = threading.Lock()

    def between(self, first: int, stop: int, store: LayerStore, version: int) -> NDArray[np.uint16]:
        """Return those of blocks [first, stop), all complete under a version; drop those before.

        Raises:
            CacheChangedError: positions were truncated since the version.
        """
        known = self._none
        with self._lock:
            if self._version == version and self._first <= first:
                known = self._found[first - self._first :]
        parts, done = [known], first + len(known)
        # Not under the lock: it may take a while.
        for part in sketch_stored(store.rows, store.geometry, done, stop, self._block_tokens):
            parts.append(part)
            # Gone through once: their memory is given back.
            store.release(done * self._block_tokens, (done + len(part)) * self._block_tokens)
            done += len(part)
        store.validate(version)
        found = np.concatenate(parts) if len(parts) > 1 else known
        with self._lock:
            self._version, self._first, self._found = version, first, found
        return found[: stop - first]


class KeepsSketches(Protocol):
    """A layer store that keeps sketches itself: a specialisation, and no part of the storage contract."""

    def sketches(self, blocks: int, version: int) -> list[NDArray[np.uint16]]: ...


_computed: weakref.WeakKeyDictionary[LayerStore, ComputedSketches] = weakref.WeakKeyDictionary()
_computed_lock = threading.Lock()


def layer_sketches(store: LayerStore, blocks: int, block_tokens: int, version: int) -> Sequence[NDArray[np.uint16]]:
    """Return the sketches of a layer's first `blocks` blocks, kept by its storage or computed.

    Args:
        store: the layer.
        blocks: how many; all of them complete under `version`.
        block_tokens: positions in a block.
        version: of the store, taken before its length.

    Returns:
        Arrays that follow one another, as `sketch_rows` returns them; not to be written to.

    Raises:
        CacheChangedError: positions were truncated since `version`.
    """
    keeping = cast(KeepsSketches | None, store if hasattr(store, "sketches") else None)
    if keeping is not None:
        return keeping.sketches(blocks, version)
    with _computed_lock:
        computed = _computed.get(store)
        if computed is None:
            computed = _computed[store] = ComputedSketches(store.geometry, block_tokens)
    return [computed.between(0, blocks, store, version)]


def sketch_checksum(layer: int, block: int, sketch: NDArray[np.uint16]) -> int:
    """Return the checksum of a block's sketch."""
    return block_checksum(layer, block, 1, [checksum(sketch.data)])
