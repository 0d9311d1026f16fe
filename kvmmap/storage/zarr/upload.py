"""Upload one shard: all arrays at once, each block hashed on the way."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future

import numpy as np
from numpy.typing import NDArray

from ...format import block_checksum
from ..objects.protocol import Objects
from ..protocols import Rows
from .download import Block, as_bytes, block_digests
from .layout import Layout
from .shard import encode_shard


class Upload:
    """The first `count` positions of a shard being stored. It starts at once; `finish` waits.

    The rows must stay as they are until then.
    """

    def __init__(
        self, objects: Objects, layout: Layout, pool: Executor, place: tuple[int, int], rows: Rows, count: int
    ) -> None:
        self.count = count
        self._place = place
        self._layout = layout
        size = layout.geometry.block_tokens
        self._blocks = [Block(number, min(size, count - number * size)) for number in range(-(-count // size))]
        layer, shard = place
        self._parts: list[Future[list[int]]] = [
            pool.submit(_put_array, objects, layout, layout.data_key(layer, name, shard), array[:count], self._blocks)
            for name, array in rows.named()
        ]
        self.bytes = sum(array[:count].nbytes for _, array in rows.named())

    def finish(self) -> list[int]:
        """Wait until all is stored, and return the checksums of the blocks; an incomplete one's is the last.

        Raises:
            OSError: something is not stored.
        """
        self.settle()
        digests = [part.result() for part in self._parts]
        layer, shard = self._place
        first = shard * self._layout.shard_blocks
        return [
            block_checksum(layer, first + block.number, block.rows, [part[position] for part in digests])
            for position, block in enumerate(self._blocks)
        ]

    def settle(self) -> None:
        """Wait until nothing of it is under way any more, well or not."""
        for part in self._parts:
            part.exception()


def _put_array(
    objects: Objects, layout: Layout, key: str, rows: NDArray[np.generic], blocks: Sequence[Block]
) -> list[int]:
    """Store one array of a shard, and return the digests of its blocks."""
    data = as_bytes(rows)
    row_bytes = rows[:1].nbytes
    tokens = layout.geometry.block_tokens
    objects.put(key, encode_shard(data, tokens * row_bytes, layout.shard_blocks, layout.level))
    return block_digests(data, row_bytes, tokens, blocks)
