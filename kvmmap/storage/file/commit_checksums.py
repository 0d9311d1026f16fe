"""The checksums of a writer's commits: hashed as rows come, and those of incomplete blocks compared before going on.

A block that an append goes on with gets a new checksum, so it must be seen first that its old one holds. When a commit
is made, and what makes it durable, is the writer's business.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError
from ...format import Section, Slot
from ..checksums import BlockHasher
from ..protocols import Rows
from .verified_blocks import WHAT_TO_DO

if TYPE_CHECKING:
    from .writer import MappedWriter


_NONE = np.zeros(0, np.uint64)


class Signer:
    """Hashes what was written since the last commit, rows and token ids, and writes checksums of complete blocks.

    Set back by `rewind` it begins anew, whatever it was cut off at.
    """

    def __init__(self, storage: MappedWriter, slot: Slot) -> None:
        self._storage = weakref.proxy(storage)
        layers, size = storage.geometry.num_layers, storage.geometry.block_tokens
        self._rows = BlockHasher(_Slabs(storage, layers), 0, size, slot.seq_len)
        self._tokens = BlockHasher([[storage.map_tokens()]], layers, size, slot.token_len)
        self._block_tokens = size
        self._forget_sketches(slot.seq_len)

    def rewind(self, length: int, token_len: int) -> None:
        """Go on from a shorter commit, or from the last one again."""
        self._rows.rewind(length)
        self._tokens.rewind(token_len)
        self._forget_sketches(length)

    def _forget_sketches(self, length: int) -> None:
        self._first_block = length // self._block_tokens
        self._sketched: dict[int, NDArray[np.uint64]] = {}  # by layer, from the first block on

    def check_tails(self, slot: Slot) -> None:
        """Compare the incomplete blocks of the last commit with their checksums.

        Raises:
            CorruptCacheError: one does not match.
        """
        self.rewind(slot.seq_len, slot.token_len)  # an earlier look may have been cut off
        path, size = self._storage.path, self._storage.geometry.block_tokens
        for layer, (actual, expected) in enumerate(zip(self._rows.tails(), slot.tail_checksums[:-1], strict=True)):
            if actual != expected:
                start = slot.seq_len - slot.seq_len % size
                raise CorruptCacheError(
                    f"{path}: layer {layer} is damaged in positions [{start}, {slot.seq_len}): their checksum does not "
                    f"match; nothing was appended. {WHAT_TO_DO}",
                    path=path,
                    layer=layer,
                    position=start,
                )
        if self._tokens.tails()[0] != slot.tail_checksums[-1]:
            raise CorruptCacheError(f"{path}: token ids damaged; nothing was appended. {WHAT_TO_DO}", path=path)

    def tell(self, length: int, sums: NDArray[np.uint64]) -> None:
        """Take checksums that somebody knows already: see `MappedWriter.tell_sums`."""
        self._rows.tell(length, sums)

    def sign(self, length: int, token_len: int) -> tuple[int, ...]:
        """Write checksums and sketches of blocks that are complete now, and return those of the incomplete ones."""
        rows, ids = self._rows.advance(length), self._tokens.advance(token_len)
        self._write(Section.CHECKSUMS, rows.first_block, rows.complete)
        self.write_sketches(rows.first_block, rows.first_block + len(rows.complete))
        self._write(Section.TOKEN_CHECKSUMS, ids.first_block, ids.complete)
        self._forget_sketches(length)
        return rows.tails + ids.tails

    def write_sketches(self, first: int, stop: int) -> None:
        """Write the sketches of blocks [first, stop), whose rows are written, if the file has room for them."""
        if self._storage.superblock.has_sketches and first < stop:
            sums = np.stack([self._sketch(layer, first, stop) for layer in range(len(self._storage.layers))], axis=1)
            self._write(Section.SKETCH_CHECKSUMS, first, sums)

    def _sketch(self, layer: int, first: int, stop: int) -> NDArray[np.uint64]:
        known = self._sketched.get(layer, _NONE)[: stop - first] if first == self._first_block else _NONE
        return np.concatenate([known, self._storage.layers[layer].write_sketches(first + len(known), stop)])

    def sketch_ahead(self, layer: int, stop: int) -> None:
        """Write the sketches of a layer's blocks below `stop` before the commit that counts them: their rows are
        written, and stay as they are."""
        if self._storage.superblock.has_sketches and stop > self._first_block:
            self._sketched[layer] = self._sketch(layer, self._first_block, stop)

    def _write(self, section: Section, first_block: int, sums: NDArray[np.uint64]) -> None:
        if len(sums):
            offset = self._storage.superblock.section(section).offset + 8 * first_block * sums.shape[1]
            self._storage.file.write((offset,), (sums.astype("<u8", copy=False),))


class _Slabs(Sequence[Rows]):
    """Each layer's slabs, mapped when they are first hashed: opening a file maps no view it does not need."""

    def __init__(self, storage: MappedWriter, count: int) -> None:
        self._storage = weakref.proxy(storage)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, layer: int) -> Rows:  # type: ignore[override]
        if not 0 <= layer < self._count:
            raise IndexError(layer)
        rows: Rows = self._storage.layers[layer].slabs()
        return rows
