"""The checksums of commits: hashed as rows come, and those of incomplete blocks verified before they are continued.

A block that an append continues gets a new checksum, so its old one is verified first. When a commit is made, and what
makes it durable, is the writer's business.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ...errors import CorruptCacheError
from ...format import Section, Slot
from ..checksums import BlockHasher
from ..protocols import Rows
from .mapped_file import MappedFile
from .unread_blocks import WHAT_TO_DO


class CommitChecksums:
    """Hashes rows and token ids written since the last commit, and writes the checksums of complete blocks.

    `rewind` starts over, whatever interrupted the work.

    Args:
        mapped: the file.
        slot: the last commit.
    """

    def __init__(self, mapped: MappedFile, slot: Slot) -> None:
        self._mapped = mapped
        layers, size = mapped.geometry.num_layers, mapped.geometry.block_tokens
        self.slabs = Slabs(mapped)
        self._rows = BlockHasher(self.slabs, 0, size, slot.seq_len)
        self._tokens = BlockHasher([[mapped.token_ids()]], layers, size, slot.token_len)

    def rewind(self, length: int, token_len: int) -> None:
        """Continue from a shorter commit, or from the last one again."""
        self._rows.rewind(length)
        self._tokens.rewind(token_len)

    def verify_tails(self, slot: Slot) -> None:
        """Compare the incomplete blocks of the last commit with their checksums.

        Raises:
            CorruptCacheError: one does not match.
        """
        self.rewind(slot.seq_len, slot.token_len)  # an earlier attempt may have been interrupted
        path, size = self._mapped.path, self._mapped.geometry.block_tokens
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

    def use_precomputed(self, length: int, sums: NDArray[np.uint64]) -> None:
        """Use precomputed checksums instead of hashing: see `MappedWriter.use_checksums`."""
        self._rows.use_precomputed(length, sums)

    def write(self, length: int, token_len: int) -> tuple[int, ...]:
        """Write the checksums of blocks that are complete now, and return those of the incomplete ones."""
        rows, ids = self._rows.advance(length), self._tokens.advance(token_len)
        self._write(Section.CHECKSUMS, rows.first_block, rows.complete)
        self._write(Section.TOKEN_CHECKSUMS, ids.first_block, ids.complete)
        return rows.tails + ids.tails

    def _write(self, section: Section, first_block: int, sums: NDArray[np.uint64]) -> None:
        if len(sums):
            offset = self._mapped.superblock.section(section).offset + 8 * first_block * sums.shape[1]
            self._mapped.file.write((offset,), (sums.astype("<u8", copy=False),))


class Slabs(Sequence[Rows]):
    """Each layer's slabs, mapped when they are first used: opening a file creates no view that it does not need."""

    def __init__(self, mapped: MappedFile) -> None:
        self._mapped = mapped
        self._found: list[Rows | None] = [None] * mapped.geometry.num_layers

    def __len__(self) -> int:
        return len(self._found)

    def __getitem__(self, layer: int) -> Rows:  # type: ignore[override]
        rows = self._found[layer]
        if rows is None:
            rows = self._found[layer] = self._mapped.slabs(layer)
        return rows
