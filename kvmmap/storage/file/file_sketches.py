"""Sketches in a file (experimental): reading the kept ones, writing those of new blocks, and verifying them.

A file has sections for them, or none: then everything here does nothing. What a sketch is, and how it is computed from
rows, is in `storage.sketches`.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ...format import Section, Slot, Superblock, slab_sections
from ..posix import PosixFile
from ..protocols import Damage, Rows
from ..sketches import sketch_checksum, sketch_keys, sketch_stored
from .block_checks import register
from .mapped_file import MappedFile

Kept = Callable[[int], NDArray[np.uint16] | None]
"""Returns sketches of so many blocks from the first one on, fewer if it has no more; or None."""

_NONE = np.zeros(0, np.uint64)
_SKETCH = np.dtype("<u2")
_CHECKSUM = np.dtype("<u8")


class KeptSketches:
    """The sketches of one layer that a file keeps: of complete blocks that are committed, each with a checksum.

    A sketch is verified when it is first asked for. A damaged one counts as missing, since it can be computed again.
    """

    def __init__(self, superblock: Superblock, layer: int) -> None:
        geometry = superblock.geometry.layers[layer]
        self._layer = layer
        self._shape = (geometry.num_kv_heads, 2, geometry.head_dim)
        self._at = superblock.section(Section.KEY_SKETCHES, layer).offset
        self._layers = superblock.geometry.num_layers
        self._checksums_at = superblock.section(Section.SKETCH_CHECKSUMS).offset
        self._verified = 0, 0  # under which version, and how many from 0

    def first(self, blocks: int, memory: mmap.mmap, version: int, *, verify: bool) -> NDArray[np.uint16]:
        """Return the sketches of the first `blocks` blocks, all committed; fewer if one is damaged."""
        found = np.ndarray((blocks, *self._shape), _SKETCH, memory, self._at)
        verified = self._verified[1] if self._verified[0] == version else 0
        if not verify or verified >= blocks:
            return found
        sums = np.ndarray((blocks, self._layers), _CHECKSUM, memory, self._checksums_at)
        while (
            verified < blocks and sketch_checksum(self._layer, verified, found[verified]) == sums[verified, self._layer]
        ):
            verified += 1
        self._verified = version, verified
        return found[:verified]


class SketchWriter:
    """Writes the sketches of blocks that a commit completes.

    Args:
        file: the open file.
        superblock: the file's.
        slabs: the rows of each layer, over the whole capacity.
        length: positions committed.
    """

    def __init__(self, file: PosixFile, superblock: Superblock, slabs: Sequence[Rows], length: int) -> None:
        self._file = file
        self._superblock = superblock
        self._slabs = slabs
        self._block_tokens = superblock.geometry.block_tokens
        self.rewind(length)

    def rewind(self, length: int) -> None:
        """Continue from a commit of `length` positions."""
        self._first_block = length // self._block_tokens
        self._ahead: dict[int, NDArray[np.uint64]] = {}  # checksums by layer, from the first block on

    def commit(self, length: int) -> None:
        """Write the sketches of the blocks that a commit of `length` positions completes."""
        self.write(self._first_block, length // self._block_tokens)
        self.rewind(length)

    def write(self, first: int, stop: int, kept: Mapping[int, Kept] | None = None) -> None:
        """Write the sketches, and their checksums, of blocks [first, stop) of every layer, whose rows are written.

        Args:
            first, stop: which blocks.
            kept: by layer, the sketches that there are of the same rows; the others are computed.
        """
        if not self._superblock.has_sketches or first >= stop:
            return
        layers = self._superblock.geometry.num_layers
        sums = np.stack([self._layer(layer, first, stop, (kept or {}).get(layer)) for layer in range(layers)], axis=1)
        offset = self._superblock.section(Section.SKETCH_CHECKSUMS).offset + 8 * first * layers
        self._file.write((offset,), (sums.astype("<u8", copy=False),))

    def write_ahead(self, layer: int, stop: int, kept: Kept | None = None) -> None:
        """Write the sketches of a layer's blocks below `stop` before the commit that covers them.

        Args:
            layer, stop: which blocks. Their rows are written, and stay as they are.
            kept: the sketches that there are of the same rows. Then only these are written, and rows may follow.
        """
        if kept is not None:
            found = kept(stop)
            stop = 0 if found is None else len(found)
        if self._superblock.has_sketches and stop > self._first_block:
            self._ahead[layer] = self._layer(layer, self._first_block, stop, kept)

    def _layer(self, layer: int, first: int, stop: int, kept: Kept | None) -> NDArray[np.uint64]:
        geometry = self._superblock.geometry.layers[layer]
        if not geometry.has_rows:
            return np.zeros(stop - first, np.uint64)
        known = self._ahead.get(layer, _NONE)[: stop - first] if first == self._first_block else _NONE
        first += len(known)
        sums, block = np.zeros(stop - first, np.uint64), first
        at = self._superblock.section(Section.KEY_SKETCHES, layer).offset
        for part in self._parts(layer, first, stop, kept):
            self._file.write((at + geometry.sketch_bytes(block),), (part.astype("<u2", copy=False),))
            for sketch in part:
                sums[block - first] = sketch_checksum(layer, block, sketch)
                block += 1
        return np.concatenate([known, sums])

    def _parts(self, layer: int, first: int, stop: int, kept: Kept | None) -> Iterator[NDArray[np.uint16]]:
        """Yield the sketches of blocks [first, stop): kept ones first, then computed ones."""
        found = kept(stop) if kept is not None else None
        if found is not None and first < len(found):
            yield found[first:]
            first = len(found)
        geometry = self._superblock.geometry.layers[layer]
        yield from sketch_stored(self._slabs[layer].part, geometry, first, stop, self._block_tokens)


@register
def check_sketches(mapped: MappedFile, block: int, slot: Slot, skip: Container[int | None]) -> Iterator[Damage]:
    """Yield the layers whose sketch of a committed block is not that of its keys, or does not match its checksum.

    Args:
        mapped: the file.
        block: which one; nothing is found in one that is not complete.
        slot: the commit.
        skip: layers whose rows are damaged there.
    """
    size, superblock, layers = mapped.geometry.block_tokens, mapped.superblock, mapped.geometry.num_layers
    start, stop = block * size, (block + 1) * size
    if stop > slot.seq_len or not superblock.has_sketches:
        return
    stored: list[int] = []
    for number, layer in enumerate(mapped.geometry.layers):
        if number in skip or not layer.has_rows:
            continue
        problem = None
        try:
            keys = []
            for kind, slab in zip(slab_sections(layer), layer.key_slabs, strict=False):
                at = superblock.sections[kind, number].offset + start * slab.row_bytes
                data = mapped.read(at, size * slab.row_bytes)
                keys.append(np.frombuffer(data, slab.dtype).reshape(size, *slab.shape))
            at = superblock.section(Section.KEY_SKETCHES, number).offset + layer.sketch_bytes(block)
            found = mapped.read(at, layer.sketch_bytes(1))
            if not stored:
                stored = mapped.blocks.checksums(Section.SKETCH_CHECKSUMS, block * layers, layers)
        except EOFError:
            problem = "can't be read (the file ends before)"
        except OSError as error:
            problem = f"can't be read ({error.strerror})"
        else:
            expected = sketch_keys(keys, layer, size)
            if expected.astype("<u2", copy=False).tobytes() != found:
                problem = "is not that of its keys"
            elif sketch_checksum(number, block, expected[0]) != stored[number]:
                problem = "does not match its checksum"
        if problem:
            what = (
                f"layer {number}, positions [{start}, {stop}): the sketch {problem}, and is computed where it is needed"
            )
            yield Damage(
                f"{what}; resize() the cache, to the same capacity if you like, to replace it", number, start, stop
            )
